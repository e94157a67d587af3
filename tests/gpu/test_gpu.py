"""The same job on GPUs: NCCL, one process per GPU, the CPU's numbers."""

from pathlib import Path

import pytest
import torch
from processes import ROOT, command, metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

FLAGS = ["--data=bundled", "--epochs=3", "--lr=0.05"]
SCRIPT = str(ROOT / "train_ddp.py")


def train(directory: Path, *flags: str, processes: int = 1) -> tuple[list[float], str]:
    """The validation losses of a run, and what it said."""
    directory.mkdir(exist_ok=True)
    launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    ended = command(directory, *launcher, SCRIPT, *FLAGS, "--run-dir=run", *flags)
    assert ended.code == 0, ended.err
    recorded = metrics(directory / "run")
    return [r["val/loss"] for r in recorded if "val/loss" in r], ended.out


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(tmp_path_factory.mktemp("cpu"), "--device=cpu")[0]


@pytest.mark.parametrize(
    ("flags", "way"),
    [
        ([], "autograd"),
    ],
)
def test_gpus_give_the_losses_of_the_cpu(
    flags: list[str], way: str, on_cpu: list[float], tmp_path: Path
) -> None:
    gpus = torch.cuda.device_count()
    losses, said = train(tmp_path, *flags, processes=gpus)
    assert losses == pytest.approx(on_cpu, rel=1e-4)
    assert f"\nstep   {way}, {'gradients over nccl' if gpus > 1 else 'alone'}\n" in said


def test_batches_that_do_not_divide_and_a_schedule_are_the_cpus_too(tmp_path: Path) -> None:
    """Graphs of two sizes, and a rate that is another at every step."""
    flags = ["--global-batch-size=48", "--schedule=onecycle", "--momentum=0.9", "--random-shift=1"]
    gpu, _ = train(tmp_path / "gpu", *flags)
    cpu, _ = train(tmp_path / "cpu", *flags, "--device=cpu")
    assert gpu == pytest.approx(cpu, rel=1e-3)


def test_an_extended_run_ends_in_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "two", "--epochs=1")
    continued, _ = train(tmp_path / "two")
    assert continued == whole


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_lower_precision_learns_nearly_the_same(
    precision: str, on_cpu: list[float], tmp_path: Path
) -> None:
    losses, said = train(tmp_path, f"--precision={precision}")
    assert losses == pytest.approx(on_cpu, rel=0.02)
    assert ("in CUDA graphs" in said) == (precision == "tf32")


def test_more_processes_than_gpus_is_one_line(tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    words = ["torchrun", f"--nproc_per_node={count}", SCRIPT, *FLAGS]
    ended = command(tmp_path, *words)
    (line,) = [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]
    assert f"{count} processes on a host with {count - 1} GPU(s)" in line
