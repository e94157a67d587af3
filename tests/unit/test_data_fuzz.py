"""Whatever the bytes are, reading them gives a data set or a `DataError`, and nothing else."""

import pickletools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    assert_one_line,
    blank,
    isolate,
    pickled,
    python2_pickled,
    python2_text_pickled,
    read,
    write_bytes,
    write_idx,
    write_npz,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_dist.data import DataError

# Python's word on an edited text pickle, before ours.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

BLANK = blank()
SETTINGS = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], database=None)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


def loads_or_refuses(data: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        try:
            dataset = read(data, Path(cache))
        except DataError as error:
            assert_one_line(error, str(data))
        else:
            assert all(len(split) == len(split.images) > 0 for split in dataset.splits)


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with some bytes replaced, removed or put in; mostly in its structure."""
    structure = [place for place, byte in enumerate(content) if byte]
    edited = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        anywhere = st.integers(0, len(content) - 1)
        place = draw(st.sampled_from(structure) | anywhere)
        length = draw(st.sampled_from([0, 1, 1, 1, 2, 8]))
        edited[place : place + length] = draw(st.binary(max_size=8))
    return bytes(edited[: draw(st.sampled_from([len(edited)] * 4 + [len(edited) // 2]))])


PICKLES = {
    "protocol 0": pickled(BLANK, 0),
    "protocol 2": pickled(BLANK, 2),
    "protocol 4": pickled(BLANK, 4),
    "protocol 5": pickled(BLANK, 5),
    "Python 2": python2_pickled(BLANK),
    "Python 2, text": python2_text_pickled(BLANK),
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
@SETTINGS
@given(st.data())
def test_an_edited_pickle_loads_or_is_refused(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as home:
        edited = data.draw(edits(content))
        loads_or_refuses(write_bytes(Path(home) / "mnist.pkl", edited))


OPCODES = st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes])
GLOBALS = st.sampled_from(
    [
        b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNtb",
        b"cnumpy.core.multiarray\n_reconstruct\n)R",
        b"cnumpy.core.numeric\n_frombuffer\n",
        b"c_codecs\nencode\n",
        b"cnumpy\nndarray\n",
        b"cos\nsystem\n",
    ]
)


@SETTINGS
@given(st.lists(OPCODES | GLOBALS | st.binary(max_size=9), max_size=40))
def test_a_random_program_is_refused(program: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as home:
        loads_or_refuses(write_bytes(Path(home) / "mnist.pkl", b"\x80\x04" + b"".join(program)))


@SETTINGS
@given(st.data())
def test_an_edited_gzip_loads_or_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as home:
        file = write_bytes(Path(home) / "mnist.pkl.gz", pickled(BLANK))
        file.write_bytes(data.draw(edits(file.read_bytes())))
        loads_or_refuses(file)


@SETTINGS
@given(st.data())
def test_edited_idx_files_load_or_are_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as home:
        directory = write_idx(Path(home), BLANK)
        file = data.draw(st.sampled_from(sorted(directory.iterdir())))
        file.write_bytes(data.draw(edits(file.read_bytes())))
        loads_or_refuses(directory)


@pytest.mark.parametrize("compressed", [False, True])
@SETTINGS
@given(st.data())
def test_an_edited_npz_loads_or_is_refused(compressed: bool, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as home:
        file = write_npz(Path(home) / "mnist.npz", BLANK)
        if not compressed:
            np.savez(file, **np.load(file))
        file.write_bytes(data.draw(edits(file.read_bytes())))
        loads_or_refuses(file)


@SETTINGS
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as home:
        for name in ("mnist", "mnist.pkl", "mnist.pkl.gz", "mnist.npz"):
            loads_or_refuses(write_bytes(Path(home) / name, content))
