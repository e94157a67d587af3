"""What a bad file, address or cache ends in: one line that names it, its fault and the remedy."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_dist.errors import UserError

MEND_THE_FILE = "copy or download it again, or pass another file with --data"


class DataError(UserError):
    """The data cannot be used.

    ``problem`` names the file and what is wrong with it, ``remedy`` says what to do about it; the
    ``str`` is both on one line. Picklable, so that one rank can hand it to the others.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = one_line(problem)
        self.remedy = one_line(remedy)

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class MalformedError(ValueError):
    """What is wrong with a file's content, said without its name: `blaming` adds that."""


@contextmanager
def blaming(culprit: Path | str, remedy: str = MEND_THE_FILE) -> Iterator[None]:
    """Turn whatever reading `culprit` raises into one `DataError` that names it.

    Every ``Exception`` is meant: parsers fed hostile bytes raise far more kinds than they document
    (the pickle module alone a dozen), and none of them may reach the user as a traceback.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{culprit}: {_fault(error)}", remedy) from error


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
    """Text that came out of a file, made safe to print: ASCII, no control characters, short."""
    text = ascii(str(value))[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(text: str) -> str:
    """Text with a path in it, made printable: a file name may hold a newline, or be no UTF-8."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()
