"""What an epoch's record costs rank 0: epochs with and without it, interleaved in one process.

python -m benchmarks.records --epochs 25

The record is all that an epoch leaves beside checkpoints: metrics.jsonl, TensorBoard's curves and,
in epochs that have them, its plots and histograms, for which validation also finds the most
confident errors. The console's lines are in it, too.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mnist_dist.data import Dataset, find_data, load
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.world import World, join
from mnist_dist.evaluation import evaluate, train_epoch
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD
from mnist_dist.run.console import Console, Course
from mnist_dist.run.metrics import EpochPlots, MetricsWriter, should_log_plots
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding
from mnist_dist.steps import Choice, build_step

_LEVELS = ("nothing", "minimal", "full")


@dataclass
class Training:
    """One model in training, and where its epochs are recorded."""

    world: World
    dataset: Dataset
    epochs: int
    level: str
    directory: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        model = MLP()
        optimizer = FlatSGD(model, lr=0.01, momentum=0.0, weight_decay=0.0)
        self.state = TrainState(model, optimizer, None, {})
        self.step = build_step(model, optimizer, self.world, Choice())
        self.sharding = Sharding(len(self.dataset.train), 64, 0, 1, seed=0)
        samples, steps = self.sharding.samples, self.sharding.steps_per_epoch
        self.course = Course(self.epochs, steps, samples, 1, done=0)
        self.metrics = MetricsWriter(self.directory, warn=print)
        if self.level != "nothing":
            self.metrics.open(0, {}, {})

    def epoch(self) -> float:
        """Train, validate and record an epoch; the seconds that it took."""
        state, begun = self.state, time.perf_counter()
        number = state.epoch + 1
        drawn = self.level == "full" and should_log_plots(number, self.epochs)
        console = Console(speaks=self.level != "nothing")
        with console.progress(self.course) as progress:
            for loss_sum in train_epoch(self.step, None, self.dataset.train, self.sharding, number):
                state.count_step(loss_sum)
                progress.step(state.step, loss_sum)
            state.settle()
            loss = state.loss_sum / self.sharding.samples
            split = self.dataset.validation
            validation = evaluate(state.model, split, self.world, 16 if drawn else 0)
            best = state.finish_epoch(validation.loss)
            if self.level != "nothing":
                figures = {"train/loss": loss, "val/loss": validation.loss, "lr": 0.01}
                figures |= {"val/accuracy": validation.accuracy, "perf/step_ms": 0.0}
                figures["train/gradient_norm"] = self.step.gradient_norm() or 0.0
                figures["perf/samples_per_second"] = 0.0
                if drawn:
                    wrong = validation.most_confident_errors
                    digits = [(split.images[e.index], "0 predicted as 1\n99%") for e in wrong]
                    plots = EpochPlots("val", validation.confusion, digits, state.model)
                    self.metrics.add_plots(plots, state.step)
                for tag, value in figures.items():
                    self.metrics.add_scalar(tag, value, state.step)
                self.metrics.commit(state.epoch, state.step)
                progress.epoch(state.epoch, state.step, figures, best)
        return time.perf_counter() - begun


def measure(data: str, epochs: int) -> None:
    """Print a row for each level."""
    with join(read_launch({}), "cpu", "auto") as world, tempfile.TemporaryDirectory() as directory:
        dataset = load(find_data(data, None))
        trainings = []
        for level in _LEVELS:
            place = Path(directory) / level
            place.mkdir()
            trainings.append(Training(world, dataset, epochs, level, place))
        seconds: dict[str, list[float]] = {level: [] for level in _LEVELS}
        # Whose turn it is first goes round, so that a drift of the machine's speed cancels.
        for number in range(epochs):
            for training in trainings[number % 3 :] + trainings[: number % 3]:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
                    seconds[training.level].append(training.epoch())
    usual = statistics.median(seconds["nothing"])
    print("| recorded | epochs | median s an epoch | difference | all epochs |")
    print("|---|---|---|---|---|")
    for level in _LEVELS:
        pairs = [a - b for a, b in zip(seconds[level], seconds["nothing"], strict=True)]
        median, difference = statistics.median(seconds[level]), statistics.median(pairs) / usual
        whole = sum(pairs) / sum(seconds["nothing"])
        print(f"| {level} | {epochs} | {median:.3f} | {difference:+.1%} | {whole:+.1%} |")


def main() -> None:
    """Print the table of levels, and how long TensorBoard's writer takes to import."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as of train_ddp.py")
    parser.add_argument("--epochs", type=int, default=25)
    chosen = parser.parse_args()
    measure(chosen.data, chosen.epochs)
    print("\n| import, after torch | ms, the least of 5 |\n|---|---|")
    for module in ("torch.utils.tensorboard", "mnist_dist.run.tensorboard", "mnist_dist.run.plots"):
        program = (
            "import torch, time, mnist_dist; begun = time.perf_counter(); "
            f"import {module}; print(time.perf_counter() - begun)"
        )
        command = [sys.executable, "-c", program]
        times = [float(subprocess.check_output(command)) for _ in range(5)]
        print(f"| `{module}` | {1e3 * min(times):.0f} |")


if __name__ == "__main__":
    main()
