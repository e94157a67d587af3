"""NumPy's .npz, a zip of .npy files, as Keras serves MNIST.

The header of a .npy is parsed by numpy (``numpy.lib.format``) and compared with the directory of
the zip before any element is read. Object arrays, which are pickles, are refused.
"""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import MalformedError, printable
from mnist_dist.data.splits import Splits, hold_out_validation
from mnist_dist.data.streams import BoundedStream

_KERAS_NAMES = ("x_train", "y_train", "x_test", "y_test")
# numpy writes only these; with LZMA, the file would decide how much memory is used.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read(file: Path) -> Splits:
    """Read a Keras-style file: integer arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Raises:
        MalformedError: arrays are missing, have the wrong type or do not belong together.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    with file.open("rb") as stream:
        x_train, y_train, x_test, y_test = read_arrays(stream, _KERAS_NAMES)
    return hold_out_validation((x_train, y_train), (x_test, y_test))


def read_arrays(stream: IO[bytes], names: Sequence[str]) -> list[NDArray[Any]]:
    """Read the integer arrays `names` from an .npz.

    Raises:
        MalformedError: one is missing, is not of integers, or its size contradicts its header.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        missing = [name for name in names if f"{name}.npy" not in members]
        if missing:
            raise MalformedError(
                f"lacks {', '.join(missing)} (it has {printable(', '.join(members)) or 'nothing'})"
            )
        return [_read_array(archive, members[f"{name}.npy"]) for name in names]


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    if member.compress_type not in _COMPRESSIONS:
        raise MalformedError(f"{member.filename} uses a compression that numpy does not write")
    with archive.open(member) as stream:
        shape, fortran_order, dtype = _read_header(stream)
        if dtype.kind not in "iu":
            raise MalformedError(f"{member.filename} holds {printable(dtype)}, not integers")
        size, left = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
        if size != left or size == 0:
            raise MalformedError(
                f"{member.filename} of shape {shape} has {left:,} bytes, not {size:,}"
            )
        bounded = BoundedStream(stream)
        data = bounded.read_exactly(size)
        bounded.expect_end()
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise MalformedError(f"uses version {version} of the .npy format, expected 1.0 or 2.0")
