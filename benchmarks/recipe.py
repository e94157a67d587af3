"""What `--recipe tuned` reaches over several seeds, and how soon it is 98 % right.

python -m benchmarks.recipe --seeds 5

The loss and the accuracy are those that the job itself reports. The time comes from a loop of its
own that looks at the test split after every epoch, in one process: seconds of training until the
accuracy first reaches --target, without those of any evaluation.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.jobs import train
from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.data import find_data, load
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import join
from mnist_dist.evaluation import evaluate, train_epoch
from mnist_dist.sampling import Sharding
from mnist_dist.steps import Choice, build_step
from train_ddp import build_state


def training_until(target: float, config: TrainConfig) -> tuple[float, float]:
    """Epochs, and seconds of them, until the test accuracy is `target`; nan if it never is."""
    seconds = 0.0
    with join(Launch("alone"), config.device, config.backend) as world:
        dataset = load(find_data(config.data, config.cache_dir)).to(world.device)
        split = dataset.train
        sharding = Sharding(len(split), config.global_batch_size, 0, 1, config.seed)
        state = build_state(config, dataset, sharding, world.device)
        step = build_step(state.model, state.optimizer, world, Choice())
        for epoch in range(config.epochs):
            started = time.perf_counter()
            for loss_sum in train_epoch(
                step, state.scheduler, split, sharding, epoch, random_shift=config.random_shift
            ):
                state.count_step(loss_sum)
            state.settle()
            seconds += time.perf_counter() - started
            if evaluate(state.model, dataset.test, world).accuracy >= target:
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
            *figures, test = train(Path(directory) / "run", 1, *flags)
        loss = min(epoch["val/loss"] for epoch in figures)
        epochs, seconds = training_until(chosen.target, parse_config(flags))
        rows.append((loss, test["test/accuracy"], epochs, seconds))
        print(_row(str(seed), rows[-1]), flush=True)
    print(_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)]))


def _row(name: str, values: Sequence[float]) -> str:
    loss, accuracy, epochs, seconds = values
    return f"| {name} | {loss:.4f} | {accuracy:.2%} | {epochs:g} | {seconds:.1f} |"


if __name__ == "__main__":
    main()
