"""Errors of a file, address or cache: one line with its name, the problem and the remedy."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_dist.errors import UserError

FILE_REMEDY = "copy or download it again, or pass another file with --data"


class DataError(UserError):
    """The data cannot be used.

    ``problem`` is the file's name and what is wrong with it, ``remedy`` what to do; the ``str`` is
    both on one line. Picklable, so that ranks can send it to each other.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = one_line(problem)
        self.remedy = one_line(remedy)

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class MalformedError(ValueError):
    """What is wrong with the content of a file, without its name, which `naming_file` adds."""


@contextmanager
def naming_file(file: Path | str, remedy: str = FILE_REMEDY) -> Iterator[None]:
    """Convert any exception in the block into a `DataError` that names `file`.

    Parsers of untrusted bytes raise many more exceptions than they document (the pickle module a
    dozen), and none of them may reach the user as a traceback.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: {_fault(error)}", remedy) from error


def _fault(error: Exception) -> str:
    if isinstance(error, MalformedError):
        return str(error)
    if isinstance(error, EOFError):
        return "is cut short"
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return f"is damaged: {error}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return f"is damaged: {type(error).__name__}: {printable(error)}"


def printable(value: object, limit: int = 120) -> str:
    """Make text from a file safe to print: ASCII, without control characters, short."""
    text = ascii(str(value))[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(text: str) -> str:
    """Make text with a path printable: file names may contain newlines or invalid UTF-8."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()
