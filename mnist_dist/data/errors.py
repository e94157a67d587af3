"""Errors of a file, address or cache: one line with its name, the problem and the remedy."""

import errno
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_dist.errors import UserError, printable

# Of what a file may make us print.
_MOST_CHARACTERS = 400
FILE_REMEDY = "copy or download it again, or pass another file with --data"
_OTHER_PATH = "pass another path with --data"
_ERRNO_REMEDIES = {
    errno.EACCES: f"give this user read permission, or {_OTHER_PATH}",
    errno.EPERM: f"give this user read permission, or {_OTHER_PATH}",
    errno.EIO: f"check its disk or network mount, or {_OTHER_PATH}",
    errno.ESTALE: f"check its network mount, or {_OTHER_PATH}",
}


class DataError(UserError):
    """The data cannot be used.

    ``problem`` is the file's name and what is wrong with it, ``remedy`` what to do; the ``str`` is
    both on one line. Picklable, so that ranks can send it to each other.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = printable(problem)
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class MalformedError(ValueError):
    """What is wrong with the content of a file, without its name, which `naming_file` adds."""

    def __init__(self, problem: str, remedy: str = FILE_REMEDY) -> None:
        super().__init__(problem)
        self.remedy = remedy


@contextmanager
def naming_file(file: Path | str, remedy: str | None = None) -> Iterator[None]:
    """Convert any exception in the block into a `DataError` that names `file`.

    Parsers of untrusted bytes raise many more exceptions than they document (the pickle module a
    dozen), and none of them may reach the user as a traceback.

    Args:
        file: its name in the error.
        remedy: None: what helps against the exception.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        fault = printable(_fault(error), _MOST_CHARACTERS)
        raise DataError(f"{file}: {fault}", remedy or _remedy(error)) from error


def _fault(error: Exception) -> str:
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return f"is damaged: {error}"
    if isinstance(error, MalformedError) or (isinstance(error, OSError) and error.errno is None):
        return str(error)
    if isinstance(error, EOFError):
        return "is cut short"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return f"is damaged: {type(error).__name__}: {error}"


def _remedy(error: Exception) -> str:
    if isinstance(error, MalformedError):
        return error.remedy
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO_REMEDIES.get(error.errno, _OTHER_PATH)
    return FILE_REMEDY
