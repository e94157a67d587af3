"""IDX, the format of the original MNIST files and of most of their successors.

A file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension
as a big-endian 32-bit number, then the elements, last dimension fastest. Described on
http://yann.lecun.com/exdb/mnist/ under "FILE FORMATS FOR THE MNIST DATABASE".
"""

import math
import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import FILE_REMEDY, MalformedError
from mnist_dist.data.numbers import check_image_shape
from mnist_dist.data.signatures import BIG_ENDIAN, HEAD, identify
from mnist_dist.data.streams import unpacked

Kind = Literal["images", "labels"]

_TYPES = {8: ">u1", 9: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_RANKS = {"images": (2, 3, 4), "labels": (1, 2)}
_USUAL = {"images": "00000803", "labels": "00000801"}
# No dimension of a data set that fits the size limit is as large.
_TOO_LARGE = 1 << 24
# QMNIST's labels have eight columns: the class, then where the digit is from.
_QMNIST_COLUMNS = 8


def is_idx(head: bytes) -> bool:
    """Return whether a file that starts with `head` is an IDX file."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 4


def read_array(content: bytes, kind: Kind) -> NDArray[Any]:
    """Read the array in an IDX file, raw or in gzip.

    Args:
        content: of the file.
        kind: what it must hold.

    Returns:
        Images in the file's shape and type; labels likewise, of QMNIST's the classes only.

    Raises:
        MalformedError: it is no IDX file of that kind, or its size contradicts its header.
        Exception: any other error of gzip for a damaged file.
    """
    with unpacked(content) as stream:
        head = stream.read_exactly(4)
        if not is_idx(head) or head[3] not in _RANKS[kind]:
            raise _other_file(content, head, kind)
        dtype, rank = np.dtype(_TYPES[head[2]]), head[3]
        sizes = stream.read_exactly(4 * rank)
        shape = struct.unpack(f">{rank}I", sizes)
        if max(shape) >= _TOO_LARGE > max(struct.unpack(f"<{rank}I", sizes)):
            raise MalformedError("has its sizes in the wrong byte order", BIG_ENDIAN)
        if kind == "images":
            check_image_shape(kind, shape)
        data = stream.read_exactly(math.prod(shape) * dtype.itemsize)
        stream.expect_end()
    array = np.frombuffer(data, dtype).reshape(shape)
    is_qmnist = kind == "labels" and shape[1:] == (_QMNIST_COLUMNS,)
    return array[:, 0] if is_qmnist else array


def _other_file(content: bytes, head: bytes, kind: Kind) -> MalformedError:
    if is_idx(head):
        remedy = "name each of the four files after its content"
    else:
        with unpacked(content) as stream:
            if error := identify(stream.read(HEAD)):
                return error
        remedy = FILE_REMEDY
    return MalformedError(
        f"starts with {head.hex()}, expected {_USUAL[kind]} for this IDX file", remedy
    )
