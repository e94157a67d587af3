"""What the console shows of an epoch: its speed, and the loss of the steps so far."""

import re

import pytest
import torch

from mnist_dist.model import MLP
from mnist_dist.run import console
from mnist_dist.run.console import Console, EpochTimer, Progress
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
    with Progress(Console(enabled=True), 2, Sharding(50, 8, 0, 1), done=7) as progress:
        progress.epoch(1, 7, metrics, best=False)
    printed = capsys.readouterr().out
    assert "epoch 1/2  step 7  train loss 0.5000  val loss 0.4000, 90.00%\n" in printed, (
        "neither a speed nor the time left"
    )
    assert "samples/s" not in printed


@pytest.mark.parametrize("first", [0, 13])
def test_progress_shows_the_mean_loss_however_unequal_the_local_batches_are(
    first: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks share batches of 4 of 50 samples: rank 0 has two, one, one, two, ..."""
    monkeypatch.setattr(console, "_LINE_EVERY_S", 0.0)
    sharding = Sharding(50, 4, 0, 3)
    samples = [2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1]
    with Progress(Console(enabled=True), 2, sharding, done=first) as progress:
        for step, count in enumerate(samples, start=first + 1):
            progress.update(step, torch.tensor(2.5 * count))
    shown = re.findall(r"loss (\S+)", capsys.readouterr().out)
    assert shown == ["2.5000"] * len(samples)
