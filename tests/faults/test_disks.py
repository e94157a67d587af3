"""Contract C4's bad days: a disk that is full, cannot be written, or loses the run's directory."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import run_job

from benchmarks.live_job import LiveJob

FLAGS = ["--data=bundled", "--train-samples=400", "--lr=0.05"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a run, but not for many checkpoints."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*.pt"))


def test_a_full_disk_is_a_warning_then_a_clear_end_and_older_checkpoints_are_intact(
    small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    (first,) = run_job(tmp_path, 1, f"--run-dir={run}", *FLAGS, "--epochs=2")
    assert first.code == 0, first.err
    before = checkpoints(run)
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 100_000))
    flags = [f"--run-dir={run}", *FLAGS, "--epochs=4"]
    ended, second = run_job(tmp_path, 2, *flags)
    assert (ended.code, second.code) == (1, 1)
    assert "No space left on device" in ended.err
    assert "training goes on" in ended.err
    assert "Traceback" not in ended.err
    assert set(before) <= set(checkpoints(run))
    for path in before:
        torch.load(path, weights_only=True)
    files = list((run / "checkpoints").iterdir())
    assert [p.name for p in files if p.name.startswith(".")] == []
    assert {p.stem for p in files if p.suffix == ".json"} == {p.stem for p in files} - {""}
    filler.unlink()
    (again,) = run_job(tmp_path, 1, *flags)
    assert again.code == 0, again.err
    assert json.loads((run / "status.json").read_text())["status"] == "completed"


def test_a_read_only_run_directory_is_refused_and_unharmed(
    small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    (first,) = run_job(tmp_path, 1, f"--run-dir={run}", *FLAGS, "--epochs=1")
    assert first.code == 0, first.err
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for ended in run_job(tmp_path, 2, f"--run-dir={run}", *FLAGS, "--epochs=2"):
        assert ended.code == 2
    (line,) = run_job(tmp_path, 1, f"--run-dir={run}", *FLAGS, "--epochs=2")[0].err.splitlines()
    assert "--run-dir" in line
    assert "Read-only file system" in line


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_directory_deleted_while_training_is_made_anew(
    processes: int, tmp_path: Path
) -> None:
    """At this rate every epoch is better than the one before: best.pt comes again."""
    with LiveJob(tmp_path, processes, "--data=bundled", "--epochs=20") as job:
        job.until_training()
        delete(job.run)
        assert job.wait(timeout=60) == 0, job.output
        assert 'train_ddp.py", line' not in job.output, "no traceback through our code"
        assert job.status["status"] == "completed"
        newest = checkpoints(job.run)[-1]
        assert torch.load(newest, weights_only=True)["epoch"] == 20


def test_a_deleted_best_checkpoint_that_no_epoch_replaces_is_named_in_the_end(
    tmp_path: Path,
) -> None:
    """At this rate the first epoch stays the best one."""
    with LiveJob(tmp_path, 1, "--data=bundled", "--epochs=80", "--lr=1e-30") as job:
        job.until(lambda: (job.run / "checkpoints" / "best.pt").exists())
        delete(job.run)
        assert job.wait(timeout=60) == 2, job.output
        (line,) = [line for line in job.output.splitlines() if "mnist-dist: error" in line]
        assert "best.pt" in line
        assert 'train_ddp.py", line' not in job.output, "no traceback through our code"
        newest = checkpoints(job.run)[-1]
        assert torch.load(newest, weights_only=True)["epoch"] == 80


def delete(run: Path) -> None:
    """Remove it from under a job that goes on writing there."""
    moved = run.with_name("gone")
    run.rename(moved)
    shutil.rmtree(moved)
