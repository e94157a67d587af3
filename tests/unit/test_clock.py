"""An epoch that was stopped after its last step has nothing left to be timed."""

import pytest

from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import join
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD
from mnist_dist.run.clock import EpochClock
from mnist_dist.run.console import Console, Course
from mnist_dist.sampling import Sharding
from mnist_dist.steps import Choice, build_step


@pytest.mark.parametrize(("first", "timed"), [(0, True), (6, True), (7, False)])
def test_only_an_epoch_with_steps_left_has_a_speed(first: int, timed: bool) -> None:
    """Its last batch is not full, so that samples counted by batches would be fewer than none."""
    sharding = Sharding(50, 8, 0, 1, seed=0)
    model = MLP()
    with join(Launch("none"), "cpu", "auto") as world:
        step = build_step(model, FlatSGD(model, 0.1, 0, 0), world, Choice())
        figures = EpochClock(step, sharding, first).figures()
    assert bool(figures) == timed
    assert all(value > 0 for value in figures.values())


def test_an_epoch_without_a_speed_is_said_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"train/loss": 0.5, "val/loss": 0.4, "val/accuracy": 0.9}
    with Console(speaks=True).progress(Course(2, 7, 50, 1, done=7)) as progress:
        progress.epoch(1, 7, figures, best=False)
    said = capsys.readouterr().out
    assert "epoch 1/2  step 7  train loss 0.5000  val loss 0.4000, 90.00%  " in said
    assert "samples/s" not in said
