"""The same job on GPUs: NCCL, one process per GPU, the CPU's numbers."""

from pathlib import Path

import pytest
import torch
from processes import ROOT, command, metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

FLAGS = ["--data=bundled", "--epochs=3", "--lr=0.05"]


def losses(directory: Path, *words: str) -> list[float]:
    ended = command(directory, *words, str(ROOT / "train_ddp.py"), *FLAGS, "--run-dir=run")
    assert ended.code == 0, ended.err
    return [r["val/loss"] for r in metrics(directory / "run") if "val/loss" in r]


def test_gpus_give_the_losses_of_the_cpu(tmp_path: Path) -> None:
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    gpu.mkdir()
    cpu.mkdir()
    ended = command(
        cpu, "python", str(ROOT / "train_ddp.py"), *FLAGS, "--device=cpu", "--run-dir=run"
    )
    assert ended.code == 0, ended.err
    expected = [r["val/loss"] for r in metrics(cpu / "run") if "val/loss" in r]
    count = torch.cuda.device_count()
    assert losses(gpu, "torchrun", f"--nproc_per_node={count}") == pytest.approx(expected, rel=1e-4)


def test_more_processes_than_gpus_is_one_line(tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    words = ["torchrun", f"--nproc_per_node={count}", str(ROOT / "train_ddp.py"), *FLAGS]
    ended = command(tmp_path, *words)
    (line,) = [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]
    assert f"{count} processes on a host with {count - 1} GPU(s)" in line
