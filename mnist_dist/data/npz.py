"""NumPy's .npz, a zip of .npy files, as Keras serves MNIST.

The header of a .npy is parsed by numpy (``numpy.lib.format``) and compared with the directory of
the zip before any element is read. Object arrays, which are pickles, are refused.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import MalformedError
from mnist_dist.data.signatures import SAVE_AS_NPZ
from mnist_dist.data.splits import Splits, hold_out_validation
from mnist_dist.data.streams import BoundedStream

KERAS_NAMES = ("x_train", "y_train", "x_test", "y_test")
# numpy writes only these; with LZMA, the file would decide how much memory is used.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read(content: bytes) -> Splits:
    """Read a Keras-style file: arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Raises:
        MalformedError: arrays are missing, have the wrong type or do not belong together.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    x_train, y_train, x_test, y_test = read_arrays(io.BytesIO(content), KERAS_NAMES)
    return hold_out_validation((x_train, y_train), (x_test, y_test))


def read_only_array(content: bytes) -> NDArray[Any]:
    """Read the one array of an .npz, as KMNIST has four of.

    Raises:
        MalformedError: there is another number of arrays, or it is damaged.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    with open_zip(content) as archive:
        names = archive.namelist()
    if len(names) != 1:
        raise MalformedError(f"has {len(names)} arrays, expected one", SAVE_AS_NPZ)
    return read_arrays(io.BytesIO(content), [names[0].removesuffix(".npy")])[0]


def read_arrays(stream: IO[bytes], names: Sequence[str]) -> list[NDArray[Any]]:
    """Read the arrays `names` from an .npz.

    Raises:
        MalformedError: one is missing, is not of numbers, or its size contradicts its header.
        Exception: any other error of ``zipfile`` or numpy for a damaged zip.
    """
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        missing = [name for name in names if f"{name}.npy" not in members]
        if missing:
            raise MalformedError(
                f"lacks {', '.join(missing)} (it has {', '.join(members) or 'nothing'})",
                SAVE_AS_NPZ,
            )
        return [_read_array(archive, members[f"{name}.npy"]) for name in names]


def open_zip(content: bytes) -> zipfile.ZipFile:
    """Open a zip. Raises `MalformedError` if its end is missing, `BadZipFile` for other damage."""
    stream = io.BytesIO(content)
    if not zipfile.is_zipfile(stream):
        raise MalformedError("is damaged: a zip file that is cut short")
    return zipfile.ZipFile(stream)


def check_compression(member: zipfile.ZipInfo) -> None:
    """Raise `MalformedError` unless `member` is stored or deflated, and not encrypted."""
    if member.compress_type not in _COMPRESSIONS:
        problem = f"{member.filename} uses a compression that numpy does not write"
        raise MalformedError(problem, "unpack it, and pass what is in it")
    if member.flag_bits & 1:
        raise MalformedError("is encrypted", "unpack it, and pass what is in it")


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    check_compression(member)
    with archive.open(member) as stream:
        shape, fortran_order, dtype = _read_header(stream)
        if dtype.kind not in "iuf":
            problem = f"{member.filename} holds {dtype}, not numbers"
            raise MalformedError(problem, SAVE_AS_NPZ)
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
