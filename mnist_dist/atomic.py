"""Files that are replaced whole or not at all, and directories that survive power loss."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from mnist_dist.files import create_new

TEMPORARY_SUFFIX = ".partial"
# Errors of file systems that cannot flush a directory: CIFS, VirtualBox, sshfs and other FUSE.
_CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_atomically(
    path: Path, content: bytes, check: Callable[[Path], None] = lambda written: None
) -> None:
    """Replace `path` by `content`, or leave it unchanged; survives power loss once it returns.

    The temporary file is in the same directory, since a rename is atomic only within one file
    system, and the directory is flushed too, since the rename itself lives there. Its name is new:
    whatever has the name of an earlier one is neither followed nor written into.

    Args:
        path: where to; its directory exists.
        content: all of the new file.
        check: validates the written file before it takes its name; its exceptions propagate, and
            nothing is left behind.

    Raises:
        OSError: the disk is full or the directory cannot be written; nothing is left behind. It
            names `path`.
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
            raise OSError(error.errno, error.strerror, str(path)) from error
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
