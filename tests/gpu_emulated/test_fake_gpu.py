"""Training on fake CUDA tensors: nothing mixes CPU and GPU, and no step waits for the GPU.

`fake_gpu.py` says how; each part of it runs in an interpreter of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import command, completed_run

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed, and not installed"),
    pytest.mark.skipif(
        torch.version.cuda is not None or sys.platform != "linux",
        reason="torch's CPU build for Linux is needed: others have GPU hooks of their own",
    ),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library that makes torch take a GPU for present."""
    built = tmp_path_factory.mktemp("fake-gpu") / "libfakegpu.so"
    include, lib = TORCH / "include", TORCH / "lib"
    words = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{include}"]
    words += [f"-I{include}/torch/csrc/api/include", str(HERE / "fake_gpu.cpp"), "-o", str(built)]
    words += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


def on_fake_gpu(library: Path, part: str, *arguments: str) -> dict[str, Any]:
    """What `part` of fake_gpu.py returned."""
    program = str(HERE / "fake_gpu.py")
    ended = command(HERE, sys.executable, program, str(library), part, *arguments)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_eager_steps_wait_for_nothing_after_the_epochs_indices_are_copied(library: Path) -> None:
    """With a share of a batch, and with an empty one."""
    for found in on_fake_gpu(library, "eager_steps").values():
        assert found["first"] == ["copy from cpu to cuda"]
        assert found["rest"] == []
        assert found["devices"] == ["cuda:0"]


def test_a_graphs_body_waits_for_nothing_and_a_launch_for_its_rates_alone(library: Path) -> None:
    for found in on_fake_gpu(library, "graph_steps").values():
        assert found["operations"] > 100
        assert found["one step"] == []
        assert found["four steps"] == []
        assert found["take"] == ["copy from cpu to cuda"]


def test_reading_back_is_done_at_once(library: Path) -> None:
    """All losses in one read; no read for a checkpoint, which is copied when it is written."""
    found = on_fake_gpu(library, "reading")
    assert found["drain"] == ["tolist"]
    assert found["state_dict"] == []
    assert found["random states"] == [16]
    assert len(found["evaluate"]) <= 4
    assert found["digest"] == ["copy from cuda to cpu"] * found["tensors"]
    assert found["plots"] == ["cpu"]


def test_evaluate_and_predict_use_the_gpu_and_read_their_results_once(
    library: Path, tmp_path: Path
) -> None:
    flags = ["--data=bundled", "--train-samples=1000", "--epochs=1"]
    found = on_fake_gpu(library, "commands", str(completed_run(tmp_path, 1, *flags)))
    data_and_weights = 3 * 2 + 6
    to_gpu, to_cpu = "copy from cpu to cuda", "copy from cuda to cpu"
    assert found["evaluate"] == [to_gpu] * data_and_weights + ["bincount", to_cpu]
    assert found["predict"] == [to_gpu, "item", "tolist"]


def test_nccl_gets_tensors_of_the_gpu_and_gloo_those_of_the_cpu(library: Path) -> None:
    """Each entry names a call and the devices of all its tensors."""
    assert on_fake_gpu(library, "collectives") == {
        "connect": ["all_reduce cuda", "all_gather cpu"],
        "sync": ["all_gather cpu"],
        "sync of an epoch": ["all_gather cpu"],
        "state_dict": ["all_gather cpu"],
        "evaluate": ["all_reduce cpu", "all_gather cpu"],
        "barrier": ["all_reduce cpu"],
        "check_equal": ["all_gather cpu"],
    }
