"""Format detection by a file's first bytes; its name decides only where they do not."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mnist_dist.data import file_sets, idx, pickles
from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.signatures import HEAD, identify, unknown
from mnist_dist.data.splits import Dataset, Splits, assemble
from mnist_dist.data.streams import LIMIT, unpacked
from mnist_dist.files import read_regular

_PICKLE_SUFFIXES = (".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """A data set named by the user: the path, the content of its files, and how to parse it."""

    path: Path
    contents: tuple[bytes, ...]
    layout: str
    """What decides how `contents` are parsed, besides themselves."""
    parse: Callable[[], Splits]

    def read(self) -> Dataset:
        """Parse and check all files. Raises `DataError`, which names the file at fault."""
        with naming_file(self.path):
            return assemble(self.parse(), self.name)

    @property
    def name(self) -> str:
        """The path, absolute."""
        return str(self.path.resolve())

    def cache_entry(self) -> str:
        """Return a file name that depends on the content of every file, and on nothing else.

        Size and time of change do not: tar, rsync and image layers restore them.
        """
        key = hashlib.sha256(self.layout.encode())
        for content in self.contents:
            key.update(hashlib.sha256(content).digest())
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", self.path.resolve().name)[:40]
        return f"{readable}-{key.hexdigest()[:32]}.pt"


def detect_format(path: Path) -> Source:
    """Read `path`, a file or a directory, and determine its format; a leading ``~`` is expanded.

    Raises:
        DataError: it does not exist, cannot be read, or has no known format.
    """
    with naming_file(path):
        path = path.expanduser()
        if path.is_dir():
            return _of_files(path, file_sets.find_in_directory(path))
        try:
            content = read_regular(path, LIMIT)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: no such file or directory",
                "use --data auto, --data bundled or an existing path",
            ) from error
        return _of_file(path, content)


def parse_pickle(content: bytes) -> Splits:
    """Parse what must be a ``mnist.pkl.gz``.

    Raises:
        MalformedError: it is something else, named by its first bytes.
        Exception: any other error for a damaged file.
    """
    with unpacked(content) as stream:
        if error := identify(stream.read(HEAD)):
            raise error
    return pickles.read(content)


def _of_files(path: Path, files: file_sets.FileSet) -> Source:
    layout = "transposed files" if files.is_transposed else "files"
    return Source(path, files.contents, layout, files.parse)


def _of_file(path: Path, content: bytes) -> Source:
    if file_sets.is_train_images(path.name):
        return _of_files(path, file_sets.find_beside(path))
    if content.startswith(file_sets.ZIP_MAGIC):
        return Source(path, (content,), "zip", partial(file_sets.read_zip, content, path))
    with unpacked(content) as stream:
        head = stream.read(HEAD)
    if not head:
        raise MalformedError("is empty")
    if idx.is_idx(head):
        raise DataError(
            f"{path}: is one IDX file of four",
            "pass the directory that contains them, or the file of the training images",
        )
    suffixes = path.name.lower().removesuffix(".gz")
    if head[:1] != b"\x80" and (identify(head) or not suffixes.endswith(_PICKLE_SUFFIXES)):
        raise unknown(head)
    return Source(path, (content,), "pickle", partial(pickles.read, content))
