"""Read, create and replace files safely: whatever others put in their place, or a power loss."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".partial"
# Errors of file systems that cannot flush a directory: CIFS, VirtualBox, sshfs and other FUSE.
_CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
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


def read_json_object(path: Path, limit: int = 1 << 28) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes; an empty one if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path, limit))
        return content if isinstance(content, dict) else {}
    return {}


def create_new(path: Path, mode: int = 0o666) -> BinaryIO:
    """Create a file for writing; never follow a link or write into a file that is there.

    Raises:
        OSError: it cannot be created; FileExistsError if the name is taken, even by a broken link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, mode), "wb")  # noqa: PTH123 - a descriptor, not a path


def write_atomically(
    path: Path, content: bytes, check: Callable[[Path], None] = lambda written: None
) -> None:
    """Replace `path` by `content`, or leave it unchanged; survives power loss once it returns.

    The temporary file is in the same directory, since a rename is atomic only within one file
    system, and the directory is flushed too, since the rename itself lives there. Its name is new:
    whatever has the name of an earlier one is neither followed nor written into.

    `check` validates the written file before it takes its name, and may raise to leave `path`
    unchanged. Whatever is raised, no temporary file is left behind.

    Raises:
        OSError: the disk is full or the directory cannot be written; names `path`.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with create_new(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Create the directory `path`, and parents as needed, so that they survive power loss."""
    missing = [path, *(parent for parent in path.parents if not parent.exists())]
    path.mkdir(parents=True, exist_ok=True)
    # Those of `path` even if it existed: a killed process may have created it just before.
    for directory in missing:
        sync_directory(directory.parent)


def sweep_temporary(directory: Path) -> None:
    """Delete the temporary files of `write_atomically` that killed processes left."""
    for stray in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            stray.unlink()


def sync_directory(path: Path) -> bool:
    """Make the names in the directory `path` survive power loss: created, renamed or deleted.

    Returns:
        Whether its file system can do that at all.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return False
    finally:
        os.close(descriptor)
    return True


def overwrite(path: Path, content: bytes) -> None:
    """Write `content` over a file in the disk space that it has already, for a disk that is full.

    Not atomic: a kill in between leaves a mixture.

    Raises:
        OSError: there is no such file, it has not that much space, or it cannot be written.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(errno.EINVAL, "Not a file of its own", str(path))
        if len(content) > max(status.st_size, status.st_blocks * 512):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_regular(mode: int, path: Path) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        text = f"Not a regular file but {_KINDS.get(kind, 'something else')}"
        raise OSError(errno.EINVAL, text, str(path))
