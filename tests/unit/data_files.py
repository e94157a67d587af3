"""Small made data sets, written in every format that the program reads, and a place to keep them.

They share nothing with the code under test: what a format should turn
into is said here a second time, in plain numpy.
"""

import gzip
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mnist_dist.data import Dataset, find_data, load

REPOSITORY = Path(__file__).parents[2]
CLOSED_PORT = "http://127.0.0.1:9/mnist.pkl.gz"
_NOBODY = 65534

Array = NDArray[Any]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Digits:
    """Made digits: ``train`` (N, 28, 28) uint8 with (N,) uint8 labels, and ``test`` likewise."""

    train: Pair
    test: Pair

    @property
    def splits(self) -> tuple[Pair, Pair, Pair]:
        """As the pickle has them: the last sixth of the training set apart, for validation."""
        images, labels = self.train
        kept = len(labels) * 5 // 6
        return (images[:kept], labels[:kept]), (images[kept:], labels[kept:]), self.test


Writer = Callable[[Path, Digits], Path]


def digits(train: int = 60, test: int = 10, seed: int = 0) -> Digits:
    random = np.random.default_rng(seed)

    def some(count: int) -> Pair:
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        return images, random.integers(0, 10, count, dtype=np.uint8)

    return Digits(some(train), some(test))


def blank(train: int = 6, test: int = 1) -> Digits:
    """Digits of zeros: almost every other byte of a file of them is structure."""

    def zeros(count: int) -> Pair:
        return np.zeros((count, 28, 28), np.uint8), np.zeros(count, np.uint8)

    return Digits(zeros(train), zeros(test))


def floats(made: Digits) -> tuple[Pair, Pair, Pair]:
    """The content of the classic pickle: float32 byte/256 and int64."""
    train, validation, test = (
        (images.reshape(-1, 784).astype(np.float32) / 256, labels.astype(np.int64))
        for images, labels in made.splits
    )
    return train, validation, test


def pickled(made: Digits, protocol: int = 5) -> bytes:
    return pickle.dumps(floats(made), protocol)


def write_pickle(file: Path, made: Digits, protocol: int = 5) -> Path:
    return write_bytes(file, pickled(made, protocol))


def write_bytes(file: Path, content: bytes) -> Path:
    """Write `content`, through gzip if the name ends so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content, 1, mtime=0) if file.suffix == ".gz" else content)
    return file


def python2_pickled(made: Digits) -> bytes:
    """What Python 2's cPickle wrote at protocol 2: pixels and names as byte strings."""
    pairs = [_python2_array(x) + _python2_array(y) + b"\x86" for x, y in floats(made)]
    return b"\x80\x02" + b"".join(pairs) + b"\x87."


def _python2_array(array: Array) -> bytes:
    data: bytes = array.tobytes()
    code: bytes = array.dtype.str[1:].encode()
    shape = b"".join(b"J" + struct.pack("<i", size) for size in array.shape)
    reconstructed = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    minus_one = b"J" + struct.pack("<i", -1)
    dtype = b"cnumpy\ndtype\nU\x02" + code + b"K\x00K\x01\x87R(K\x03U\x01<NNN" + minus_one * 2
    content = b"T" + struct.pack("<i", len(data)) + data
    return reconstructed + b"(K\x01(" + shape + b"t" + dtype + b"K\x00tb\x89" + content + b"tb"


def python2_text_pickled(made: Digits) -> bytes:
    """What Python 2 wrote when it was not asked for a protocol: text, protocol 0."""
    pairs = [b"(" + _text_array(x) + _text_array(y) + b"t" for x, y in floats(made)]
    return b"(" + b"".join(pairs) + b"t."


def _text_array(array: Array) -> bytes:
    data = "".join(f"\\x{byte:02x}" for byte in array.tobytes()).encode()
    shape = b"".join(b"I%d\n" % size for size in array.shape)
    code: bytes = array.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb" % code
    reconstructed = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    return reconstructed + b"(I1\n(" + shape + b"t" + dtype + b"I00\nS'" + data + b"'\ntb"


_IDX_TYPES = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: Array) -> bytes:
    code = _IDX_TYPES[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + bytes(array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_idx(directory: Path, made: Digits, suffix: str = "", separator: str = "-") -> Path:
    for role, (images, labels) in (("train", made.train), ("t10k", made.test)):
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{role}-{kind}{separator}idx{array.ndim}-ubyte{suffix}"
            write_bytes(directory / name, idx_bytes(array))
    return directory


def write_named(directory: Path, made: Digits, names: str, transpose: bool = False) -> Path:
    """IDX files of other names: `{part}` is train or test, `{kind}` what is in the file."""
    for part, (images, labels) in (("train", made.train), ("test", made.test)):
        images = images.transpose(0, 2, 1) if transpose else images
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            write_bytes(directory / names.format(part=part, kind=kind), idx_bytes(array))
    return directory


def write_qmnist(directory: Path, made: Digits) -> Path:
    """The labels have eight columns of 32 bits: the class, then the writer and so on."""
    for part, (images, labels) in (("train", made.train), ("test", made.test)):
        columns = np.full((len(labels), 8), 54321, np.int32)
        columns[:, 0] = labels
        name = f"qmnist-{part}-"
        write_bytes(directory / f"{name}images-idx3-ubyte.gz", idx_bytes(images))
        write_bytes(directory / f"{name}labels-idx2-int.gz", idx_bytes(columns))
    return directory


def write_kmnist_npz(directory: Path, made: Digits) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in (("train", made.train), ("test", made.test)):
        np.savez_compressed(directory / f"kmnist-{part}-imgs.npz", images)
        np.savez_compressed(directory / f"kmnist-{part}-labels.npz", labels)
    return directory


def write_kaggle(directory: Path, made: Digits) -> Path:
    """Each file in a folder of its own name."""
    for file in sorted(write_idx(directory / "flat", made).iterdir()):
        (directory / file.name).mkdir()
        file.rename(directory / file.name / file.name)
    (directory / "flat").rmdir()
    return directory


def write_zip(file: Path, directory: Path) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(directory.rglob("*")):
            archive.write(path, path.relative_to(directory))
        archive.writestr("__MACOSX/._train-images-idx3-ubyte", b"metadata")
        archive.writestr("README.txt", b"text")
    return file


def write_npz(file: Path, made: Digits, **changed: Array) -> Path:
    (x_train, y_train), (x_test, y_test) = made.train, made.test
    arrays: dict[str, Any] = {
        "x_train": x_train,
        "y_train": y_train,
        "x_test": x_test,
        "y_test": y_test,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **(arrays | changed))
    return file


def _pickle_writer(name: str, content: Callable[[Digits], bytes]) -> Writer:
    return lambda home, made: write_bytes(home / name, content(made))


def _zip_of(write: Writer) -> Writer:
    return lambda home, made: write_zip(home / "archive.zip", write(home / "unpacked", made))


def _npz_with(change: Callable[[Pair], Pair]) -> Writer:
    """Keras's file, its images and labels changed."""

    def write(home: Path, made: Digits) -> Path:
        (x_train, y_train), (x_test, y_test) = change(made.train), change(made.test)
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        return write_npz(home / "mnist.npz", made, **arrays)

    return write


def _idx_of(dtype: str) -> Writer:
    """IDX files of another number type."""

    def write(home: Path, made: Digits) -> Path:
        for file in sorted(write_idx(home, made).iterdir()):
            images, labels = made.train if "train" in file.name else made.test
            array = images if "images" in file.name else labels
            file.write_bytes(idx_bytes(array.astype(dtype)))
        return home

    return write


def _idx_writer(folder: str, suffix: str = "", separator: str = "-") -> Writer:
    def write(home: Path, made: Digits) -> Path:
        write_idx(home / folder, made, suffix, separator)
        return home

    return write


# Every way to write digits below a directory; each returns the path to give to --data.
WRITERS: dict[str, Writer] = {
    **{
        f"pickle of protocol {protocol}": _pickle_writer(
            "mnist.pkl.gz", partial(pickled, protocol=protocol)
        )
        for protocol in range(6)
    },
    "pickle, not packed": _pickle_writer("mnist.pkl", pickled),
    "pickle without a suffix": _pickle_writer("mnist", pickled),
    "pickle of Python 2": _pickle_writer("mnist.pkl.gz", python2_pickled),
    "pickle of Python 2, as text": _pickle_writer("mnist.pkl.gz", python2_text_pickled),
    "idx": _idx_writer("."),
    "idx, packed": _idx_writer(".", ".gz"),
    "idx, dotted names": _idx_writer(".", "", "."),
    "idx, dotted names, packed": _idx_writer(".", ".gz", "."),
    "idx in raw": _idx_writer("raw"),
    "idx in MNIST/raw": _idx_writer("MNIST/raw"),
    "idx in FashionMNIST/raw": _idx_writer("FashionMNIST/raw", ".gz"),
    "idx in KMNIST/raw": _idx_writer("KMNIST/raw"),
    "idx with test- names": lambda home, made: write_named(home, made, "{part}-{kind}-ubyte"),
    "idx, named by its training images": lambda home, made: (
        write_idx(home, made, ".gz") / "train-images-idx3-ubyte.gz"
    ),
    "idx in Kaggle's folders": write_kaggle,
    "idx of 32-bit integers": _idx_of("i4"),
    "idx of floats": _idx_of("f4"),
    "EMNIST digits": lambda home, made: write_named(
        home / "EMNIST" / "raw", made, "emnist-digits-{part}-{kind}-ubyte", transpose=True
    ),
    "EMNIST mnist, beside letters": lambda home, made: (
        write_named(
            write_named(home / "gzip", digits(seed=9), "emnist-letters-{part}-{kind}-ubyte.gz"),
            made,
            "emnist-mnist-{part}-{kind}-ubyte.gz",
            transpose=True,
        ).parent
    ),
    "QMNIST": lambda home, made: write_qmnist(home / "QMNIST" / "raw", made).parents[1],
    "KMNIST of npz files": write_kmnist_npz,
    "zip of idx": _zip_of(write_idx),
    "zip of a folder of packed idx": _zip_of(_idx_writer("MNIST/raw", ".gz")),
    "zip of Kaggle's folders": _zip_of(write_kaggle),
    "zip of EMNIST": _zip_of(
        lambda home, made: write_named(
            home, made, "gzip/emnist-digits-{part}-{kind}-ubyte.gz", transpose=True
        )
    ),
    "zip of QMNIST": _zip_of(write_qmnist),
    "zip of npz files": _zip_of(write_kmnist_npz),
    "npz": lambda home, made: write_npz(home / "mnist.npz", made),
    "npz with a channel axis": _npz_with(lambda pair: (pair[0][..., None], pair[1])),
    "npz with channels first": _npz_with(lambda pair: (pair[0][:, None], pair[1])),
    "npz with a column of labels": _npz_with(lambda pair: (pair[0], pair[1][:, None])),
    "npz of int64": _npz_with(lambda pair: (pair[0].astype("i8"), pair[1].astype("i8"))),
    "npz of big-endian int16": _npz_with(lambda pair: (pair[0].astype(">i2"), pair[1])),
    "npz of whole floats": _npz_with(lambda pair: (pair[0].astype("f4"), pair[1].astype("f8"))),
    "npz of half floats": _npz_with(lambda pair: (pair[0].astype("f2"), pair[1])),
    "npz of byte/256": _npz_with(lambda pair: (pair[0] / np.float32(256), pair[1])),
    "pickle of whole numbers": _pickle_writer(
        "mnist.pkl", lambda made: pickle.dumps([(x, y[:, None]) for x, y in made.splits])
    ),
    "pickle of train and test, as in old Keras": _pickle_writer(
        "mnist.pkl.gz", lambda made: pickle.dumps((made.train, made.test), 2)
    ),
}


def read(data: str | Path, cache_dir: Path | None = None) -> Dataset:
    """Through the public door, as the job does it."""
    return load(find_data(str(data), cache_dir))


def assert_holds(dataset: Dataset, made: Digits) -> None:
    """Bit for bit, with shapes and dtypes."""
    for split, (images, labels) in zip(dataset.splits, made.splits, strict=True):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(labels), 784)
        assert np.array_equal(split.images.numpy(), images.reshape(-1, 784))
        assert np.array_equal(split.labels.numpy(), labels)


def assert_one_line(error: BaseException, *words: str) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test off the network, off the user's cache and off the repository's own data."""
    monkeypatch.setenv("MNIST_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MNIST_DIST_URL", CLOSED_PORT)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A directory to close, as a user whom closing it keeps out: root is let in everywhere."""
    was = os.geteuid()
    home = Path(mkdtemp())
    home.chmod(0o755)
    try:
        if was == 0:
            os.chown(home, _NOBODY, -1)
            os.seteuid(_NOBODY)
        yield home
    finally:
        os.seteuid(was)
        shutil.rmtree(home)


# Reports each conversion, and takes its time over it, so that the others would get in between.
_RACER = """
import sys, time
from pathlib import Path
from mnist_dist import data
from mnist_dist.data import cache

def logged(entry, dataset, write=cache.write):
    with Path(sys.argv[2]).open("a") as log:
        log.write("converted\\n")
    time.sleep(0.3)
    write(entry, dataset)

cache.write = logged
print("ready", flush=True)
sys.stdin.readline()
print(data.load(data.find_data(sys.argv[1], None)).fingerprint, flush=True)
"""


def race(count: int, data: str | Path, log: Path) -> list[str]:
    """Let `count` new processes find `data` at the same time; returns their fingerprints.

    Each conversion adds a line to `log`.
    """
    command = [sys.executable, "-c", _RACER, str(data), str(log)]
    racers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        for _ in range(count)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    fingerprints = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * count
    return fingerprints


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
