"""Time epochs with and without their records, interleaved in one process.

python -m benchmarks.records --epochs 25

A record is what rank 0 writes after an epoch, checkpoints excluded: metrics.jsonl, TensorBoard's
scalars, the console's lines and, in epochs that have them, plots and histograms, for which
validation also finds the most confident errors.
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

from benchmarks.stepping import Stepper
from mnist_dist.data import Dataset, find_data, load
from mnist_dist.distributed.devices import set_threads
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.evaluation import evaluate
from mnist_dist.optimizer import gradient_norm
from mnist_dist.run.console import Console, Progress
from mnist_dist.run.metrics import EpochPlots, MetricsWriter, should_log_plots

_BATCH = 64
_LEVELS = ("nothing", "minimal", "full")


@dataclass
class Training:
    """A model in training and where its epochs are recorded."""

    world: World
    dataset: Dataset
    epochs: int
    level: str
    directory: Path

    def __post_init__(self) -> None:
        self.stepper = Stepper(self.world, self.dataset.train, _BATCH)
        self.state, self.sharding = self.stepper.state, self.stepper.sharding
        self.metrics = MetricsWriter(self.directory, warn=print)
        if self.level != "nothing":
            self.metrics.open(0, 0, {}, {})

    def epoch(self) -> float:
        """Train, validate and record an epoch; return the seconds it took."""
        state, started = self.state, time.perf_counter()
        number = state.epoch + 1
        with_plots = self.level == "full" and should_log_plots(number, self.epochs)
        console = Console(enabled=self.level != "nothing")
        with Progress(console, self.epochs, self.sharding, done=0) as progress:
            for batch in self.stepper.batches(number):
                loss_sum = self.stepper.step(*batch)
                state.count_steps(loss_sum)
                progress.update(state.step, loss_sum)
            state.drain_losses()
            loss = state.loss_sum / self.sharding.samples
            split = self.dataset.validation
            validation = evaluate(state.model, split, self.world, 16 if with_plots else 0)
            best = state.finish_epoch(validation.loss)
            if self.level != "nothing":
                metrics = {"train/loss": loss, "val/loss": validation.loss, "lr": 0.01}
                metrics |= {"val/accuracy": validation.accuracy, "perf/step_ms": 0.0}
                metrics["train/gradient_norm"] = gradient_norm(state.model.parameters()) or 0.0
                metrics["perf/samples_per_second"] = 0.0
                if with_plots:
                    wrong = validation.most_confident_errors
                    digits = [(split.images[e.index], "0 predicted as 1\n99%") for e in wrong]
                    plots = EpochPlots("val", validation.confusion, digits, state.model)
                    self.metrics.add_plots(plots, state.step)
                for tag, value in metrics.items():
                    self.metrics.add_scalar(tag, value, state.step)
                self.metrics.commit(state.epoch, state.step)
                progress.epoch(state.epoch, state.step, metrics, best)
        return time.perf_counter() - started


def measure(data: str, epochs: int) -> None:
    """Print a row for each level."""
    with (
        init_distributed(read_launch({}), "cpu", "auto") as world,
        tempfile.TemporaryDirectory() as directory,
    ):
        set_threads(world.launch, _BATCH)
        dataset = load(find_data(data, None))
        trainings = []
        for level in _LEVELS:
            run = Path(directory) / level
            run.mkdir()
            trainings.append(Training(world, dataset, epochs, level, run))
        seconds: dict[str, list[float]] = {level: [] for level in _LEVELS}
        # The order rotates, so that a drift of the machine's speed cancels.
        for number in range(epochs):
            for training in trainings[number % 3 :] + trainings[: number % 3]:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
                    seconds[training.level].append(training.epoch())
    base = statistics.median(seconds["nothing"])
    print("| recorded | epochs | s/epoch | difference | all epochs |")
    print("|---|---|---|---|---|")
    for level in _LEVELS:
        pairs = [a - b for a, b in zip(seconds[level], seconds["nothing"], strict=True)]
        median, difference = statistics.median(seconds[level]), statistics.median(pairs) / base
        whole = sum(pairs) / sum(seconds["nothing"])
        print(f"| {level} | {epochs} | {median:.3f} | {difference:+.1%} | {whole:+.1%} |")


def main() -> None:
    """Print the table of levels, and how long TensorBoard's writer takes to import."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--epochs", type=int, default=25)
    chosen = parser.parse_args()
    measure(chosen.data, chosen.epochs)
    print("\n| import, after torch | ms, minimum of 5 |\n|---|---|")
    for module in ("torch.utils.tensorboard", "mnist_dist.run.tensorboard", "mnist_dist.run.plots"):
        program = (
            "import torch, time, mnist_dist; started = time.perf_counter(); "
            f"import {module}; print(time.perf_counter() - started)"
        )
        command = [sys.executable, "-c", program]
        times = [float(subprocess.check_output(command)) for _ in range(5)]
        print(f"| `{module}` | {1e3 * min(times):.0f} |")


if __name__ == "__main__":
    main()
