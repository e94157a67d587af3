"""An epoch that was stopped after its last step has nothing left to be timed."""

import pytest

from mnist_dist.model import MLP
from mnist_dist.run.console import Console, EpochTimer, RunLength
from mnist_dist.sampling import Sharding


@pytest.mark.parametrize(("first", "timed"), [(0, True), (6, True), (7, False)])
def test_only_an_epoch_with_steps_left_has_a_speed(first: int, timed: bool) -> None:
    """Its last batch is not full, so that samples counted by batches would be fewer than none."""
    timer = EpochTimer(Sharding(50, 8, 0, 1), first, lambda: None)
    metrics = timer.metrics(MLP())
    assert bool(metrics) == timed
    assert all(value > 0 for value in metrics.values())


def test_an_epoch_without_a_speed_is_printed_without_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = {"train/loss": 0.5, "val/loss": 0.4, "val/accuracy": 0.9}
    with Console(enabled=True).progress(RunLength(2, 7, 50, 1, done=7)) as progress:
        progress.epoch(1, 7, metrics, best=False)
    printed = capsys.readouterr().out
    assert "epoch 1/2  step 7  train loss 0.5000  val loss 0.4000, 90.00%  " in printed
    assert "samples/s" not in printed
