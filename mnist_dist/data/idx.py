"""IDX, the format of the original MNIST files, also used by Fashion-MNIST and KMNIST.

A file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension
as a big-endian 32-bit number, then the elements, last dimension fastest. Described on
http://yann.lecun.com/exdb/mnist/ under "FILE FORMATS FOR THE MNIST DATABASE".
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import DataError, MalformedError, naming_file
from mnist_dist.data.splits import Splits, check_image_shape, hold_out_validation
from mnist_dist.data.streams import open_unpacked

IMAGE_MAGIC = b"\x00\x00\x08\x03"
LABEL_MAGIC = b"\x00\x00\x08\x01"

_ROLES = ("train-images{}idx3", "train-labels{}idx1", "t10k-images{}idx3", "t10k-labels{}idx1")


def find(directory: Path) -> tuple[Path, Path, Path, Path]:
    """Find the four IDX files of `directory`: train images and labels, test images and labels.

    They may be in it, in its ``raw``, or in one ``*/raw`` (torchvision's ``MNIST/raw``).

    Raises:
        DataError: there are none, one is missing, or several folders have them.
        OSError: the directory cannot be read.
    """
    folder = _folder_with_images(directory)
    train_images, train_labels, test_images, test_labels = (_pick(folder, r) for r in _ROLES)
    return train_images, train_labels, test_images, test_labels


def read(files: tuple[Path, Path, Path, Path]) -> Splits:
    """Read the files that `find` found.

    Raises:
        DataError: a file cannot be read, or its content contradicts its name.
        MalformedError: the files do not belong together.
    """
    train_images, train_labels, test_images, test_labels = files
    return hold_out_validation(
        (_read_array(train_images, IMAGE_MAGIC), _read_array(train_labels, LABEL_MAGIC)),
        (_read_array(test_images, IMAGE_MAGIC), _read_array(test_labels, LABEL_MAGIC)),
    )


def _read_array(file: Path, magic: bytes) -> NDArray[np.uint8]:
    with naming_file(file), open_unpacked(file) as stream:
        found = stream.read_exactly(4)
        if found != magic:
            raise MalformedError(
                f"starts with {found.hex()}, expected {magic.hex()} for this IDX file"
            )
        rank = magic[3]
        shape = struct.unpack(f">{rank}I", stream.read_exactly(4 * rank))
        if magic == IMAGE_MAGIC:
            check_image_shape(file.name, shape)
        data = stream.read_exactly(math.prod(shape))
        stream.expect_end()
        return np.frombuffer(data, np.uint8).reshape(shape)


def _folder_with_images(directory: Path) -> Path:
    for folder in (directory, directory / "raw"):
        if _has_images(folder):
            return folder
    nested = [child / "raw" for child in sorted(directory.iterdir()) if _has_images(child / "raw")]
    if len(nested) > 1:
        names = ", ".join(str(folder) for folder in nested)
        raise DataError(f"{directory}: contains several data sets", f"pass one of them: {names}")
    return nested[0] if nested else _refuse(directory)


def _refuse(directory: Path) -> Path:
    for name in ("mnist.pkl.gz", "mnist.pkl", "mnist.npz"):
        if (directory / name).is_file():
            raise DataError(f"{directory}: has no IDX files", f"pass --data {directory / name}")
    raise DataError(
        f"{directory}: has no IDX files (train-images-idx3-ubyte and so on, raw or .gz)",
        "pass the directory that contains them, or a mnist.pkl.gz or mnist.npz, with --data",
    )


def _has_images(folder: Path) -> bool:
    return any(path.is_file() for path in _spellings(folder, _ROLES[0]))


def _pick(folder: Path, role: str) -> Path:
    for path in _spellings(folder, role):
        if path.is_file():
            return path
    wanted = role.format("-") + "-ubyte"
    raise DataError(f"{folder}: {wanted} (or {wanted}.gz) is missing", "add it to that directory")


def _spellings(folder: Path, role: str) -> Iterator[Path]:
    # Unpacked first: torchvision leaves both, and the unpacked file is faster to read.
    for suffix in ("-ubyte", "-ubyte.gz"):
        for separator in ("-", "."):
            yield folder / (role.format(separator) + suffix)
