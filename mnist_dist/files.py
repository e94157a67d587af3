"""Open files that another user or program may have replaced by something else."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, through symbolic links; never wait for a FIFO's writer.

    Raises:
        OSError: it cannot be opened, or is a directory, FIFO, socket or device.
    """
    # First by name: opening a device can have effects of its own.
    _require_regular(path.stat().st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")  # noqa: PTH123 - a descriptor, not a path
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, it cannot be read, or it is larger than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:  # before memory is spent on it
            raise OSError(errno.EFBIG, f"File larger than {limit:,} bytes", str(path))
        return file.read(size)


def create_new(path: Path, mode: int = 0o666) -> BinaryIO:
    """Create a file for writing; never follow a link or write into a file that is there.

    Args:
        path: of the new file, in a directory that exists.
        mode: permissions, before the umask.

    Raises:
        OSError: it cannot be created; FileExistsError if the name is taken, even by a broken link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, mode), "wb")  # noqa: PTH123 - a descriptor, not a path


def _require_regular(mode: int, path: Path) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        text = f"Not a regular file but {_KINDS.get(kind, 'something else')}"
        raise OSError(errno.EINVAL, text, str(path))
