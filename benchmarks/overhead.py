"""What the agreed stop and the weights' comparison cost: epochs with and without, interleaved.

python -m benchmarks.overhead --world-sizes 1 2 4
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.data import load, locate
from mnist_dist.engine import train_epoch
from mnist_dist.interruption import Agreement, StopRequest
from mnist_dist.launcher import read_launch
from mnist_dist.model import MLP
from mnist_dist.sharding import Sharding
from mnist_dist.state import TrainState
from mnist_dist.world import World, join

_INSIDE = "--inside"


def epoch_seconds(
    world: World, state: TrainState, model: torch.nn.Module, sharding: Sharding, checked: bool
) -> float:
    """One epoch's training time on this rank, with or without the checks."""
    split = load(locate("bundled", None)).train
    agreement = Agreement(world, StopRequest(), None)
    world.barrier()
    started = time.perf_counter()
    for loss_sum in train_epoch(model, state.optimizer, None, split, sharding, epoch=0):
        state.count_step(loss_sum)
        if checked and agreement.due():
            agreement.compare(state.settle())
    if checked:
        agreement.compare(state.settle())
        world.gather(state.weights_digest())
    state.settle()
    return time.perf_counter() - started


def measure(epochs: int) -> None:
    """Print the ratio of this world size; runs in every rank."""
    with join(read_launch(), "cpu", "auto") as world:
        bare = MLP()
        state = TrainState(bare, torch.optim.SGD(bare.parameters(), lr=0.001), None, {})
        model = DistributedDataParallel(bare) if world.world_size > 1 else bare
        # 782 steps, as an epoch of full MNIST has at the default batch of 64.
        sharding = Sharding(3910, 5, world.rank, world.world_size, seed=0)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * epochs + 2):
            checked = number % 2 == 0
            taken = epoch_seconds(world, state, model, sharding, checked)
            if number >= 2:
                seconds[checked].append(taken)
        on, off = (statistics.median(seconds[checked]) for checked in (True, False))
        if world.is_main:
            print(
                f"| {world.world_size} | {off:.3f} | {on:.3f} | {on / off - 1:+.1%} |", flush=True
            )


def main() -> None:
    """Print one row per world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return measure(chosen.epochs)
    print("| processes | s without | s with | difference |\n|---|---|---|---|", flush=True)
    for world_size in chosen.world_sizes:
        module = ["-m", "benchmarks.overhead", _INSIDE, f"--epochs={chosen.epochs}"]
        torchrun = [*["-m", "torch.distributed.run"], f"--nproc_per_node={world_size}"]
        launcher = torchrun if world_size > 1 else []
        subprocess.run([sys.executable, *launcher, *module], check=True)
    return None


if __name__ == "__main__":
    main()
