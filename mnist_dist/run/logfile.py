"""An append-only file on a disk that may be temporarily full."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from mnist_dist.files import write_atomically


class LogFile:
    """Append records to a file, each whole or not at all; none is lost before it is on disk.

    What the disk did not take stays in memory, and is written first the next time. One thread may
    call `write` while another one is waiting in `sync`.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        """Open `path` to append to it; with `exclusive`, create it.

        Raises:
            OSError: it cannot be opened; with `exclusive`, it is there already.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_EXCL if exclusive else 0
        self._descriptor = os.open(path, flags, 0o666)
        self._path = path
        self._synced = os.fstat(self._descriptor).st_size
        # Bytes of the file after the first `_synced`, of which `_written` have reached the system.
        self._tail = bytearray()
        self._written = 0
        self._lock = threading.Lock()

    def write(self, records: bytes = b"") -> None:
        """Append `records`, and what could not be written before, so that a kill loses neither.

        Raises:
            OSError: the disk is full or failed; it will be tried again.
        """
        with self._lock, self._naming_file():
            self._tail += records
            offset = self._written
            try:
                while offset < len(self._tail):
                    offset += os.pwrite(
                        self._descriptor, self._tail[offset:], self._synced + offset
                    )
            except OSError:
                with contextlib.suppress(OSError):  # readers stop at half a record
                    os.ftruncate(self._descriptor, self._synced + self._written)
                raise
            self._written = offset

    def sync(self) -> None:
        """Return once everything survives power loss, also if the file was deleted before.

        Raises:
            OSError: the disk is full or failed; it will be tried again.
        """
        self._restore()
        self.write()
        covered = self._written
        try:
            with self._naming_file():
                os.fsync(self._descriptor)
        except OSError:
            with self._lock:
                self._written = 0  # the system may have dropped what it could not write back
            raise
        with self._lock:
            del self._tail[:covered]
            self._synced += covered
            self._written -= covered

    def _restore(self) -> None:
        """Write the file again if it was deleted or replaced: the one that is open has it all."""
        with self._lock, self._naming_file():
            opened = os.fstat(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self._path.lstat(), opened):
                    return
            write_atomically(self._path, os.pread(self._descriptor, opened.st_size, 0))
            restored = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.dup2(restored, self._descriptor, inheritable=False)
            os.close(restored)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise
