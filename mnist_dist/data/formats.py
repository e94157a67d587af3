"""Format detection by a file's first bytes; its name decides only where they do not."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mnist_dist.data import idx, npz, pickles
from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.splits import Dataset, Splits, assemble
from mnist_dist.data.streams import open_unpacked

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_SUFFIXES = (".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """A data set named by the user: the path, the files behind it, and how to read them."""

    path: Path
    files: tuple[Path, ...]
    reader: Callable[[], Splits]

    def read(self) -> Dataset:
        """Read and check all files. Raises `DataError`, which names the file at fault."""
        with naming_file(self.path):
            return assemble(self.reader(), str(self.path.resolve()))

    def cache_entry(self) -> str:
        """Return a file name that depends on the path, size and time of change of every file.

        Raises:
            DataError: a file no longer exists.
        """
        key = hashlib.sha256()
        with naming_file(self.path):
            for file in self.files:
                stat = file.stat()
                key.update(os.fsencode(file.resolve()))
                key.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", self.path.resolve().name)[:40]
        return f"{readable}-{key.hexdigest()[:24]}.pt"


def detect_format(path: Path) -> Source:
    """Determine the format of `path`, a file or a directory; a leading ``~`` is expanded.

    Raises:
        DataError: it does not exist, cannot be read, or has no known format.
    """
    with naming_file(path):
        path = path.expanduser()
        if path.is_dir():
            files = idx.find(path)
            return Source(path, files, partial(idx.read, files))
        if path.is_file():
            return Source(path, (path,), partial(_reader_of(path), path))
        if path.exists():
            raise MalformedError("is neither a file nor a directory")
    raise DataError(
        f"{path}: no such file or directory", "give --data auto, bundled or a path that exists"
    )


def _reader_of(file: Path) -> Callable[[Path], Splits]:
    with open_unpacked(file) as stream:
        head = stream.read(4)
    if not head:
        raise MalformedError("is empty")
    if head == _ZIP_MAGIC:
        return npz.read
    if head in (idx.IMAGE_MAGIC, idx.LABEL_MAGIC):
        raise DataError(f"{file}: is one IDX file of four", "pass the directory that contains them")
    suffixes = file.name.lower().removesuffix(".gz")
    if head[:1] == b"\x80" or suffixes.endswith(_PICKLE_SUFFIXES):
        return pickles.read
    raise DataError(
        f"{file}: has an unknown format",
        "pass a mnist.pkl.gz, a directory of IDX files or a Keras-style mnist.npz",
    )
