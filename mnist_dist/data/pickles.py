"""Read the classic ``mnist.pkl.gz`` as untrusted input.

A pickle is a program, and an ordinary unpickler runs it: ``os.system`` is one instruction away.
This one is restricted: it has only the instructions that arrays in tuples need; globals are looked
up in a table of stand-ins and never imported; the stand-ins check sizes and types before numpy
reads the bytes, so that no pickled value reaches a constructor of numpy.

The file holds ``((images, labels), (images, labels), (images, labels))``, train, validation and
test; images are float32 (N, 784) of byte/256, labels int64 (N,). It was written by Python 2 for
http://deeplearning.net/tutorial/gettingstarted.html. The instructions are described in
``pickletools``, the pickles of numpy in ``numpy.ndarray.__reduce__`` and ``__reduce_ex__``.
"""

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import MalformedError
from mnist_dist.data.signatures import SAVE_AS_NPZ
from mnist_dist.data.splits import SPLIT_NAMES, Splits, hold_out_validation, make_split
from mnist_dist.data.streams import BoundedStream, unpacked

# A valid file takes 200 to 440 reads. The limit bounds what a program can build from small parts.
_MAX_READS = 4_000

_NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
_BYTE_ORDERS = ("<", ">", "|")

_INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
)


def read(content: bytes) -> Splits:
    """Read the splits of a ``.pkl`` or ``.pkl.gz``, of any pickle protocol.

    Two pairs of (images, labels), as Keras once pickled, are train and test.

    Raises:
        MalformedError: the pickle contains anything but arrays, or they are not three splits.
        Exception: any other error of gzip or the unpickler for a damaged file.
    """
    with unpacked(content) as stream:
        parts = _ArrayUnpickler(stream).load()
        stream.expect_end()
    if isinstance(parts, (list, tuple)) and len(parts) == 2:
        return hold_out_validation(_pair(parts[0]), _pair(parts[1]))
    pairs = [_pair(part) for part in _sequence_of(3, parts)]
    train, validation, test = (
        make_split(name, *pair) for name, pair in zip(SPLIT_NAMES, pairs, strict=True)
    )
    return train, validation, test


def _pair(part: object) -> tuple[NDArray[Any], NDArray[Any]]:
    images, labels = _sequence_of(2, part)
    if not (isinstance(images, _Array) and isinstance(labels, _Array)):
        raise MalformedError("does not hold (images, labels) arrays for each split", SAVE_AS_NPZ)
    return images.values, labels.values


def _sequence_of(length: int, value: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise MalformedError("does not hold three splits, each of images and labels", SAVE_AS_NPZ)
    return value


class _Dtype:
    """Stand-in for ``numpy.dtype``: a type of number, by its code and byte order."""

    def __init__(self, code: object, *_align_and_copy: object) -> None:
        self._code = _text(code)
        self._order = "|"
        if self._code not in _NUMBERS:
            raise MalformedError(
                f"holds an array of {self._code}, not of plain numbers", SAVE_AS_NPZ
            )

    def set_state(self, state: object) -> None:
        """``(version, byte order, subarray, names, fields, ...)``; the last three are None here."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise MalformedError("holds an array of records, not of plain numbers", SAVE_AS_NPZ)
        self._order = _text(state[1])
        if self._order not in _BYTE_ORDERS:
            raise MalformedError(f"holds an array of byte order {self._order}")

    def to_numpy(self) -> np.dtype[Any]:
        """Return the dtype, built from two strings that were found in tables."""
        return np.dtype(self._order + self._code)


class _Array:
    """Stand-in for ``numpy.ndarray``: created empty, filled by the state that follows."""

    def __init__(self) -> None:
        self._values: NDArray[Any] | None = None

    @property
    def values(self) -> NDArray[Any]:
        """The array, of any shape and number type. Raises `MalformedError` if never filled."""
        if self._values is None:
            raise MalformedError("holds an array without content")
        return self._values

    def set_state(self, state: object) -> None:
        """``(version, shape, dtype, is in Fortran order, content)``."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise MalformedError("holds an array in a form that numpy does not write")
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: object, dtype: object, shape: object, order: object) -> None:
        """View `data` as an array, after its size was compared with shape and dtype."""
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
            raise MalformedError("holds an array in a form that numpy does not write")
        if not isinstance(shape, tuple) or not all(type(n) is int and n > 0 for n in shape):
            raise MalformedError(f"holds an array of shape {shape}")
        numbers = dtype.to_numpy()
        if math.prod(shape) * numbers.itemsize != len(data):
            raise MalformedError(f"holds an array of {numbers} {shape} in {len(data):,} bytes")
        self._values = np.frombuffer(data, numbers).reshape(
            shape, order="F" if order == "F" else "C"
        )


# Pickles only name `numpy.ndarray`, as the first argument of `_reconstruct`.
_NDARRAY = object()


def _reconstruct(*_kind_and_placeholders: object) -> _Array:
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, order)
    return array


_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    # Protocol 5.
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
}


_Instruction: TypeAlias = Callable[[Any], None]
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class _Instructions(dict[int, _Instruction]):
    def __missing__(self, code: int) -> _Instruction:
        if code not in _NAMES:
            raise MalformedError(f"is not a pickle: it has the unknown instruction 0x{code:02x}")
        raise MalformedError(
            f"is refused: arrays need no pickle instruction {_NAMES[code]}", SAVE_AS_NPZ
        )


def _permitted(every: Mapping[int, _Instruction]) -> _Instructions:
    return _Instructions({code: every[code] for code in _NAMES if _NAMES[code] in _INSTRUCTIONS})


# The unpickler that the standard library has in Python. In the one in C, a five-byte instruction
# (LONG_BINPUT) allocates 64 GB for the memo, and the set of instructions is fixed.
_Machine = pickle._Unpickler


class _ArrayUnpickler(_Machine):
    """The standard unpickler, with the instructions and globals of pickled arrays only."""

    dispatch: ClassVar[dict[int, _Instruction]] = _permitted(_Machine.dispatch)
    # Set by `load`: the file and the stack of values.
    read: Callable[[int], bytes]
    stack: list[Any]

    def __init__(self, stream: BoundedStream) -> None:
        # With "bytes", byte strings of Python 2, which hold the pixels, stay bytes.
        super().__init__(_LimitedReads(stream), encoding="bytes")
        self._stream = stream

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a global. Raises `MalformedError` for any other global."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _STAND_INS:
            raise MalformedError(f"is refused: the pickle asks for {module}.{name}")
        return _STAND_INS[module, name]

    def _encode(self, text: str, encoding: object) -> bytes:
        """Return bytes that Python 3 pickled as text (protocols 0 to 2), within the size limit."""
        if _text(encoding) != "latin1":
            raise MalformedError(f"is refused: bytes in the encoding {encoding}")
        self._stream.spend(len(text))
        return text.encode("latin1")

    def _skip_frame_header(self) -> None:
        # Frames only help to read ahead. Without them, each instruction counts as a read.
        self.read(8)

    def _load_bytearray8(self) -> None:
        # The standard method allocates the claimed length before it reads.
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def _load_build(self) -> None:
        # The standard method would set any attribute of any object on the stack.
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise MalformedError("is refused: the pickle modifies something other than an array")
        self.stack[-1].set_state(state)

    dispatch[pickle.FRAME[0]] = _skip_frame_header
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8
    dispatch[pickle.BUILD[0]] = _load_build


class _LimitedReads:
    """A stream limited to `_MAX_READS` reads; an instruction takes one or two."""

    def __init__(self, stream: BoundedStream) -> None:
        self._stream = stream
        self._left = _MAX_READS

    def read(self, size: int) -> bytes:
        self._count()
        return self._stream.read(size)

    def readline(self) -> bytes:
        self._count()
        return self._stream.readline()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise MalformedError("is refused: the pickle has more instructions than arrays need")


def _text(value: object) -> str:
    """Return a name, which is str in a pickle of Python 3 and bytes in one of Python 2."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
