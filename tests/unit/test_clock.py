"""A clock that was set back changes no order: of runs, of checkpoints by the clock."""

import json
import time
from pathlib import Path

import pytest
import torch
from processes import run_ranks

from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.sync import RankSync
from mnist_dist.distributed.world import World
from mnist_dist.run.directory import find_run_directory


def make_run(name: str, status: str) -> None:
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "status.json").write_text(json.dumps({"status": status}))


def test_a_new_run_sorts_after_all_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("20990101-235959_job", "completed")
    make_run("notes", "failed")
    for job_id in ("job", "other", None):
        path = find_run_directory(None, job_id)
        assert path.name.startswith("20990102-000000_")


def test_a_restart_finds_the_newer_of_two_unfinished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("20990101-000000_job", "failed")
    newer = find_run_directory(None, "job2").name.replace("job2", "job")
    make_run(newer, "running")
    make_run("20990301-000000_job_of_another", "running")
    assert find_run_directory(None, "job").name == newer


@pytest.mark.parametrize("name", ["99999999-999999_x", "99991231-235959_x"])
def test_a_name_that_no_later_one_can_follow_is_no_obstacle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(name, "completed")
    assert find_run_directory(None, "job").name.endswith("_job")


def saves_on_a_clock_set_back() -> list[bool]:
    """Whether a checkpoint is due at once, and after its interval by any clock but the wall's."""
    sync = RankSync(World(Launch("none"), torch.device("cpu"), "none"), save_every_seconds=0.2)
    time.time = lambda: 0.0
    due = [sync.exchange().save]
    time.sleep(0.25)
    return [*due, sync.exchange().save]


def test_checkpoints_by_minutes_do_not_follow_the_wall_clock() -> None:
    assert run_ranks(saves_on_a_clock_set_back, 1, timeout=60) == [[False, True]]
