"""Disks that are full, cannot be written, or lose the run's directory."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, run_job, run_main, run_ranks

from benchmarks import run_outcome as outcome
from benchmarks.live_job import LiveJob
from mnist_dist import files
from mnist_dist.run import checkpoint, directory
from mnist_dist.run.directory import read_status

FLAGS = ["--data=bundled", "--train-samples=400", "--lr=0.05"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a run, but not for many checkpoints."""
    with mounted(tmp_path, "size=4m") as disk:
        yield disk


@pytest.fixture
def tiny_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system with inodes for the first files of a run only: ., run, .lock ..."""
    with mounted(tmp_path, "size=4m,nr_inodes=6") as disk:
        yield disk


@contextmanager
def mounted(tmp_path: Path, options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
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
    assert "training continues" in ended.err
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


def deleted(run: Path) -> None:
    run.rename(run.with_name("gone"))  # all at once, from under a job that goes on writing there
    shutil.rmtree(run.with_name("gone"))


def replaced_by_a_copy(run: Path) -> None:
    copy, old = run.with_name("copy"), run.with_name("old")
    subprocess.run(["cp", "-a", str(run), str(copy)], capture_output=True)
    run.rename(old)
    copy.rename(run)
    shutil.rmtree(old)


@pytest.mark.parametrize("change", [deleted, replaced_by_a_copy])
def test_a_job_ends_with_its_reason_once_its_directory_is_no_longer_its_own(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    # Seconds an epoch, so that the change comes between two saves.
    with LiveJob(tmp_path, 1, "--data=bundled", "--epochs=400", "--global-batch-size=1") as job:
        job.until(lambda: bool(job.status.get("saved_step")))
        change(job.run)
        files = contents(job.run)
        assert job.wait(timeout=60) == 1, job.output
        (line,) = [line for line in job.output.splitlines() if "mnist-dist: error" in line]
        assert change.__name__.partition("_")[0] in line
        assert "Traceback" not in job.output
        assert contents(job.run) == files, "not another file is written there"


def test_a_run_moved_while_it_trains_ends_and_is_continued_where_it_is(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    with LiveJob(tmp_path, 2, "--data=bundled", "--train-samples=400", "--epochs=9000") as job:
        job.until(lambda: job.ended or bool(checkpoints(job.run)))
        job.run.rename(moved)
        assert job.wait(timeout=60) == 1, job.output
        (line,) = [line for line in job.output.splitlines() if "mnist-dist: error" in line]
        assert f"it was moved to {moved}" in line
        assert 'train_ddp.py", line' not in job.output, "no traceback through our code"
        assert not job.run.exists(), "the old place is not built again"
    saved = torch.load(checkpoints(moved)[-1], weights_only=True)["epoch"]
    flags = ["--data=bundled", "--train-samples=400", f"--epochs={saved + 1}"]
    (ended,) = run_job(tmp_path, 1, f"--run-dir={moved}", *flags)
    assert ended.code == 0, ended.err
    assert f"{saved} epoch" in ended.out


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_no_free_inode_at_the_start_leaves_nothing_that_a_launcher_would_requeue(
    tiny_inodes: Path, tmp_path: Path
) -> None:
    run = tiny_inodes / "run"
    flags = [f"--run-dir={run}", *FLAGS, "--epochs=2"]
    (ended,) = run_job(tmp_path, 1, *flags)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert "no free inodes" in line
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["resumable"]) == ("failed", False)


def test_a_file_where_the_checkpoints_belong_is_named_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("mine")
    (ended,) = run_job(tmp_path, 1, f"--run-dir={run}", *FLAGS, "--epochs=1")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert f"Not a directory: {run / 'checkpoints'}" in line
    assert (run / "checkpoints").read_text() == "mine"


PLACES = ["metrics.jsonl", "events.out", "best.pt", "best.json", "step_", "status.json"]


class RefusedWrites:
    """A disk that is full at some of the writes to files of one name, counted from 1."""

    def __init__(self, name: str, refused: range) -> None:
        self.name, self.refused, self.writes = name, refused, 0
        self._pwrite, self._write = os.pwrite, files.write_atomically
        patch = pytest.MonkeyPatch()  # not undone: this process runs one job
        patch.setattr(os, "pwrite", self.pwrite)
        for module in (checkpoint, directory):
            patch.setattr(module, "write_atomically", self.write_atomically)

    def pwrite(self, descriptor: int, content: bytes, offset: int) -> int:
        self.require_room(Path(f"/proc/self/fd/{descriptor}").readlink())
        return self._pwrite(descriptor, content, offset)

    def write_atomically(self, path: Path, *arguments: Any) -> None:
        self.require_room(path)
        self._write(path, *arguments)

    def require_room(self, path: Path) -> None:
        if path.name.startswith(self.name):
            self.writes += 1
            if self.writes in self.refused:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))


def train_on_a_disk_full_at(work: str, name: str, refused: range) -> Ended:
    disk = RefusedWrites(name, refused)
    ended = run_main(work, [*outcome.FLAGS, f"--epochs={outcome.EPOCHS}"])
    assert not refused or disk.writes >= refused.start, "it was never full"
    (Path(work).with_suffix(".log")).write_text(ended.out + ended.err)
    return ended


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> outcome.Outcome:
    work = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train_on_a_disk_full_at, 1, str(work), "", range(0))
    return outcome.read_outcome(work / outcome.RUN)[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_for_a_while_changes_no_result(
    place: str, undisturbed: outcome.Outcome, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (ended,) = run_ranks(train_on_a_disk_full_at, 1, str(work), place, range(2, 4))
    assert "No space left on device" in ended.err
    assert outcome.faults_in(work, ended.code, undisturbed) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_to_the_end_is_an_error_and_the_next_start_completes_the_run(
    place: str, undisturbed: outcome.Outcome, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (ended,) = run_ranks(train_on_a_disk_full_at, 1, str(work), place, range(2, 1000))
    assert ended.code == 1
    assert "No space left on device" in ended.err.splitlines()[-1]
    assert read_status(work / outcome.RUN) != "completed"
    (again,) = run_ranks(train_on_a_disk_full_at, 1, str(work), place, range(0))
    assert outcome.faults_in(work, again.code, undisturbed) == []
