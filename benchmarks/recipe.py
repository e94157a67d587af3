"""Measure what `--recipe tuned` reaches over several seeds, and when it reaches 98 %.

python -m benchmarks.recipe --seeds 5

The job reports loss and accuracy. The time comes from a separate loop in this process that
evaluates the test split after each epoch: seconds of training until the accuracy first reaches
--target, evaluation excluded.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DistributedSampler

from benchmarks.jobs import train
from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.data import find_data, load
from mnist_dist.distributed.devices import set_threads
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.evaluation import evaluate
from mnist_dist.model import build_model
from mnist_dist.optimizer import build_optimizer
from mnist_dist.sampling import Sharding, global_batches
from train_ddp import train_step


def training_until(target: float, config: TrainConfig) -> tuple[float, float]:
    """Return epochs, and seconds of training, until the test accuracy is `target`; nan if never."""
    seconds = 0.0
    with init_distributed(Launch("none"), config.device, config.backend) as world:
        set_threads(world.launch, config.global_batch_size)
        dataset = load(find_data(config.data, config.cache_dir)).to(world.device)
        sharding = Sharding(len(dataset.train), config.global_batch_size, 0, 1)
        torch.manual_seed(config.seed)
        model, steps = build_model(), config.epochs * sharding.steps_per_epoch
        optimizer, scheduler = build_optimizer(
            model, config.lr, config.momentum, config.weight_decay, config.schedule, steps
        )
        sampler = DistributedSampler[int](dataset.train, 1, 0, seed=config.seed)
        for epoch in range(config.epochs):
            sampler.set_epoch(epoch)
            started = time.perf_counter()
            for images, labels, size in global_batches(
                dataset.train, sampler, sharding, max_shift=config.random_shift
            ):
                train_step(model, optimizer, images, labels, torch.tensor(1 / size))
                if scheduler is not None:
                    scheduler.step()
            seconds += time.perf_counter() - started
            if evaluate(model, dataset.test, world).accuracy >= target:
                return epoch + 1, seconds
    return math.nan, math.nan


def main() -> None:
    """Print one row per seed, and the mean."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="auto")
    parser.add_argument("--recipe", default="tuned")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--target", type=float, default=0.98)
    chosen = parser.parse_args()
    print(f"| seed | best val loss | test accuracy | epochs to {chosen.target:.0%} | seconds |")
    print("|---|---|---|---|---|")
    rows = []
    for seed in range(chosen.seeds):
        flags = [f"--data={chosen.data}", f"--recipe={chosen.recipe}", f"--seed={seed}"]
        with tempfile.TemporaryDirectory() as directory:
            *epochs, test = train(Path(directory) / "run", 1, *flags)
        loss = min(epoch["val/loss"] for epoch in epochs)
        count, seconds = training_until(chosen.target, parse_config(flags))
        rows.append((loss, test["test/accuracy"], count, seconds))
        print(_row(str(seed), rows[-1]), flush=True)
    print(_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)]))


def _row(name: str, values: Sequence[float]) -> str:
    loss, accuracy, epochs, seconds = values
    return f"| {name} | {loss:.4f} | {accuracy:.2%} | {epochs:g} | {seconds:.1f} |"


if __name__ == "__main__":
    main()
