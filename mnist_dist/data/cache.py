"""Converted data on disk: one file a data set, mapped into memory by every process that reads it.

An entry is a plain dict of uint8 tensors saved by ``torch.save``. It is complete or absent, never
half there, and it is made once however many jobs ask for it at the same time.
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

from mnist_dist.data.errors import DataError, MalformedError, blaming
from mnist_dist.data.splits import CLASSES, PIXELS, SPLIT_NAMES, Dataset, Split

# Raise it when the content of an entry changes: older entries are then made anew.
FORMAT = 1
REMEDY = "name a writable directory with --cache-dir or MNIST_DIST_CACHE"

# Longer than a download may take.
LOCK_WAIT_S = 600
# A temporary file this old was left by a process that was killed.
_STALE_S = 3600

_KEYS = {"format", "description", "fingerprint"} | {
    f"{name}_{part}" for name in SPLIT_NAMES for part in ("images", "labels")
}


@dataclass(frozen=True)
class Place:
    """A directory that can be written, and what to tell the user about it."""

    directory: Path
    warnings: tuple[str, ...] = ()


def directory(chosen: str | Path | None) -> Path:
    """Where entries live: `chosen`, or the environment's word for it; it need not exist yet.

    Raises:
        DataError: it begins with a ``~`` of nobody.
    """
    if named := chosen or os.environ.get("MNIST_DIST_CACHE"):
        with blaming(f"cache {named}", REMEDY):
            return Path(named).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (shared if shared.is_absolute() else _home() / ".cache") / "mnist-dist"


def read(entry: Path) -> Dataset:
    """Map an entry into memory; its pixels are read only when they are used.

    Raises:
        DataError: there is none, or it is not what `write` wrote.
    """
    with blaming(entry, "remove it and start again: it is made anew"):
        content = torch.load(entry, map_location="cpu", mmap=True, weights_only=True)
        return _dataset(content)


def verify(entry: Path) -> None:
    """Compare an entry's content with the checksums that `torch.save` put in; about 15 ms.

    Raises:
        DataError: there is none, or it was damaged since it was written.
    """
    with blaming(entry, "remove it and start again: it is made anew"):
        with zipfile.ZipFile(entry) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise MalformedError(f"is damaged: {damaged} does not have its checksum")


def write(entry: Path, dataset: Dataset) -> None:
    """Put an entry in place, whole: a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
    }
    for name, split in zip(SPLIT_NAMES, dataset.splits, strict=True):
        content[f"{name}_images"] = split.images.contiguous()
        content[f"{name}_labels"] = split.labels.to(torch.uint8)
    # By way of memory, since torch.save turns a full disk's OSError into a puzzling RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with temporary_file(entry) as file:
        with file.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        file.replace(entry)


@contextmanager
def exclusive(entry: Path) -> Iterator[Place]:
    """Hold the lock of `entry` and yield where to write it; look again whether it is there now.

    Without the lock, jobs that start together would all download and convert. Where the directory
    cannot be written there is nothing to share: the place is then a private one.

    Raises:
        DataError: another process held the lock for `LOCK_WAIT_S`.
    """
    lock = FileLock(entry.with_name(f"{entry.name}.lock"), timeout=LOCK_WAIT_S)
    try:
        yield _locked_place(entry, lock)
    finally:
        lock.release()


def private_place(refused: Path, reason: Exception) -> Place:
    """A directory for this run only, in the stead of `refused`; removed when the process ends.

    Raises:
        DataError: not even a temporary directory can be made.
    """
    fault = getattr(reason, "strerror", None) or str(reason)
    try:
        made = Path(tempfile.mkdtemp(prefix="mnist-dist-"))
    except OSError as error:
        raise DataError(f"cache {refused}: {fault}; nor is there room in TMPDIR", REMEDY) from error
    atexit.register(_remove, made, os.getpid())
    warning = f"cache {refused} cannot be written ({fault}): converting for this run only; {REMEDY}"
    return Place(made, (warning,))


@contextmanager
def temporary_file(entry: Path) -> Iterator[Path]:
    """A name beside `entry` for a file in the making; what is still there at the end is removed."""
    file = entry.with_name(f".{entry.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _locked_place(entry: Path, lock: FileLock) -> Place:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        # A lock file can be writable in a directory that is not.
        with tempfile.TemporaryFile(dir=entry.parent):
            pass
    except Timeout as error:
        raise DataError(
            f"{lock.lock_file}: held by another process for {LOCK_WAIT_S} s",
            "see that it still works on the data, or end it, then start again",
        ) from error
    except (OSError, NotImplementedError) as error:
        return private_place(entry.parent, error)
    _sweep(entry)
    return Place(entry.parent)


def _sweep(entry: Path) -> None:
    for file in entry.parent.glob(f".{entry.name}.*.tmp"):
        with suppress(OSError):
            if file.stat().st_mtime < time.time() - _STALE_S:
                file.unlink()


def _remove(made: Path, maker: int) -> None:
    # A forked child inherits the maker's exit handlers, not its directory.
    if os.getpid() == maker:
        shutil.rmtree(made, ignore_errors=True)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # A container's user may have no home: what follows finds this unwritable, and says so.
        return Path("/")


def _dataset(content: object) -> Dataset:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MalformedError("is no entry of this version")
    if content.keys() != _KEYS:
        raise MalformedError("is an entry with parts missing or added")
    description, fingerprint = content["description"], content["fingerprint"]
    if not isinstance(description, str) or not isinstance(fingerprint, str):
        raise MalformedError("is an entry without description or fingerprint")
    train, validation, test = (_split(content, name) for name in SPLIT_NAMES)
    return Dataset(train, validation, test, description, fingerprint)


def _split(content: dict[str, Any], name: str) -> Split:
    images, labels = content[f"{name}_images"], content[f"{name}_labels"]
    for tensor, shape in ((images, (len(labels), PIXELS)), (labels, (len(labels),))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.shape != shape:
            raise MalformedError(f"is an entry whose {name} split is not bytes of the right shape")
    if len(labels) == 0 or labels.max() >= CLASSES:
        raise MalformedError(f"is an entry whose {name} labels are not 0 to 9")
    return Split(images, labels.to(torch.int64))
