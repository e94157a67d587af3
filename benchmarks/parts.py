"""The parts of an epoch: bare matrix products, steps with and without communication, evaluation.

python -m benchmarks.parts --data ../shared/data/mnist.pkl.gz --world-sizes 1 2 4

The kinds take turns within one run. All but evaluations train an epoch.
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

from benchmarks.stepping import Kind, Stepper
from mnist_dist.data import find_data, load
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.world import World, init_distributed
from mnist_dist.evaluation import evaluate
from mnist_dist.model import MLP
from mnist_dist.sampling import Sharding

_INSIDE = "--inside"
BARE, ALONE, DDP, BACKEND, MANUAL, MANUAL_BACKEND, EVALUATION = (
    "bare matrix products",
    "step without communication",
    "step",
    "step, gradients over gloo",
    "manual step",
    "manual step, gradients over gloo",
    "evaluation",
)


@dataclass(frozen=True)
class Parts:
    """The kinds of one rank."""

    world: World
    sharding: Sharding
    data: str

    def kinds(self) -> dict[str, Callable[[int], object]]:
        """What to time, by name; each is called with the epoch's number."""
        world = self.world
        kinds: dict[str, Callable[[int], object]] = {BARE: self._bare()}
        if world.world_size > 1:
            kinds[ALONE] = self._epoch("ddp", communicate=False)
        kinds[DDP] = self._epoch("ddp")
        kinds[MANUAL] = self._epoch("manual")
        if world.world_size > 1:
            kinds[BACKEND] = self._epoch("ddp", share_memory=False)
            kinds[MANUAL_BACKEND] = self._epoch("manual", share_memory=False)
        validation, model = load(find_data(self.data, None)).validation, MLP()
        kinds[EVALUATION] = lambda _: evaluate(model, validation, world)
        return kinds

    def _bare(self) -> Callable[[int], None]:
        """The matrix products of all steps of an epoch, on numbers that are already there."""
        count = max(1, self.sharding.global_batch_size // self.world.world_size)
        sizes = (784, 128, 256, 10)
        activations = [torch.randn(count, size) for size in sizes]
        weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]

        def epoch(_: int) -> None:
            for _ in range(self.sharding.steps_per_epoch):
                for inputs, weight in zip(activations, weights, strict=False):
                    inputs.mm(weight.t())
                for number in (2, 1, 0):
                    activations[number + 1].t().mm(activations[number])
                    if number:
                        activations[number + 1].mm(weights[number])

        return epoch

    def _epoch(
        self, kind: Kind, share_memory: bool = True, communicate: bool = True
    ) -> Callable[[int], None]:
        train, batch = load(find_data(self.data, None)).train, self.sharding.global_batch_size
        stepper = Stepper(self.world, train, batch, kind, share_memory, communicate)

        def epoch(number: int) -> None:
            for _ in stepper.epoch(number):
                pass

        return epoch


def measure(data: str, batch: int, rounds: int) -> None:
    """Be one rank; rank 0 prints the seconds of every round, by kind."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        samples = len(load(world.once_per_host(lambda: find_data(data, None))).train)
        sharding = Sharding(samples, batch, world.rank, world.world_size)
        kinds = Parts(world, sharding, data).kinds()
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(rounds + 1):
            for name, kind in kinds.items():
                world.barrier()
                started = time.perf_counter()
                kind(number)
                world.barrier()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        if world.is_main_process:
            print(json.dumps(seconds))


def run(data: str, world_size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind at one world size, a number for each round."""
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
    """Lines of the table; the ratio is to the step alone, as communication is judged by."""
    base = statistics.median(seconds.get(ALONE, seconds[DDP]))
    lines = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"| {world_size} | {name} | {middle:.3f} | {spread} | {middle / base:.2f} |")
    return lines


HEADER = "| processes | an epoch's | s | from to | times the step alone |\n|---|---|---|---|---|"


def main() -> None:
    """Print the table, or be one of its ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", default="auto", help="as of train_ddp.py")
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
