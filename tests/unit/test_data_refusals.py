"""What cannot be read is refused in one line that names it; nothing in it is ever run."""

import copyreg
import gzip
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import (
    assert_one_line,
    blank,
    digits,
    floats,
    idx_bytes,
    isolate,
    pickled,
    read,
    unprivileged,
    write_bytes,
    write_idx,
    write_npz,
    write_pickle,
)

from mnist_dist.data import DataError
from mnist_dist.errors import UserError

MADE = digits()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


def refusal(data: Path, *words: str) -> str:
    """Read `data`, which must end in one line that names it and holds `words`."""
    with pytest.raises(DataError) as caught:
        read(data)
    assert isinstance(caught.value, UserError)
    assert_one_line(caught.value, str(data), *words)
    return str(caught.value)


# --- Pickles that are programs ---------------------------------------------------------------


class Touch:
    """Pickles to a call of os.system that would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class LoadWithNumpy(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return np.load, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that a pickle would make if any of it ran."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Touch, f"{os.system.__module__}.system"), (Evaluate, ".eval"), (LoadWithNumpy, "numpy.load")],
)
def test_a_call_is_refused_by_name_and_not_made(
    kind: type[Touch], name: str, protocol: int, marker: Path, tmp_path: Path
) -> None:
    file = write_bytes(tmp_path / "evil.pkl.gz", pickle.dumps(kind(marker), protocol))
    refusal(file, "the pickle asks for", name)


def test_a_call_hidden_behind_a_valid_split_is_not_made(marker: Path, tmp_path: Path) -> None:
    train, _, test = floats(MADE)
    for place, content in enumerate(
        [
            (train, Touch(marker), test),
            (train, (train[0], Touch(marker)), test),
            [[[Touch(marker)]]],
        ]
    ):
        file = write_bytes(tmp_path / f"{place}.pkl", pickle.dumps(content))
        refusal(file, f"{os.system.__module__}.system")


def test_the_global_os_system_is_named_as_such(marker: Path, tmp_path: Path) -> None:
    program = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    refusal(write_bytes(tmp_path / "evil.pkl", program), "os.system")
    refusal(write_bytes(tmp_path / "evil.pkl.gz", b"\x80\x02" + program), "os.system")


REFUSED_PROGRAMS = {
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cnumpy\ndtype\nU\x02f4o.",
    "NEWOBJ": b"cnumpy\ndtype\n)\x81.",
    "NEWOBJ_EX": b"cnumpy\ndtype\n))\x92.",
    "EXT1": b"\x82\xf0.",
    "PERSID": b"Pmodel\n.",
    "EMPTY_DICT": b"}.",
    "EMPTY_SET": b"\x8f.",
    "the pickle modifies something other": b"cnumpy\ndtype\n(NU\x01xtb.",
    "in the encoding rot13": b"c_codecs\nencode\n(U\x01xX\x05\x00\x00\x00rot13tR.",
    "in the encoding zip": b"c_codecs\nencode\n(U\x01xX\x03\x00\x00\x00ziptR.",
    "numpy.dtype.__class__": b"\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
    "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n.",
    "numpy.core.multiarray._reconstruct.__globals__": (
        b"\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93."
    ),
    "an array of O": b"cnumpy\ndtype\n(U\x01OK\x00K\x01tR.",
    "an array of U8": b"cnumpy\ndtype\n(U\x02U8K\x00K\x01tR.",
    "an array of records": b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<N]NNtb.",
    "byte order ?": b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01?NNNtb.",
    "\\x1b[31m": b"\x8c\x02os\x8c\x05\x1b[31m\x93.",
    "os.a\\nb": b"\x8c\x02os\x8c\x03a\nb\x93.",
    "more than the": b"\x8e" + struct.pack("<Q", 1 << 40),
    "bytes that a data set can need": b"\x96" + struct.pack("<Q", 1 << 40),
    "more instructions": b"N" * 20_000,
    "unknown instruction 0xff": b"\xff",
    "cut short": b"cnumpy\ndtype\n",
}


@pytest.mark.parametrize(("words", "program"), REFUSED_PROGRAMS.items(), ids=REFUSED_PROGRAMS)
def test_instructions_that_no_array_needs_are_refused(
    words: str, program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python would look this one up without asking find_class.
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)  # type: ignore[attr-defined]
    refusal(write_bytes(tmp_path / "evil.pkl", b"\x80\x04" + program), words)


def test_a_far_memo_index_takes_no_memory(tmp_path: Path) -> None:
    # In the standard library's reader in C this one instruction clears 64 GB.
    program = b"\x80\x02K\x00r\xff\xff\xff\xff."
    refusal(write_bytes(tmp_path / "evil.pkl", program), "three splits")


def test_a_pickle_cannot_multiply_its_bytes_by_encoding_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_dist.data.streams.LIMIT", 8 << 20)
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x00"
    call = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    program = b"\x80\x02" + text + call * 20
    refusal(write_bytes(tmp_path / "evil.pkl", program), "more than the 8,388,608 bytes")


# --- Pickles that are something else ---------------------------------------------------------


def arrays(change: Callable[[np.ndarray, np.ndarray], Any]) -> bytes:
    train, validation, test = floats(MADE)
    return pickle.dumps((train, change(*validation), test))


WRONG_PICKLES = {
    "four splits": (pickle.dumps(floats(MADE) + floats(MADE)[:1]), "three splits"),
    "no splits": (pickle.dumps(None), "three splits"),
    "bare images": (arrays(lambda x, y: x), "three splits"),
    "lists": (arrays(lambda x, y: ([1], [1])), "(images, labels) arrays"),
    "pixels of byte/255": (arrays(lambda x, y: (x * 256 / 255, y)), "they are byte/255; multiply"),
    "pixels above 255/256": (arrays(lambda x, y: (x + 1, y)), "not byte/256"),
    "negative pixels": (arrays(lambda x, y: (-x, y)), "not byte/256"),
    "pixels that are no number": (arrays(lambda x, y: (x * np.nan, y)), "not byte/256"),
    "infinite pixels": (arrays(lambda x, y: (x + np.inf, y)), "not byte/256"),
    "pixels too large to scale": (arrays(lambda x, y: (x + 3e38, y)), "not byte/256"),
    "a pixel": (arrays(lambda x, y: (x[0, 0], y)), "asks for numpy"),
    "small images": (arrays(lambda x, y: (x[:, :100], y)), "shape (10, 100)"),
    "labels of 10": (arrays(lambda x, y: (x, y * 0 + 10)), "from 10 to 10, not 0 to 9"),
    "labels of -1": (arrays(lambda x, y: (x, y * 0 - 1)), "from -1 to -1, not 0 to 9"),
    "labels with fractions": (arrays(lambda x, y: (x, y * 0.9)), "labels are float64 with"),
    "one-hot labels": (arrays(lambda x, y: (x, np.eye(10, dtype=int)[y])), "not integers (N,)"),
    "fewer labels": (arrays(lambda x, y: (x, y[1:])), "10 images but 9 labels"),
    "fewer images": (arrays(lambda x, y: (x[1:], y)), "9 images but 10 labels"),
    "no samples": (arrays(lambda x, y: (x[:0], y[:0])), "shape (0, 784)"),
    "objects": (arrays(lambda x, y: (x.astype(object), y)), "array of O"),
    "strings": (arrays(lambda x, y: (x, y.astype(str))), "array of U"),
    "cut short": (pickled(MADE)[:-1000], "cut short"),
    "empty program": (b"\x80\x04", "cut short"),
    "followed by more": (pickled(MADE) + b"more", "continues after the end"),
}


@pytest.mark.parametrize(("content", "words"), WRONG_PICKLES.values(), ids=WRONG_PICKLES.keys())
def test_a_pickle_of_something_else_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    refusal(write_bytes(tmp_path / "wrong.pkl.gz", content), words)


def test_an_array_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    honest = pickled(MADE, 2)
    assert honest.count(b"K\x32M\x10\x03\x86") == 1
    lying = honest.replace(b"K\x32M\x10\x03\x86", b"K\x33M\x10\x03\x86")
    refusal(write_bytes(tmp_path / "lying.pkl", lying), "(51, 784) in 156,800 bytes")


# --- gzip, IDX, npz --------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [3, 20, 1000, -9, -4, -1])
def test_a_truncated_gzip_is_refused(kept: int, tmp_path: Path) -> None:
    file = write_pickle(tmp_path / "mnist.pkl.gz", MADE)
    file.write_bytes(file.read_bytes()[:kept])
    refusal(file)


def test_a_gzip_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    file = write_pickle(tmp_path / "mnist.pkl.gz", MADE)
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    refusal(file, "CRC")


IMAGES = MADE.train[0]


def little_endian(content: bytes, rank: int) -> bytes:
    """An IDX file whose sizes are in the wrong byte order."""
    sizes = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return content[:4] + struct.pack(f"<{rank}I", *sizes) + content[4 + 4 * rank :]


WRONG_IDX = {
    "of sizes in the wrong order": (
        "train-images-idx3-ubyte",
        little_endian(idx_bytes(IMAGES), 3),
        "has its sizes in the wrong byte order; write its numbers big-endian",
    ),
    "of a magic number in the wrong order": (
        "t10k-labels-idx1-ubyte",
        b"\1\x08\0\0" + idx_bytes(MADE.test[1])[4:],
        "is an IDX file in the wrong byte order; write its numbers big-endian",
    ),
    "of images of the other set's labels": (
        "t10k-labels-idx1-ubyte",
        idx_bytes(MADE.test[0]),
        "00000803, expected 00000801 for this IDX file; name each of the four files after",
    ),
    "of labels": ("train-images-idx3-ubyte", idx_bytes(MADE.train[1]), "00000801"),
    "of random bytes": ("t10k-images-idx3-ubyte", b"hello world", "68656c6c"),
    "empty": ("train-labels-idx1-ubyte", b"", "cut short"),
    "a header": ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:10], "cut short"),
    "short": ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:-1], "47,040 bytes expected, 47,039"),
    "long": ("t10k-labels-idx1-ubyte", idx_bytes(MADE.test[1]) + b"\0", "continues after"),
    "without images": ("train-images-idx3-ubyte", idx_bytes(IMAGES[:0]), "no samples"),
    "of 27 x 28": ("train-images-idx3-ubyte", idx_bytes(IMAGES[:, 1:]), "shape (60, 27, 28)"),
    "of a claimed 3 TB": (
        "train-images-idx3-ubyte",
        struct.pack(">4B3I", 0, 0, 8, 3, 0xFFFFFFFF, 28, 28),
        "more than the",
    ),
}


@pytest.mark.parametrize(("name", "content", "words"), WRONG_IDX.values(), ids=WRONG_IDX.keys())
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_that_is_not_what_its_name_says_is_refused(
    name: str, content: bytes, words: str, suffix: str, tmp_path: Path
) -> None:
    directory = write_idx(tmp_path / "idx", MADE, suffix)
    write_bytes(directory / (name + suffix), content)
    refusal(directory, name + suffix, words)


def test_idx_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    directory = write_idx(tmp_path / "idx", MADE)
    write_bytes(directory / "train-labels-idx1-ubyte", idx_bytes(MADE.train[1][:-1]))
    refusal(directory, "60 images but 59 labels")
    write_bytes(directory / "train-labels-idx1-ubyte", idx_bytes(MADE.train[1] + 1))
    refusal(directory, "labels run from 1 to 10")


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    directory = write_idx(tmp_path / "idx", MADE, ".gz")
    (directory / "t10k-labels-idx1-ubyte.gz").unlink()
    refusal(directory, "t10k-labels-idx1-ubyte (or t10k-labels-idx1-ubyte.gz) is missing")


def test_too_few_images_to_hold_out_a_sixth_are_refused(tmp_path: Path) -> None:
    refusal(write_idx(tmp_path / "idx", blank(train=5)), "5 samples, too few")


WRONG_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "normalized floats": ({"x_train": IMAGES / np.float32(128) - 1}, "they run from -1 to 0.99"),
    "integers above 255": ({"x_train": IMAGES.astype("i4") + 1}, "they run from 1 to 256"),
    "truth values": ({"x_train": IMAGES > 0}, "holds bool, not numbers"),
    "objects": ({"y_train": MADE.train[1].astype(object)}, "holds object"),
    "strings": ({"y_test": MADE.test[1].astype(str)}, "not numbers"),
    "records": ({"y_test": np.zeros(10, "u1,u1")}, "not numbers"),
    "no samples": ({"x_test": IMAGES[:0]}, "shape (0, 28, 28)"),
    "one image": ({"x_test": IMAGES[0]}, "shape (28, 28)"),
    "a number": ({"x_test": np.uint8(3)}, "shape ()"),
    "labels of 200": ({"y_test": MADE.test[1] + np.uint8(200)}, "not 0 to 9"),
    "one-hot labels": ({"y_test": np.eye(10, dtype="u1")}, "are one-hot (10, 10)"),
    "letters": ({"y_train": np.arange(60) % 26 + 1}, "run from 1 to 26, not 0 to 9: they are let"),
    "labels in the wrong order": (
        {"y_train": MADE.train[1].astype(">i4").view("<i4")},
        "they are in the wrong byte order",
    ),
    "pixels in the wrong order": (
        {"x_test": MADE.test[0].astype(">i2").view("<i2")},
        "they are in the wrong byte order; call images.byteswap()",
    ),
    "samples last": ({"x_test": MADE.test[0].transpose(1, 2, 0)}, "move its last axis"),
    "colour": ({"x_test": MADE.test[0][..., None].repeat(3, 3)}, "convert the images to grey"),
    "larger images": ({"x_test": np.zeros((10, 32, 32), "u1")}, "bring the images to 28 x 28"),
    "ink of 1": ({"x_train": IMAGES // 128}, "no pixel above 1: they are binarized, or divided"),
    "ink of 1.0": ({"x_train": IMAGES // 128 * 1.0}, "no pixel above 1: they are binarized"),
    "fewer labels": ({"y_test": MADE.test[1][1:]}, "10 images but 9 labels"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG_NPZ.values(), ids=WRONG_NPZ.keys())
def test_an_npz_of_something_else_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    refusal(write_npz(tmp_path / "wrong.npz", MADE, **changed), words)


def test_an_npz_without_keras_names_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x_train=IMAGES, images=IMAGES)
    refusal(tmp_path / "other.npz", "lacks y_train, x_test, y_test", "x_train.npy, images.npy")


def test_a_truncated_npz_is_refused(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "short.npz", MADE)
    file.write_bytes(file.read_bytes()[:-100])
    refusal(file, "is damaged: a zip file that is cut short")


def test_an_npy_header_that_claims_more_than_the_zip_holds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lying.npz"
    np.savez(file, x_train=IMAGES, y_train=IMAGES, x_test=IMAGES, y_test=IMAGES)
    file.write_bytes(file.read_bytes().replace(b"(60, 28, 28), }", b"(60, 28,928), }"))
    refusal(file, "shape (60, 28, 928) has 47,040 bytes")


# --- Paths -----------------------------------------------------------------------------------


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere.pkl.gz", "no such file or directory", "--data")


@pytest.mark.parametrize("name", ["random", "random.bin", "random.pkl", "random.pkl.gz"])
def test_a_random_file_is_refused(name: str, tmp_path: Path) -> None:
    refusal(write_bytes(tmp_path / name, np.random.default_rng(0).bytes(10_000)))
    refusal(write_bytes(tmp_path / name, b"<!DOCTYPE html><p>404"))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    refusal(write_bytes(tmp_path / "empty.pkl.gz", b""), "is empty")
    refusal(write_bytes(tmp_path / "empty.npz", b""), "is empty")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "no IDX files")


def test_a_directory_with_a_pickle_says_what_to_pass_instead(tmp_path: Path) -> None:
    file = write_pickle(tmp_path / "home" / "mnist.pkl.gz", MADE)
    refusal(file.parent, f"pass --data {file}")


# The first bytes of what people pass by mistake, what it is called, and what helps.
OTHER_FILES: dict[str, tuple[bytes, str, str]] = {
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11490434\n",
        "is a Git LFS pointer",
        "run `git lfs pull`",
    ),
    "an HTML page": (b"\n <!DOCTYPE HTML>\n<html>", "is an HTML page", "by its direct link"),
    "an HTML page with a mark": (b"\xef\xbb\xbf<html lang='en'>", "is an HTML page", "direct link"),
    "an error of an object store": (b"<?xml version='1.0'?><Error>", "an XML doc", "direct link"),
    "an answer of an API": (b'{"message": "Not Found"}', "is JSON", "by its direct link"),
    "gzip in gzip": (gzip.compress(pickled(MADE)), "gzip in gzip", "with gunzip"),
    "a tar archive": (b"mnist/".ljust(257, b"\0") + b"ustar\x0000", "a tar archive", "unpack it"),
    "xz": (b"\xfd7zXZ\0\0\4", "is an xz file", "unpack it"),
    "bzip2": (b"BZh91AY&SY", "is a bzip2 file", "unpack it"),
    "a .npy": (b"\x93NUMPY\1\0v\0{'descr'", "is a single NumPy array", "numpy.savez"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file", "numpy.savez"),
    "MATLAB": (b"MATLAB 5.0 MAT-file, Platform: GLNX", "is a MATLAB file", "numpy.savez"),
    "Parquet": (b"PAR1\x15\4", "is a Parquet file", "numpy.savez"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image", "numpy.savez"),
    "zeros": (bytes(2000), "starts with zeros", "copy or download it again"),
}


@pytest.mark.parametrize(("content", "kind", "remedy"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_another_kind_of_file_is_called_what_it_is_wherever_it_is_met(
    content: bytes, kind: str, remedy: str, tmp_path: Path
) -> None:
    for name in ("mnist.pkl.gz", "mnist.pkl", "mnist.npz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if "gzip in" in kind else content)
        refusal(tmp_path / name, kind, remedy)
    directory = write_idx(tmp_path / "idx", MADE)
    file = write_bytes(directory / "train-labels-idx1-ubyte.gz", content)
    (directory / "train-labels-idx1-ubyte").unlink()
    assert str(file) in refusal(directory, kind, remedy)


def test_a_text_file_is_called_so(tmp_path: Path) -> None:
    file = write_bytes(tmp_path / "train.csv", b"label,pixel0,pixel1\r\n5,0,0\r\n")
    refusal(file, "is a text file", "numpy.savez")


def test_a_file_of_pytorch_is_called_so(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "training.pt")
    refusal(tmp_path / "training.pt", "is a PyTorch file", "numpy.savez")


def test_one_idx_file_says_to_pass_the_directory(tmp_path: Path) -> None:
    file = write_idx(tmp_path / "idx", MADE, ".gz") / "t10k-images-idx3-ubyte.gz"
    refusal(file, "pass the directory")


def test_a_directory_with_several_data_sets_asks_for_one(tmp_path: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        write_idx(tmp_path / "sets" / name / "raw", MADE)
    refusal(tmp_path / "sets", "KMNIST/raw", "MNIST/raw", "pass one of them")


def test_a_device_or_a_pipe_is_refused_without_reading_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "Not a regular file but a FIFO")
    refusal(Path("/dev/zero"), "Not a regular file but a device")


def test_a_path_that_cannot_be_a_path_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / ("x" * 5000))
    write_bytes(tmp_path / "file", b"")
    refusal(tmp_path / "file" / "below")
    refusal(Path("~nobody-of-this-name/mnist.npz"))
    with pytest.raises(DataError, match=r"a\\x00b: "):
        read("a\0b")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refusal(tmp_path / "loop")


def test_a_newline_in_a_path_does_not_break_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "new\nline")
    assert_one_line(caught.value, "new\\nline")


def test_a_path_that_may_not_be_read_is_refused() -> None:
    with unprivileged() as home:
        file = write_pickle(home / "mnist.pkl.gz", MADE)
        file.chmod(0)
        refusal(file, "cannot be read: Permission denied")
        directory = write_idx(home / "idx", MADE)
        directory.chmod(0)
        refusal(directory, "Permission denied")
        directory.chmod(0o755)


def test_an_error_survives_the_way_to_another_process() -> None:
    error = DataError("a.pkl: is bad", "mend it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a.pkl: is bad; mend it"
