"""Time the parts of an epoch: matrix products, steps with and without communication, evaluation.

python -m benchmarks.parts --data ../shared/data/mnist.pkl.gz --world-sizes 1 2 4

The parts take turns within one run. All but evaluation take an epoch's steps.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.stepping import Kind, Stepper, Transport
from mnist_dist.data import Dataset, find_data, load
from mnist_dist.distributed.devices import set_threads
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.evaluation import evaluate
from mnist_dist.model import MLP

_INSIDE = "--inside"
HEADER = "| processes | part | s/epoch | range | vs. local step |\n|---|---|---|---|---|"
MATRIX_PRODUCTS, EVALUATION = "matrix products", "evaluation"
LOCAL_STEP, MANUAL_STEP = "local step", "manual step"
STEPS: dict[str, tuple[Kind, Transport]] = {
    LOCAL_STEP: ("local", "none"),
    "DDP step": ("ddp", "shared memory"),
    "DDP step without communication": ("ddp", "none"),
    "DDP step over gloo": ("ddp", "gloo"),
    MANUAL_STEP: ("manual", "shared memory"),
    "manual step without communication": ("manual", "none"),
    "manual step over gloo": ("manual", "gloo"),
}


@dataclass(frozen=True)
class Parts:
    """What one rank times."""

    world: World
    dataset: Dataset
    batch: int
    """Global batch size."""

    def actions(self) -> dict[str, Callable[[int], object]]:
        """Return what to time, by name; each is called with the epoch's number."""
        world, validation, model = self.world, self.dataset.validation, MLP()
        actions: dict[str, Callable[[int], object]] = {MATRIX_PRODUCTS: self._matrix_products()}
        for name in STEPS if world.world_size > 1 else (LOCAL_STEP, MANUAL_STEP):
            stepper = Stepper(world, self.dataset.train, self.batch, *STEPS[name])
            actions[name] = stepper.train_epoch
        actions[EVALUATION] = lambda _: evaluate(model, validation, world)
        return actions

    def _matrix_products(self) -> Callable[[int], None]:
        """Return the matrix products of all steps of an epoch, on random numbers."""
        steps = -(-len(self.dataset.train) // self.batch)
        rows = max(1, self.batch // self.world.world_size)
        sizes = (784, 128, 256, 10)
        activations = [torch.randn(rows, size) for size in sizes]
        weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]

        def epoch(_: int) -> None:
            for _ in range(steps):
                for inputs, weight in zip(activations, weights, strict=False):
                    inputs.mm(weight.t())
                for number in (2, 1, 0):
                    activations[number + 1].t().mm(activations[number])
                    if number:
                        activations[number + 1].mm(weights[number])

        return epoch


def measure(data: str, batch: int, rounds: int) -> None:
    """Run one rank; rank 0 prints the seconds of each part's rounds as JSON."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        set_threads(world.launch, -(-batch // world.world_size))
        dataset = load(world.once_per_host(lambda: find_data(data, None)))
        actions = Parts(world, dataset, batch).actions()
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(rounds + 1):
            for name, action in actions.items():
                world.barrier()
                started = time.perf_counter()
                action(number)
                world.barrier()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        if world.is_main_process:
            print(json.dumps(seconds))


def run(data: str, world_size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each part's rounds at one world size."""
    module = ["-m", "benchmarks.parts", _INSIDE, f"--data={data}", f"--batch={batch}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    launcher = torchrun if world_size > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *module, f"--rounds={rounds}"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    return seconds


def table(world_size: int, seconds: dict[str, list[float]]) -> list[str]:
    """Return the table's lines: median, spread, and the ratio to the local step."""
    base = statistics.median(seconds[LOCAL_STEP])
    lines = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"| {world_size} | {name} | {middle:.3f} | {spread} | {middle / base:.2f} |")
    return lines


def main() -> None:
    """Print the table; with --inside, run one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return measure(chosen.data, chosen.batch, chosen.rounds)
    print(HEADER, flush=True)
    for world_size in chosen.world_sizes:
        seconds = run(chosen.data, world_size, chosen.batch, chosen.rounds)
        print("\n".join(table(world_size, seconds)), flush=True)
    return None


if __name__ == "__main__":
    main()
