"""The whole job by steps.replay_epoch, with GraphSteps that take their steps on the CPU."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, metrics, run_job, run_main, run_ranks

from mnist_dist import steps
from mnist_dist.cuda_graphs import GraphSteps
from mnist_dist.distributed.world import World
from mnist_dist.job import Job

FLAGS = ["--data=bundled", "--train-samples=300", "--global-batch-size=16", "--epochs=3"]
FLAGS += ["--lr=0.05", "--momentum=0.9", "--weight-decay=0.001", "--schedule=onecycle"]
FLAGS += ["--random-shift=1", "--run-dir=run"]


def replay(directory: str, flags: list[str], stop_after: int | None) -> tuple[Ended, list[str]]:
    """Run the job as with --cuda-graphs on GPUs; SIGTERM after so many launches; what was called.

    Capturing is left out, and so is the learning-rate warning that it prevents.
    """
    calls: list[str] = []
    set_timeout, close = World.set_timeout, GraphSteps.close

    def capture(job: Job, state: Any, model: Any, step: Any, sync: Any) -> Any:
        calls.append("capture")

        def launched() -> None:
            calls.append("launch")
            sync.launches.add()
            if calls.count("launch") == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        split, shift = job.dataset.train, job.config.random_shift
        graphs = GraphSteps(
            step, model, state.optimizer, split, job.sharding, shift, 4, launched=launched
        )
        return graphs, ", replayed"

    def noted_set_timeout(self: World, seconds: float) -> None:
        calls.append("set_timeout")
        set_timeout(self, seconds)

    def noted_close(self: GraphSteps) -> None:
        calls.append("close")
        close(self)

    steps._capture = capture
    World.set_timeout = noted_set_timeout  # type: ignore[method-assign]
    GraphSteps.close = noted_close  # type: ignore[method-assign]
    return run_main(directory, flags), calls


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The model of the newest checkpoint."""
    newest = max(run.rglob("step_*.pt"))
    weights: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["model"]
    return weights


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_replayed_run_has_the_metrics_of_an_eager_one(world_size: int, tmp_path: Path) -> None:
    (tmp_path / "eager").mkdir()
    (tmp_path / "replayed").mkdir()
    flags = [*FLAGS, "--checkpoint-every-steps=7"]
    for ended in run_job(tmp_path / "eager", world_size, *flags):
        assert ended.code == 0, ended.err
    for ended, calls in run_ranks(replay, world_size, str(tmp_path / "replayed"), flags, None):
        assert ended.code == 0, ended.err
        # The short timeout of steps starts after the step is built; graphs end before the group.
        assert calls[:2] == ["capture", "set_timeout"]
        assert calls[-1] == "close"
        assert calls.count("launch") < 3 * 19
    eager, replayed = (metrics(tmp_path / name / "run") for name in ("eager", "replayed"))
    assert len(eager) == len(replayed) == 4
    for before, after in zip(eager, replayed, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            if "loss" in name or name == "lr":
                assert after[name] == pytest.approx(before[name], rel=1e-5), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_replayed_run_that_was_stopped_continues_to_the_same_bits(
    world_size: int, tmp_path: Path
) -> None:
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        (tmp_path / name).mkdir()
        for stop_after in stops:
            ranks = run_ranks(replay, world_size, str(tmp_path / name), FLAGS, stop_after)
            for ended, _ in ranks:
                assert ended.code == (0 if stop_after is None else 75), ended.err
    whole, stopped = (last_weights(tmp_path / name / "run") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    losses = [
        [record.get("val/loss") for record in metrics(tmp_path / name / "run")]
        for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]
