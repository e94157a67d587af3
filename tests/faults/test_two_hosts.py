"""Two hosts without a shared disk: two torchrun agents, each in a directory of its own."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import IO

import pytest
from processes import ROOT, free_port, metrics, run_job

FLAGS = ["--data=bundled", "--train-samples=800", "--lr=0.05", "--run-dir=run"]


def agent(directory: Path, port: int, run_id: str, rank: int, *flags: str) -> subprocess.Popen[str]:
    """One host's torchrun, in `directory`."""
    directory.mkdir(exist_ok=True)
    rendezvous = ["--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1"]
    words = [*rendezvous, f"--master-port={port}", f"--rdzv-id={run_id}", "--nproc_per_node=1"]
    script = [str(ROOT / "train_ddp.py"), *FLAGS, *flags]
    log: IO[str] = (directory / "log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, *script],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(first: Path, second: Path, *flags: str) -> None:
    """Train on two hosts, of which the one in `first` has rank 0."""
    port, run_id = free_port(), uuid.uuid4().hex
    jobs = [agent(d, port, run_id, rank, *flags) for rank, d in enumerate((first, second))]
    try:
        for job, directory in zip(jobs, (first, second), strict=True):
            assert job.wait(timeout=100) == 0, (directory / "log").read_text()
    finally:
        for job in jobs:
            if job.poll() is None:
                job.send_signal(signal.SIGKILL)


def val_losses(run: Path) -> list[float]:
    return [r["val/loss"] for r in metrics(run) if "val/loss" in r]


def test_a_resume_takes_the_newest_checkpoint_from_whichever_host_has_it(tmp_path: Path) -> None:
    one, two, whole = tmp_path / "one", tmp_path / "two", tmp_path / "whole"
    whole.mkdir()
    assert [rank.code for rank in run_job(whole, 2, *FLAGS, "--epochs=4")] == [0, 0]
    train(one, two, "--epochs=2")
    assert not (two / "run").exists(), "only rank 0's host writes"
    train(two, one, "--epochs=4")  # the hosts have changed places
    assert "resume at step 26, 2 epochs done" in (two / "log").read_text()
    expected = val_losses(whole / "run")
    assert len(expected) == 4
    assert val_losses(two / "run") == pytest.approx(expected[2:], rel=1e-6)
