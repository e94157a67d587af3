"""A stop is agreed and saved, a kill loses nothing, and no process is left behind."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import metrics, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.live_job import LiveJob
from mnist_dist.distributed import sync

# Over a second an epoch, which is how often two processes meet, so that faults happen within one.
SAMPLES = 600
SLOW_JOB = Path(__file__).with_name("slow_job.py")
Pick = Callable[[LiveJob], int]


FLAGS = ["--data=bundled", f"--train-samples={SAMPLES}", "--epochs=2", "--lr=0.01"]
FLAGS += ["--global-batch-size=1"]


def slow_job(
    directory: Path,
    processes: int,
    *flags: str,
    torchrun: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> LiveJob:
    flags = (*FLAGS, *flags)
    return LiveJob(
        directory, processes, *flags, torchrun=torchrun, script=SLOW_JOB, environment=environment
    )


def unbroken(directory: Path, processes: int) -> Path:
    directory.mkdir()
    with slow_job(directory, processes) as job:
        assert job.wait() == 0, job.output
        return job.run


def comparable(run: Path) -> list[dict[str, Any]]:
    """What it recorded, but for what the clock says."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("time", "perf/"))}
        for record in metrics(run)
    ]


def final(run: Path) -> dict[str, Any]:
    path = max((run / "checkpoints").glob("step_*.pt"))
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


def assert_same_end(run: Path, other: Path) -> None:
    assert comparable(run) == comparable(other)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("train/loss", "val/loss", "test/loss"):
        shown = [(point.step, point.value) for point in events.Scalars(tag)]
        told = [(record["step"], record[tag]) for record in metrics(run) if tag in record]
        assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in told], tag
    for name, weight in final(other)["model"].items():
        assert torch.equal(final(run)["model"][name], weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs by world size."""
    base = tmp_path_factory.mktemp("whole")
    return {processes: unbroken(base / str(processes), processes) for processes in (1, 2)}


def launcher(job: LiveJob) -> int:
    return job.launcher.pid


def last_rank(job: LiveJob) -> int:
    return job.pid_of(1)


@pytest.mark.parametrize(
    ("processes", "target", "number", "torchrun"),
    [
        (2, launcher, signal.SIGTERM, ()),
        (2, last_rank, signal.SIGTERM, ()),
        (2, launcher, signal.SIGUSR1, ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",)),
        (1, launcher, signal.SIGINT, ()),
        (1, launcher, signal.SIGUSR2, ()),
    ],
    ids=["TERM-torchrun", "TERM-one-rank", "USR1-torchrun", "INT-python", "USR2-python"],
)
def test_a_stop_saves_mid_epoch_and_the_same_command_continues_to_the_same_bits(
    processes: int,
    target: Pick,
    number: signal.Signals,
    torchrun: tuple[str, ...],
    tmp_path: Path,
    whole: dict[int, Path],
) -> None:
    with slow_job(tmp_path, processes, torchrun=torchrun) as job:
        job.until_training()
        time.sleep(0.1)
        os.kill(target(job), number)
        code = job.wait(timeout=10)
        assert code == (1 if processes > 1 else 75), job.output
        assert job.status["status"] == "preempted"
        step = job.status["step"]
        assert SAMPLES < step < 2 * SAMPLES, "within the second epoch"
        assert final(job.run)["step"] == step
        assert f"{number.name} at step {step}, saved" in job.output
        assert job.alive() == {}
    with slow_job(tmp_path, processes) as job:
        assert job.wait() == 0, job.output
        assert f"resume at step {step}, 1 epoch done" in job.output
        assert job.status["status"] == "completed"
        assert_same_end(job.run, whole[processes])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_before_the_first_step_is_saved_after_it(processes: int, tmp_path: Path) -> None:
    with slow_job(tmp_path, processes, environment={"SLOW_START": "2"}) as job:
        job.until(lambda: job.status.get("status") == "running")
        os.kill(launcher(job), signal.SIGTERM)
        assert job.wait() == (1 if processes > 1 else 75), job.output
        assert "SIGTERM at step 1, saved" in job.output
        assert job.status["status"] == "preempted"
        assert final(job.run)["step"] == 1


def test_a_second_request_ends_at_once(tmp_path: Path) -> None:
    """The first one alone would wait for the ranks' agreement: here one of them is stopped."""
    with slow_job(tmp_path, 2) as job:
        job.until_training()
        os.kill(job.pid_of(0), signal.SIGSTOP)
        victim = job.pid_of(1)
        os.kill(victim, signal.SIGTERM)
        time.sleep(2.5)
        assert victim in job.alive(), "a request waits for the others"
        os.kill(victim, signal.SIGTERM)
        job.until(lambda: victim not in job.alive(), timeout=5)
        os.kill(job.pid_of(0), signal.SIGCONT)
        assert job.wait() == 1


@pytest.mark.parametrize("victim", ["one rank", "all ranks"])
def test_a_killed_rank_is_restarted_by_torchrun_and_nothing_is_lost(
    victim: str, tmp_path: Path, whole: dict[int, Path]
) -> None:
    with slow_job(tmp_path, 2, torchrun=("--max-restarts=3",)) as job:
        job.until_training()
        time.sleep(random.uniform(0, 1))
        ranks = [pid for pid, rank in job.alive().items() if rank is not None]
        for pid in ranks if victim == "all ranks" else ranks[-1:]:
            os.kill(pid, signal.SIGKILL)
        assert job.wait() == 0, job.output
        assert_same_end(job.run, whole[2])
        assert job.alive() == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_no_process_outlives_its_launcher_and_a_relaunch_continues(
    number: signal.Signals, tmp_path: Path, whole: dict[int, Path]
) -> None:
    """Torchrun dies of SIGUSR1 by default, without a word to its workers."""
    with slow_job(tmp_path, 2) as job:
        job.until_training()
        held = job.holdings()
        os.kill(job.launcher.pid, number)
        job.launcher.wait()
        assert job.left_over(held, grace=5) == []
        assert "the launcher is gone" in job.output
    if number == signal.SIGUSR1:
        return
    with slow_job(tmp_path, 2) as job:
        assert job.wait() == 0, job.output
        assert_same_end(job.run, whole[2])


def test_the_others_end_by_the_step_timeout_when_a_rank_hangs(tmp_path: Path) -> None:
    with slow_job(tmp_path, 3, "--step-timeout=10") as job:
        job.until_training()
        stopped, held = job.pid_of(1), job.holdings()
        os.kill(stopped, signal.SIGSTOP)
        ranks = {0, 2}
        job.until(lambda: not ranks & set(job.alive().values()), timeout=40)
        assert "rank 1 did not respond" in job.output
        assert "rank 1 did not respond" in job.status["reason"]
        assert job.status["status"] == "failed"
        os.kill(stopped, signal.SIGKILL)  # as torchrun does, half a minute later
        assert job.wait(timeout=30) == 1
        assert job.left_over(held) == []


def test_a_rank_that_never_comes_is_named_within_the_setup_timeout(tmp_path: Path) -> None:
    """Rank 1 is stopped as soon as it exists, long before it could join."""
    with slow_job(tmp_path, 2, "--setup-timeout=8", torchrun=("--shutdown-timeout=2",)) as job:
        job.until(lambda: 1 in job.alive().values())
        stopped = job.pid_of(1)
        os.kill(stopped, signal.SIGSTOP)
        job.until(lambda: "rank 1 of 2 did not reach the rendezvous" in job.output, timeout=30)
        os.kill(stopped, signal.SIGKILL)  # as torchrun would, half a minute later
        assert job.wait(timeout=30) == 1
        assert not job.run.exists()


def stop_in_an_endless_start() -> None:
    sync._START_GRACE_S = 0.2
    request = sync.StopRequest()
    request.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_start_that_does_not_end_ends_when_it_is_asked_to_stop() -> None:
    with pytest.raises(RuntimeError, match=f"died, exit code {128 + signal.SIGTERM}"):
        run_ranks(stop_in_an_endless_start, 1, timeout=60)
