"""Read the classic ``mnist.pkl.gz`` without trusting it.

A pickle is a program, and the usual reader runs it: ``os.system`` is one instruction away. Here it
runs on a machine that cannot leave the room. Only the instructions which arrays in tuples need
exist; a global is looked up in a table of five stand-ins, never imported; the stand-ins check sizes
and types and only then let numpy look at the bytes, so nothing pickled reaches a constructor of
numpy's own.

The file holds ``((images, labels), (images, labels), (images, labels))``, train, validation and
test; images are float32 (N, 784) of byte/256, labels int64 (N,). It was written by Python 2 for
http://deeplearning.net/tutorial/gettingstarted.html. The instructions are those of
``pickletools``; what numpy pickles is in ``numpy.ndarray.__reduce__`` and ``__reduce_ex__``.
"""

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import MalformedError, printable
from mnist_dist.data.splits import SPLIT_NAMES, Split, Splits, make_split
from mnist_dist.data.streams import BoundedStream, open_unpacked

# An honest file takes 200 to 440 reads. The cap bounds what a program can build from small parts.
_MOST_READS = 4_000
# Rows turned from floats to bytes at a time: enough to be quick, small beside the data itself.
_ROWS_AT_ONCE = 4096

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


def read(file: Path) -> Splits:
    """Read the three splits of a ``.pkl`` or ``.pkl.gz``, of any pickle protocol.

    Raises:
        MalformedError: the pickle asks for anything but arrays, or they are not three splits.
        Exception: whatever else a damaged file makes gzip or the pickle machine raise.
    """
    with open_unpacked(file) as stream:
        content = _ArrayUnpickler(stream).load()
        stream.expect_end()
    pairs = [_pair(part) for part in _sequence_of(3, content)]
    train, validation, test = (
        _split(name, *pair) for name, pair in zip(SPLIT_NAMES, pairs, strict=True)
    )
    return train, validation, test


def _pair(part: object) -> tuple[NDArray[Any], NDArray[Any]]:
    images, labels = _sequence_of(2, part)
    if not (isinstance(images, _Array) and isinstance(labels, _Array)):
        raise MalformedError("holds something else than (images, labels) arrays for each split")
    return images.values, labels.values


def _sequence_of(length: int, value: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise MalformedError("does not hold three splits, each of images and labels")
    return value


def _split(name: str, pixels: NDArray[Any], labels: NDArray[Any]) -> Split:
    if pixels.dtype.kind != "f":
        raise MalformedError(f"{name} images are {pixels.dtype}, not floats of byte/256")
    if pixels.ndim == 0:
        raise MalformedError(f"{name} images are a single number")
    return make_split(name, _to_bytes(name, pixels), labels)


def _to_bytes(name: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    whole = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = pixels[rows] * 256
            whole[rows] = scaled
        if not np.array_equal(whole[rows], scaled):
            raise MalformedError(
                f"{name} images are not byte/256: some pixel * 256 is not 0 to 255"
            )
    return whole


class _Dtype:
    """Stands in for ``numpy.dtype``: a plain number, named by its code and its byte order."""

    def __init__(self, code: object, *_align_and_copy: object) -> None:
        self._code = _text(code)
        self._order = "|"
        if self._code not in _NUMBERS:
            raise MalformedError(f"holds an array of {printable(self._code)}, not of plain numbers")

    def set_state(self, state: object) -> None:
        """``(version, byte order, subarray, names, fields, ...)``; the last three are None here."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise MalformedError("holds an array of records, not of plain numbers")
        self._order = _text(state[1])
        if self._order not in _BYTE_ORDERS:
            raise MalformedError(f"holds an array of byte order {printable(self._order)}")

    def to_numpy(self) -> np.dtype[Any]:
        """The dtype itself, made of two strings that were found in tables."""
        return np.dtype(self._order + self._code)


class _Array:
    """Stands in for ``numpy.ndarray``: empty when made, filled by the state that follows."""

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
        """Look at `data` as an array, once its size is found to be what shape and dtype ask for."""
        if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
            raise MalformedError("holds an array in a form that numpy does not write")
        if not isinstance(shape, tuple) or not all(type(n) is int and n > 0 for n in shape):
            raise MalformedError(f"holds an array of shape {printable(shape)}")
        numbers = dtype.to_numpy()
        if math.prod(shape) * numbers.itemsize != len(data):
            raise MalformedError(f"holds an array of {numbers} {shape} in {len(data):,} bytes")
        self._values = np.frombuffer(data, numbers).reshape(
            shape, order="F" if order == "F" else "C"
        )


# What `numpy.ndarray` is to a pickle: only ever named, as the first argument of `_reconstruct`.
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
            raise MalformedError(f"is no pickle: it has the unknown instruction 0x{code:02x}")
        raise MalformedError(f"is refused: no pickle of arrays has the instruction {_NAMES[code]}")


def _permitted(every: Mapping[int, _Instruction]) -> _Instructions:
    return _Instructions({code: every[code] for code in _NAMES if _NAMES[code] in _INSTRUCTIONS})


# The reader that the standard library keeps in Python beside the one in C. In C, one five-byte
# instruction (LONG_BINPUT) makes it clear 64 GB for its memo, and its set of instructions is fixed.
_Machine = pickle._Unpickler


class _ArrayUnpickler(_Machine):
    """The standard unpickler, with the instructions and globals of pickled arrays only."""

    dispatch: ClassVar[dict[int, _Instruction]] = _permitted(_Machine.dispatch)
    # What `load` sets up: the file, and the values at hand.
    read: Callable[[int], bytes]
    stack: list[Any]

    def __init__(self, stream: BoundedStream) -> None:
        # With "bytes", the byte strings of Python 2 stay what they are; they hold the pixels.
        super().__init__(_FewReads(stream), encoding="bytes")
        self._stream = stream

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for a global. Raises `MalformedError`, naming it, for all but a few."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _STAND_INS:
            raise MalformedError(f"is refused: the pickle asks for {printable(f'{module}.{name}')}")
        return _STAND_INS[module, name]

    def _encode(self, text: str, encoding: object) -> bytes:
        """How Python 3 writes bytes below protocol 3. Counted: a program can call it at will."""
        if _text(encoding) != "latin1":
            raise MalformedError(f"is refused: bytes in the encoding {printable(encoding)}")
        self._stream.spend(len(text))
        return text.encode("latin1")

    def _skip_frame_header(self) -> None:
        # Frames only help reading ahead; ignored, each instruction counts as a read.
        self.read(8)

    def _load_bytearray8(self) -> None:
        # The original makes room for whatever length is claimed, and clears it, before reading.
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def _load_build(self) -> None:
        # The original would set any attribute of anything on the stack.
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise MalformedError("is refused: the pickle changes something else than an array")
        self.stack[-1].set_state(state)

    dispatch[pickle.FRAME[0]] = _skip_frame_header
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8
    dispatch[pickle.BUILD[0]] = _load_build


class _FewReads:
    """A stream that gives out after `_MOST_READS` reads, one or two to an instruction."""

    def __init__(self, stream: BoundedStream) -> None:
        self._stream = stream
        self._left = _MOST_READS

    def read(self, size: int) -> bytes:
        self._count()
        return self._stream.read(size)

    def readline(self) -> bytes:
        self._count()
        return self._stream.readline()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise MalformedError("is refused: the pickle is a longer program than arrays need")


def _text(value: object) -> str:
    """A name: str in a pickle of Python 3, bytes in one of Python 2."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
