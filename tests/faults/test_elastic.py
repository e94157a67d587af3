"""Elastic torchrun: a host is lost, the rest goes on with fewer processes, a host comes back."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from processes import ROOT, completed_run, free_port, metrics

FLAGS = ["--data=bundled", "--train-samples=2000", "--lr=0.001", "--global-batch-size=4"]
FLAGS += ["--checkpoint-every-steps=50"]


def host(
    directory: Path, port: int, run_id: str, name: str, epochs: int
) -> subprocess.Popen[bytes]:
    """One host's agent with two processes; all share the run directory, as on a cluster."""
    rendezvous = ["--nnodes=1:2", "--nproc_per_node=2", "--max-restarts=5", "--rdzv-backend=c10d"]
    rendezvous += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={run_id}"]
    patience = "last_call_timeout=2,keep_alive_interval=1"
    rendezvous += [f"--rdzv-conf={patience},is_host={int(name == 'first')}"]
    script = [str(ROOT / "train_ddp.py"), *FLAGS, f"--epochs={epochs}", "--run-dir=run"]
    with (directory / f"log-{name}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *rendezvous, *script],
            cwd=directory,
            # Without it torchrun 2.13 cannot take a host in: its own agents wait for each other.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes_now(directory: Path) -> int:
    """The world size that the newest start of the run wrote down."""
    file = directory / "run" / "environment.json"
    return int(json.loads(file.read_text())["world_size"]) if file.exists() else 0


def until(directory: Path, processes: int, timeout: float = 120) -> None:
    """Wait until the job runs on so many processes and has begun to save."""
    deadline = time.monotonic() + timeout
    while processes_now(directory) != processes:
        logs = "".join(log.read_text()[-3000:] for log in directory.glob("log-*"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
    time.sleep(1.5)


def test_a_host_is_lost_and_another_comes_and_the_curve_is_the_same(tmp_path: Path) -> None:
    epochs, port, run_id = 14, free_port(), uuid.uuid4().hex
    jobs = [host(tmp_path, port, run_id, "first", epochs)]
    time.sleep(1)
    try:
        jobs.append(host(tmp_path, port, run_id, "second", epochs))
        until(tmp_path, 4)
        os.killpg(jobs[1].pid, signal.SIGKILL)  # its workers end because their agent is gone
        until(tmp_path, 2)
        jobs.append(host(tmp_path, port, run_id, "third", epochs))
        until(tmp_path, 4)
        codes = [jobs[0].wait(timeout=150), jobs[2].wait(timeout=30)]
        log = (tmp_path / "log-first").read_text()
        assert codes == [0, 0], log + (tmp_path / "log-third").read_text()
        assert log.count("resume at step") == 2
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    alone = completed_run(tmp_path / "alone", 1, *FLAGS, f"--epochs={epochs}")
    ours, expected = metrics(tmp_path / "run"), metrics(alone)
    assert [r["epoch"] for r in ours] == [r["epoch"] for r in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        for tag in ("train/loss", "val/loss", "test/loss"):
            if tag in theirs:
                assert mine[tag] == pytest.approx(theirs[tag], rel=1e-5), (tag, mine["epoch"])
