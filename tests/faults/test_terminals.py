"""A terminal that goes away: SIGHUP saves and stops, except under nohup, where the job goes on."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import ROOT

SCRIPT = str(ROOT / "train_ddp.py")
# Far longer than a test: nothing but a stop ends it.
LONG = ["--data=bundled", "--epochs=50000", "--checkpoint-every-epochs=50000"]
LONG += ["--tensorboard=minimal", "--run-dir=run"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", SCRIPT]


def status(directory: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads((directory / "run" / "status.json").read_text())
        return content
    return {}


def until_training(job: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait until an epoch is done, and so signals are handled."""
    metrics, deadline = directory / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_terminal_that_is_closed_stops_the_job_with_its_state_saved(tmp_path: Path) -> None:
    """Whatever is printed after that is an error (EIO), not only the last lines."""
    master, terminal = pty.openpty()
    job = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, SCRIPT, *LONG],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        os.set_blocking(master, False)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            with contextlib.suppress(BlockingIOError):
                os.read(master, 1 << 16)
            assert job.poll() is None
            time.sleep(0.02)
        os.close(master)
        assert job.wait(60) == 75
    finally:
        job.kill()
        job.wait()
    ended = status(tmp_path)
    assert ended["status"] == "preempted"
    assert "SIGHUP" in ended["reason"]
    assert ended["saved_step"] == ended["step"]


def stop_and_continue(job: subprocess.Popen[bytes]) -> None:
    """Stop torchrun and all of its ranks for a while, as Ctrl-Z does."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 2
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in (job.pid, *map(int, children)):
            os.kill(pid, number)
        time.sleep(3)


def test_a_stopped_job_goes_on_and_a_hangup_of_torchrun_saves_even_under_nohup(
    tmp_path: Path,
) -> None:
    words = ["nohup", sys.executable, *TORCHRUN, *LONG]
    log = (tmp_path / "log").open("wb")
    job = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until_training(job, tmp_path)
        stop_and_continue(job)
        job.send_signal(signal.SIGHUP)
        assert job.wait(60) == 1, "torchrun's own exit code"
    finally:
        job.kill()
        job.wait()
    assert status(tmp_path)["status"] == "preempted", (tmp_path / "log").read_text()
    assert "stopped: SIGHUP at step" in (tmp_path / "log").read_text()


def test_the_launch_script_goes_on_under_nohup(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("wb")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = subprocess.Popen(
        ["nohup", str(ROOT / "launch" / "local.sh"), *LONG],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PROCESSES": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    try:
        until_training(job, tmp_path)
        job.send_signal(signal.SIGHUP)
        time.sleep(2)
        assert job.poll() is None, (tmp_path / "log").read_text()
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 1, "torchrun's own exit code"
    finally:
        job.kill()
        job.wait()
    assert "SIGTERM" in status(tmp_path)["reason"]
