"""Which format is it? Decided by what a file holds; its name only helps where bytes cannot tell."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mnist_dist.data import idx, npz, pickles
from mnist_dist.data.errors import DataError, MalformedError, blaming
from mnist_dist.data.splits import Dataset, Splits, assemble
from mnist_dist.data.streams import open_unpacked

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_SUFFIXES = (".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """A data set as the user gave it: the path, every file behind it, and how to read them."""

    path: Path
    files: tuple[Path, ...]
    reader: Callable[[], Splits]

    def read(self) -> Dataset:
        """Read and check everything. Raises `DataError` naming the file that is to blame."""
        with blaming(self.path):
            return assemble(self.reader(), str(self.path.resolve()))

    def cache_entry(self) -> str:
        """A file name that is another when any file behind it is (by path, size or change time).

        Raises:
            DataError: a file has gone.
        """
        key = hashlib.sha256()
        with blaming(self.path):
            for file in self.files:
                stat = file.stat()
                key.update(os.fsencode(file.resolve()))
                key.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", self.path.resolve().name)[:40]
        return f"{readable}-{key.hexdigest()[:24]}.pt"


def recognise(path: Path) -> Source:
    """Find out how to read `path`, a file or a directory, from its first bytes or its files.

    A leading ``~`` is the user's home.

    Raises:
        DataError: it is not there, cannot be read, or is nothing that can be read.
    """
    with blaming(path):
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
        raise DataError(f"{file}: is one IDX file of four", "pass the directory that holds them")
    suffixes = file.name.lower().removesuffix(".gz")
    if head[:1] == b"\x80" or suffixes.endswith(_PICKLE_SUFFIXES):
        return pickles.read
    raise DataError(
        f"{file}: is in no format known here",
        "pass a mnist.pkl.gz, a directory of IDX files or a Keras-style mnist.npz",
    )
