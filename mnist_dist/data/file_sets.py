"""Data sets of four files, images and labels for training and testing, in a directory or a zip.

The files are identified by their names: ``train-images-idx3-ubyte`` and so on (MNIST,
Fashion-MNIST), with a prefix and ``test`` in place of ``t10k`` (EMNIST, QMNIST), or
``kmnist-train-imgs.npz`` (KMNIST).
"""

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from mnist_dist.data import idx, npz
from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.signatures import SAVE_AS_NPZ
from mnist_dist.data.splits import Splits, hold_out_validation
from mnist_dist.data.streams import LIMIT, BoundedStream
from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.files import read_regular

ZIP_MAGIC = b"PK\x03\x04"

_NAME = re.compile(
    r"(?P<prefix>([a-z0-9]+-)*?)(?P<part>train|t10k|test)-(?P<kind>images|imgs|labels)"
    r"([-.]idx\d[-.](ubyte|int)(\.gz)?|\.npz)"
)
_ROLES = (("train", "images"), ("train", "labels"), ("test", "images"), ("test", "labels"))
# The sets of EMNIST with more than ten classes.
_LETTERS = tuple(f"emnist-{name}-" for name in ("balanced", "byclass", "bymerge", "letters"))

Role = tuple[str, str]
# How to read each file, by its path.
Files = dict[str, Callable[[], bytes]]


@dataclass(frozen=True)
class FileSet:
    """The four files of a data set: their paths and contents, in the order of `_ROLES`."""

    prefix: str
    paths: tuple[str, ...]
    contents: tuple[bytes, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether the images have rows and columns exchanged: all of EMNIST has."""
        return self.prefix.startswith("emnist-")

    def parse(self) -> Splits:
        """Parse the contents.

        Raises:
            DataError: the content of a file contradicts its name.
            MalformedError: the files do not belong together.
        """
        files = zip(self.paths, self.contents, _ROLES, strict=True)
        x_train, y_train, x_test, y_test = (_array(*file) for file in files)
        if self.is_transposed:
            x_train, x_test = (
                images.reshape(-1, IMAGE_SIDE, IMAGE_SIDE).swapaxes(1, 2)
                for images in (x_train, x_test)
            )
        return hold_out_validation((x_train, y_train), (x_test, y_test))


def is_train_images(name: str) -> bool:
    """Return whether a file of this name stands for its set."""
    meaning = _meaning(name)
    return meaning is not None and meaning[1] == _ROLES[0]


def find_in_directory(directory: Path) -> FileSet:
    """Find the data set in a directory, its ``raw`` (torchvision) or ``gzip`` (EMNIST), or a child.

    Raises:
        DataError: there is none, a file is missing or cannot be read, or there are several.
        OSError: the directory cannot be read.
    """
    for folder in _with_subfolders(directory):
        if sets := _sets(_files_in(folder)):
            return _only(sets, str(folder))
    nested = {
        folder: sets
        for child in sorted(directory.iterdir())
        for folder in _with_subfolders(child)
        if (sets := _sets(_files_in(folder)))
    }
    if len(nested) > 1:
        names = ", ".join(map(str, nested))
        raise DataError(f"{directory}: contains several data sets", f"pass one of them: {names}")
    for folder, sets in nested.items():
        return _only(sets, str(folder))
    for name in ("mnist.pkl.gz", "mnist.pkl", "mnist.npz"):
        if (directory / name).is_file():
            raise DataError(f"{directory}: has no IDX files", f"pass --data {directory / name}")
    raise DataError(
        f"{directory}: has no IDX files (train-images-idx3-ubyte and so on, raw or .gz)",
        "pass the directory that contains them, or an mnist.pkl.gz or mnist.npz, with --data",
    )


def find_beside(train_images: Path) -> FileSet:
    """Find the data set that the file `train_images` belongs to.

    Raises:
        DataError: a file of it is missing or cannot be read.
    """
    sets = _sets(_files_in(train_images.parent))
    (prefix,) = _sets({str(train_images): partial(read_regular, train_images, LIMIT)})
    return _only({prefix: sets[prefix]}, str(train_images.parent))


def read_zip(content: bytes, path: Path) -> Splits:
    """Read the zip at `path`: an .npz as Keras writes it, or the four files of a data set.

    Raises:
        DataError: a file in it is missing, or its content contradicts its name.
        MalformedError: it holds something else.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    with npz.open_zip(content) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        if sum(info.file_size for info in members) > LIMIT:
            problem = f"unpacks to more than the {LIMIT:,} bytes that a data set can need"
            raise MalformedError(problem, "unpack it and pass what is in it")
        folders: dict[str, Files] = {}
        for info in members:
            name = PurePosixPath(info.filename)
            if _meaning(name.name):
                # Kaggle has each file in a folder of its name.
                folder = name.parents[1] if _meaning(name.parent.name) else name.parent
                files = folders.setdefault(str(path / folder), {})
                files[str(path / name)] = partial(_read_member, archive, info)
        found = {folder: sets for folder, files in folders.items() if (sets := _sets(files))}
        if len(found) > 1:
            problem = f"contains several data sets: {', '.join(found)}"
            raise MalformedError(problem, "unpack it and pass one of them")
        for place, sets in found.items():
            return _only(sets, place, "unpack it and ").parse()
        if any(info.filename.endswith("/data.pkl") for info in members):
            raise MalformedError("is a PyTorch file", SAVE_AS_NPZ)
    return npz.read(content)


def _with_subfolders(folder: Path) -> Iterator[Path]:
    return (folder / name for name in ("", "raw", "gzip", "raw/gzip"))


def _files_in(folder: Path) -> Files:
    """The files of any data set in `folder`, and in folders in it that are named like files."""
    if not folder.is_dir():
        return {}
    named = [path for path in sorted(folder.iterdir()) if _meaning(path.name)]
    files = [path for path in named if not path.is_dir()]
    for path in named:
        if path.is_dir():
            files += [inner for inner in sorted(path.iterdir()) if _meaning(inner.name)]
    return {str(path): partial(read_regular, path, LIMIT) for path in files}


def _meaning(path: str) -> tuple[str, Role] | None:
    """The prefix and the role that a file's name has; None if it is not of a data set."""
    match = _NAME.fullmatch(PurePosixPath(path).name)
    if match is None:
        return None
    part = "train" if match["part"] == "train" else "test"
    return match["prefix"], (part, "labels" if match["kind"] == "labels" else "images")


def _sets(files: Files) -> dict[str, Files]:
    """Group files by their prefix, and keep the groups that have training images."""
    sets: dict[str, Files] = {}
    for path, read in files.items():
        if meaning := _meaning(path):
            sets.setdefault(meaning[0], {})[path] = read
    return {prefix: own for prefix, own in sets.items() if any(map(is_train_images, own))}


def _only(sets: dict[str, Files], folder: str, first: str = "") -> FileSet:
    """Read the one set of digits.

    Raises:
        DataError: there is another number of them, or one of the files cannot be read.
    """
    digits = {prefix: files for prefix, files in sets.items() if prefix not in _LETTERS}
    if not digits:
        names = ", ".join(prefix.removesuffix("-") for prefix in sets)
        remedy = "pass a directory with the files emnist-digits-* or emnist-mnist-*"
        raise DataError(f"{folder}: has more than ten classes ({names})", remedy)
    if len(digits) > 1:
        choices = ", ".join(next(filter(is_train_images, files)) for files in digits.values())
        remedy = f"{first}pass the training images of one: {choices}"
        raise DataError(f"{folder}: contains several data sets", remedy)
    ((prefix, files),) = digits.items()
    paths = tuple(_of_role(role, files, prefix, folder) for role in _ROLES)
    return FileSet(prefix, paths, tuple(_read_named(path, files[path]) for path in paths))


def _of_role(role: Role, files: Files, prefix: str, folder: str) -> str:
    """Choose among the files of one role. Raises `DataError` if there is none, or two test sets."""
    candidates = [path for path in files if _meaning(path) == (prefix, role)]
    if not candidates:
        wanted = _expected_name(role, prefix, is_npz=next(iter(files)).endswith(".npz"))
        raise DataError(f"{folder}: {wanted} is missing", "add it to that directory")
    starts = {PurePosixPath(path).name.removeprefix(prefix)[:4]: path for path in candidates}
    if len(starts) > 1:
        problem = f"{folder}: has two test sets ({', '.join(starts.values())})"
        raise DataError(problem, "remove or rename the files of one")
    # Unpacked first: torchvision leaves both, and the unpacked file is faster to read.
    return min(candidates, key=lambda path: (path.endswith(".gz"), ".idx" in path, path))


def _expected_name(role: Role, prefix: str, is_npz: bool) -> str:
    part, kind = role
    if is_npz:
        return f"{prefix}{part}-{'imgs' if kind == 'images' else kind}.npz"
    part = "t10k" if part == "test" and not prefix else part
    name = f"{prefix}{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return f"{name} (or {name}.gz)"


def _read_named(path: str, read: Callable[[], bytes]) -> bytes:
    with naming_file(path):
        return read()


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    npz.check_compression(info)
    with archive.open(info) as stream:
        bounded = BoundedStream(stream)
        data = bounded.read_exactly(info.file_size)
        bounded.expect_end()
    return data


def _array(path: str, content: bytes, role: Role) -> NDArray[Any]:
    with naming_file(path):
        if content.startswith(ZIP_MAGIC):
            return npz.read_only_array(content)
        return idx.read_array(content, "images" if role[1] == "images" else "labels")
