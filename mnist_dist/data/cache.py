"""Converted data on disk: one file per data set, memory-mapped by every process that reads it.

An entry is a plain dict of uint8 tensors saved by ``torch.save``. It is complete or absent, and it
is created once, however many jobs need it at the same time.
"""

import atexit
import io
import os
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.splits import SPLIT_NAMES, Dataset, Split
from mnist_dist.dimensions import IMAGE_PIXELS, NUM_CLASSES

# Increase it when the content of an entry changes: older entries are then rebuilt.
FORMAT = 1
REMEDY = "name a writable directory with --cache-dir or MNIST_DIST_CACHE"

# Longer than the limit of a download.
LOCK_WAIT_S = 600
# A temporary file of this age belongs to a process that was killed.
_STALE_S = 3600

_KEYS = {"format", "description", "fingerprint"} | {
    f"{name}_{part}" for name in SPLIT_NAMES for part in ("images", "labels")
}


@dataclass(frozen=True)
class CacheDir:
    """A writable directory for entries, and warnings about it for the user."""

    directory: Path
    warnings: tuple[str, ...] = ()


def directory(chosen: str | Path | None) -> Path:
    """Return the cache directory: `chosen`, or the environment's; it need not exist.

    Raises:
        DataError: it starts with the ``~`` of an unknown user.
    """
    if named := chosen or os.environ.get("MNIST_DIST_CACHE"):
        with naming_file(f"cache {named}", REMEDY):
            return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (shared if shared.is_absolute() else _home() / ".cache") / "mnist-dist"


def read(entry: Path) -> Dataset:
    """Memory-map an entry; its pixels are read when they are used.

    Raises:
        DataError: it does not exist, or was not written by `write`.
    """
    with naming_file(entry, "remove it and start again: it is rebuilt"):
        content = torch.load(entry, map_location="cpu", mmap=True, weights_only=True)
        return _dataset(content)


def verify(entry: Path) -> None:
    """Compare an entry's content with the checksums that `torch.save` wrote; takes about 15 ms.

    Raises:
        DataError: it does not exist, or is damaged.
    """
    with naming_file(entry, "remove it and start again: it is rebuilt"):
        with zipfile.ZipFile(entry) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise MalformedError(f"is damaged: {damaged} does not have its checksum")


def write(entry: Path, dataset: Dataset) -> None:
    """Write an entry atomically: readers see the old one or the new one.

    Raises:
        OSError: it cannot be written; no partial file remains.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
    }
    for name, split in zip(SPLIT_NAMES, dataset.splits, strict=True):
        content[f"{name}_images"] = split.images.contiguous()
        content[f"{name}_labels"] = split.labels.to(torch.uint8)
    # Serialized in memory: torch.save turns the OSError of a full disk into a RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with temporary_file(entry) as file:
        with file.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        file.replace(entry)


@contextmanager
def exclusive(entry: Path) -> Iterator[CacheDir]:
    """Lock `entry` and yield the directory to write it to.

    Another job may have written the entry while this one waited: check again. Without the lock,
    jobs that start together would all download and convert. If the cache directory cannot be
    written, a private one is yielded.

    Raises:
        DataError: another process held the lock for `LOCK_WAIT_S`.
    """
    lock = FileLock(entry.with_name(f"{entry.name}.lock"), timeout=LOCK_WAIT_S)
    try:
        yield _locked_dir(entry, lock)
    finally:
        lock.release()


def private_dir(refused: Path, reason: Exception) -> CacheDir:
    """Create a directory for this run only, in place of `refused`; removed at exit.

    Raises:
        DataError: no temporary directory can be created either.
    """
    fault = getattr(reason, "strerror", None) or str(reason)
    try:
        made = Path(tempfile.mkdtemp(prefix="mnist-dist-"))
    except OSError as error:
        raise DataError(
            f"cache {refused}: {fault}; and no temporary directory can be created in TMPDIR", REMEDY
        ) from error
    atexit.register(_remove, made, os.getpid())
    warning = f"cache {refused} cannot be written ({fault}): converting for this run only; {REMEDY}"
    return CacheDir(made, (warning,))


@contextmanager
def temporary_file(entry: Path) -> Iterator[Path]:
    """Yield a temporary name next to `entry`; a file that still has it afterwards is removed."""
    file = entry.with_name(f".{entry.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _locked_dir(entry: Path, lock: FileLock) -> CacheDir:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        # The lock file can be writable although the directory is not.
        with tempfile.TemporaryFile(dir=entry.parent):
            pass
    except Timeout as error:
        raise DataError(
            f"{lock.lock_file}: held by another process for {LOCK_WAIT_S} s",
            "check that it is still preparing the data, or stop it, then start again",
        ) from error
    except (OSError, NotImplementedError) as error:
        return private_dir(entry.parent, error)
    _sweep(entry)
    return CacheDir(entry.parent)


def _sweep(entry: Path) -> None:
    for file in entry.parent.glob(f".{entry.name}.*.tmp"):
        with suppress(OSError):
            if file.stat().st_mtime < time.time() - _STALE_S:
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


def _dataset(content: object) -> Dataset:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MalformedError("is not a cache entry of this version")
    if content.keys() != _KEYS:
        raise MalformedError("is a cache entry with missing or additional parts")
    description, fingerprint = content["description"], content["fingerprint"]
    if not isinstance(description, str) or not isinstance(fingerprint, str):
        raise MalformedError("is a cache entry without description or fingerprint")
    train, validation, test = (_split(content, name) for name in SPLIT_NAMES)
    return Dataset(train, validation, test, description, fingerprint)


def _split(content: dict[str, Any], name: str) -> Split:
    images, labels = content[f"{name}_images"], content[f"{name}_labels"]
    for tensor, shape in ((images, (len(labels), IMAGE_PIXELS)), (labels, (len(labels),))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.shape != shape:
            raise MalformedError(f"is a cache entry with a {name} split of the wrong shape or type")
    if len(labels) == 0 or labels.max() >= NUM_CLASSES:
        raise MalformedError(f"is a cache entry with {name} labels outside 0 to 9")
    return Split(images, labels.to(torch.int64))
