"""A file that one process at a time holds; the kernel frees it when that process dies."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from mnist_dist.files import read_regular

_POLL_S = 0.05
# A process that was just killed may take a moment to exit; only a longer wait is worth a line.
_SILENT_S = 2.0
_LARGEST_RECORD = 1024  # bytes
_BUSY = {errno.EACCES, errno.EAGAIN}
# NFS without lockd, Lustre without -o flock, many FUSE file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LockLostError(OSError):
    """The file that this process locked is no longer the one at its path."""


class LockHeldError(Exception):
    """Another process holds the lock; the text names it, if known."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, by its own account in the file."""

    host: str
    pid: int
    start_time: int
    """In clock ticks since its host was booted: a later process may get the same pid."""
    since: str

    @staticmethod
    def this_process() -> "Holder":
        """Describe this process, as a holder from now on."""
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        return Holder(socket.gethostname(), pid, process_start_time(pid) or 0, since)

    def __str__(self) -> str:
        """Name it in words for an error message."""
        return f"process {self.pid} on {self.host}, since {self.since}"


class FileLock:
    """An exclusive lock on a file, until it is released or dropped; the file stays.

    Where the file system has no locks, the holder's record in the file takes their place as far as
    it can: it finds another process of this host, and a holder finds out that it was replaced.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is touched before `acquire`."""
        self.path = path
        self.missing: str | None = None
        """Once acquired: why the file system cannot lock, None if it did."""
        self._holder = Holder.this_process()
        self._descriptor: int | None = None

    def acquire(self, wait: float, notify: Callable[[str], None]) -> None:
        """Create the file if need be, and lock it.

        Args:
            wait: seconds to wait for another holder.
            notify: called with a line if the wait is long enough to be noticed.

        Raises:
            LockHeldError: another process still holds it.
            OSError: it cannot be opened or is not a regular file.
        """
        start, notified = time.monotonic(), False
        while not self._try():
            waited, name = time.monotonic() - start, _read_holder(self.path) or "another process"
            if waited > wait:
                raise LockHeldError(str(name))
            if waited > min(_SILENT_S, wait) and not notified:
                notify(f"{self.path.parent}: waiting up to {wait:.0f} s for {name}")
                notified = True
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Check that the file at the path is still the one that was locked, if it was.

        Raises:
            LockLostError: it is not; the text gives the reason.
        """
        if self._descriptor is None:
            return
        try:
            found = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except OSError:  # such as a server that does not respond: proves nothing
            return
        if found is not None and os.path.samestat(found, os.fstat(self._descriptor)):
            holder = None if self.missing is None else _read_holder(self.path)
            if holder is None or holder == self._holder:
                return
            fault = f"{holder} took it over"
        elif found is not None:
            fault = f"{self.path} was replaced"
        else:
            fault = self._whereabouts()
        raise LockLostError(errno.ESTALE, fault, str(self.path))

    def release(self) -> None:
        """Let other processes lock the file."""
        if self._descriptor is not None:
            self._close()
            self._descriptor = None

    def _try(self) -> bool:
        """Open and lock the file; return whether this process holds it."""
        with contextlib.suppress(FileNotFoundError):
            self._require_regular(self.path.lstat())
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o600)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            status = os.fstat(descriptor)
            self._require_regular(status)
            is_held = self._flock(descriptor) and self._is_current(status)
        except BaseException:
            self._close()
            raise
        if not is_held:
            self._close()
            return False
        self._descriptor = descriptor
        self._holder = Holder.this_process()
        # Best effort: the lock is held, even if the disk is full or has no permissions.
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o600)  # whoever can read a file can lock it
            if status.st_nlink == 1:  # else it would be written into another file
                record = json.dumps(asdict(self._holder)).encode()
                os.pwrite(descriptor, record, 0)
                os.ftruncate(descriptor, len(record))
        return True

    def _require_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(self.path))

    def _flock(self, descriptor: int) -> bool:
        self.missing = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self.missing = error.strerror
            return not _is_running(_read_holder(self.path))
        return True

    def _is_current(self, opened: os.stat_result) -> bool:
        """Return whether the file was not replaced between opening and locking it."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(self.path.lstat(), opened)
        return False

    def _whereabouts(self) -> str:
        """Describe why a file is no longer at its path."""
        now = Path(f"/proc/self/fd/{self._descriptor}")
        with contextlib.suppress(OSError):
            path = now.readlink()
            if os.path.lexists(path):
                return f"it was moved to {path.parent}"
        return f"{self.path} was deleted" if self.path.parent.exists() else "it was deleted"


def is_held(path: Path) -> bool | None:
    """Return whether a process holds the lock file `path`; None if that cannot be known here."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return True
        holder = _read_holder(path)
        return _is_running(holder) if holder and holder.host == socket.gethostname() else None
    finally:
        os.close(descriptor)
    return False


def _read_holder(path: Path) -> Holder | None:
    """Return the holder named in the file (untrusted content); None if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):
        found = Holder(**json.loads(read_regular(path, _LARGEST_RECORD)))
        texts, numbers = (found.host, found.since), (found.pid, found.start_time)
        if all(isinstance(text, str) and text.isprintable() for text in texts) and all(
            isinstance(number, int) for number in numbers
        ):
            return found
    return None


def _is_running(holder: Holder | None) -> bool:
    """Return whether the holder is another process of this host that still runs."""
    if holder is None or holder.host != socket.gethostname() or holder.pid == os.getpid():
        return False
    return process_start_time(holder.pid) == holder.start_time


def process_start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The second field, the program's name, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None
