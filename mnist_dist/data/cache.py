"""Converted data on disk: one file per data set, shared by the processes of a node.

An entry is a plain dict of uint8 tensors saved by ``torch.save``. It is complete or absent, and it
is created once, however many jobs need it at the same time. It is used only if no user other
than this one and root can have written it, and if its content matches its fingerprint.
"""

import atexit
import fcntl
import io
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.splits import SPLIT_NAMES, Dataset, Split, fingerprint
from mnist_dist.dimensions import IMAGE_PIXELS, NUM_CLASSES
from mnist_dist.errors import printable
from mnist_dist.files import create_new, open_regular
from mnist_dist.lock import FileLock, LockHeldError

# Increase it when the content of an entry changes: older entries are then rebuilt.
FORMAT = 2
_REBUILD = "remove it and start again: it is rebuilt"
REMEDY = "set --cache-dir or MNIST_DIST_CACHE to a writable directory of your own"

# Longer than the limit of a download.
LOCK_WAIT_S = 600
# A temporary file of this age belongs to a process that was killed.
_STALE_S = 3600
# Larger than the entry of any data set that can be read.
_MAX_BYTES = 2 << 30
_CHUNK = 1 << 20
# Linux only; 0 elsewhere, where nothing is sealed.
_SEALS = sum(getattr(fcntl, f"F_SEAL_{name}", 0) for name in ("SHRINK", "GROW", "WRITE", "SEAL"))

_KEYS = {"format", "entry", "description", "fingerprint"} | {
    f"{name}_{part}" for name in SPLIT_NAMES for part in ("images", "labels")
}
# By fingerprint. They stay open while this process lives, since others of its node open them.
_in_memory: dict[str, Path] = {}


@dataclass(frozen=True)
class CacheDir:
    """A writable directory for entries, and warnings about it for the user."""

    directory: Path
    warnings: tuple[str, ...] = ()


class UntrustedError(PermissionError):
    """Another user can have written the file."""


def directory(chosen: str | Path | None) -> Path:
    """Return the cache directory: `chosen`, or the environment's; it need not exist.

    Raises:
        DataError: it starts with the ``~`` of an unknown user.
    """
    if named := chosen or os.environ.get("MNIST_DIST_CACHE"):
        with naming_file(f"cache {named}", REMEDY):
            return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification requires relative paths to be ignored.
    return (shared if shared.is_absolute() else _home() / ".cache") / "mnist-dist"


def read(entry: Path) -> Dataset:
    """Memory-map an entry, or the copy that `hold` made; its pixels are read when they are used.

    Raises:
        DataError: it does not exist, was not written by `write`, or may be another user's.
    """
    with naming_file(entry, _REBUILD), _open(entry) as file:
        return _parse(file)


def hold(entry: Path) -> tuple[Dataset, Path]:
    """Copy an entry into memory that cannot change, and verify it there; takes about 0.1 s.

    A process that reads from a mapped file that was cut dies of SIGBUS. The copy cannot be cut, and
    what was verified is what every process gets.

    Returns:
        The data set; and the path by which this user's processes on this node can `read` the copy,
        or that of the entry if the system has no such memory.

    Raises:
        DataError: it does not exist, is damaged, is of other data, or may be another user's.
    """
    with naming_file(entry, _REBUILD), _open(entry) as file:
        try:
            copy = _copy_to_memory(file)
        except OSError:
            return _verified(_parse(file, entry.name)), entry
        with copy:
            dataset = _verified(_parse(copy, entry.name))
            if dataset.fingerprint not in _in_memory:
                descriptor = os.dup(copy.fileno())
                _in_memory[dataset.fingerprint] = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        return dataset, _in_memory[dataset.fingerprint]


def write(entry: Path, dataset: Dataset) -> None:
    """Write an entry atomically: readers see the old one or the new one.

    Raises:
        OSError: it cannot be written; no partial file remains.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "entry": entry.name,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
    }
    for name, split in zip(SPLIT_NAMES, dataset.splits, strict=True):
        content[f"{name}_images"] = split.images.contiguous()
        content[f"{name}_labels"] = split.labels.to(torch.uint8)
    # Serialized in memory: torch.save turns the OSError of a full disk into a RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with create_new(temporary, 0o644) as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(entry)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(entry: Path) -> Iterator[CacheDir]:
    """Lock `entry` and yield the directory to write it to.

    Another job may have written the entry while this one waited: check again. Without the lock,
    jobs that start together would all download and convert. If the cache directory cannot be
    written, a private one is yielded.

    Raises:
        DataError: another process held the lock for `LOCK_WAIT_S`.
    """
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    with ExitStack() as held:
        held.callback(lock.release)
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                _check_owner(lock.path.lstat())  # another user could hold it for ever
            lock.acquire(LOCK_WAIT_S, lambda notice: None)
            # The lock file can be writable although the directory is not.
            with tempfile.TemporaryFile(dir=entry.parent):
                pass
        except LockHeldError as error:
            raise DataError(
                f"{lock.path}: held by another process for {LOCK_WAIT_S} s ({error})",
                "check that it is still preparing the data, or stop it, then start again",
            ) from error
        except OSError as error:
            target = private_dir(entry.parent, error)
        else:
            _sweep(entry)
            target = CacheDir(entry.parent)
        yield target


def private_dir(refused: Path, reason: Exception) -> CacheDir:
    """Create a directory for this run only, in place of `refused`; removed at exit.

    Raises:
        DataError: no temporary directory can be created either.
    """
    fault = getattr(reason, "strerror", None) or getattr(reason, "problem", None) or str(reason)
    try:
        made = Path(tempfile.mkdtemp(prefix="mnist-dist-"))
    except OSError as error:
        raise DataError(
            f"cache {refused}: {fault}; and no temporary directory can be created in TMPDIR", REMEDY
        ) from error
    atexit.register(_remove, made, os.getpid())
    warning = f"cache {refused} cannot be used ({fault}): converting for this run only; {REMEDY}"
    return CacheDir(made, (printable(warning),))


def _open(entry: Path) -> BinaryIO:
    """Open an entry that no other user but root can have written, or a sealed copy of one."""
    file = open_regular(entry)
    try:
        found = os.fstat(file.fileno())
        _check_owner(found)
        if found.st_mode & 0o022 and not _is_sealed(file):
            raise UntrustedError("can be written by other users")
        if found.st_size > _MAX_BYTES:
            raise MalformedError(f"has more than {_MAX_BYTES:,} bytes")
    except BaseException:
        file.close()
        raise
    return file


def _check_owner(status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise UntrustedError(f"belongs to another user (uid {status.st_uid})")


def _is_sealed(file: BinaryIO) -> bool:
    with suppress(AttributeError, OSError):
        return fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    return False


def _copy_to_memory(file: BinaryIO) -> BinaryIO:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd")
    copy = os.memfd_create("mnist-dist-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    sealed = open(copy, "w+b")  # noqa: PTH123, SIM115 - a descriptor
    try:
        shutil.copyfileobj(file, sealed, _CHUNK)
        sealed.flush()
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        sealed.close()
        raise
    return sealed


def _sweep(entry: Path) -> None:
    for file in entry.parent.glob(f".{entry.name}.*.tmp"):
        with suppress(OSError):
            if file.lstat().st_mtime < time.time() - _STALE_S:
                file.unlink()


def _remove(made: Path, creator: int) -> None:
    # A forked child inherits the exit handlers, but must not remove its parent's directory.
    if os.getpid() == creator:
        shutil.rmtree(made, ignore_errors=True)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # A container's user may have no home: / is then reported as not writable.
        return Path("/")


def _parse(file: BinaryIO, name: str | None = None) -> Dataset:
    """Map an open entry; `name` is the one it must have been written under, None: any."""
    # By its descriptor: another file may have the name by now.
    path = f"/proc/self/fd/{file.fileno()}"
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:  # not on Linux: read it, which takes memory in every process
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MalformedError("is not a cache entry of this version")
    if content.keys() != _KEYS:
        raise MalformedError("is a cache entry with missing or extra parts")
    if name is not None and content["entry"] != name:
        raise MalformedError("is the cache entry for other data")
    description, digest = content["description"], content["fingerprint"]
    if not isinstance(description, str) or not isinstance(digest, str):
        raise MalformedError("is a cache entry without description or fingerprint")
    train, validation, test = (_split(content, name) for name in SPLIT_NAMES)
    return Dataset(train, validation, test, printable(description), digest)


def _split(content: dict[str, Any], name: str) -> Split:
    images, labels = content[f"{name}_images"], content[f"{name}_labels"]
    for tensor, shape in ((images, (len(labels), IMAGE_PIXELS)), (labels, (len(labels),))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.shape != shape:
            raise MalformedError(f"is a cache entry with a {name} split of the wrong shape or type")
    if len(labels) == 0 or labels.max() >= NUM_CLASSES:
        raise MalformedError(f"is a cache entry with {name} labels outside 0 to 9")
    return Split(images, labels.to(torch.int64))


def _verified(dataset: Dataset) -> Dataset:
    if fingerprint(dataset.splits) != dataset.fingerprint:
        raise MalformedError("is damaged: its content does not match its fingerprint")
    return dataset
