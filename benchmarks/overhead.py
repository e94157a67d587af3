"""Time epochs with and without the ranks' syncs and comparison of weights, interleaved.

python -m benchmarks.overhead --world-sizes 1 2 4
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.stepping import Stepper
from mnist_dist.data import find_data, load
from mnist_dist.distributed.devices import set_threads
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.sync import RankSync
from mnist_dist.distributed.world import World

_INSIDE = "--inside"
_BATCH = 64
_PAIRS = {1: 100, 2: 40, 4: 24}


def epoch_seconds(world: World, stepper: Stepper, sync: RankSync, checked: bool) -> float:
    """Return one epoch's training time on this rank, with or without the checks."""
    state = stepper.state
    world.barrier()
    started = time.perf_counter()
    for batch in stepper.batches(epoch=0):
        state.count_steps(stepper.step(*batch))
        sync.count(1)
        if checked and sync.is_due:
            sync.exchange(bad_step=state.drain_losses())
    bad_step = state.drain_losses()
    if checked:
        sync.exchange(bad_step=bad_step, payload=state.local_payload(world))
    else:  # an epoch's loss is summed without checks, too
        world.all_reduce_sum(torch.tensor([state.loss_sum], dtype=torch.float64))
    world.barrier()
    return time.perf_counter() - started


def measure(data: str, pairs: int | None) -> None:
    """Run one rank; rank 0 prints this world size's row."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        set_threads(world.launch, _BATCH // world.world_size)
        split = load(world.once_per_host(lambda: find_data(data, None))).train
        stepper, sync = Stepper(world, split, _BATCH), RankSync(world)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        count = pairs or _PAIRS.get(world.world_size, 10)
        for number in range(count + 1):
            # The order alternates, so that a drift of the machine's speed cancels.
            for checked in (number % 2 == 0, number % 2 != 0):
                taken = epoch_seconds(world, stepper, sync, checked)
                if number:  # the first pair warms up
                    seconds[checked].append(taken)
        if world.is_main_process:
            print(row(world.world_size, stepper.sharding.steps_per_epoch, seconds), flush=True)


def row(world_size: int, steps: int, seconds: dict[bool, list[float]]) -> str:
    """Return the table's line: medians, and median and quartiles of the pairs' differences."""
    on, off = (statistics.median(seconds[checked]) for checked in (True, False))
    pairs = [a / b - 1 for a, b in zip(seconds[True], seconds[False], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    cells = [f"{off:.3f}", f"{on:.3f}", f"{middle:+.1%}", f"{low:+.1%} to {high:+.1%}"]
    return "| " + " | ".join(map(str, [world_size, steps, len(pairs), *cells])) + " |"


def main() -> None:
    """Print one row per world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--pairs", type=int, help="number of pairs of epochs")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return measure(chosen.data, chosen.pairs)
    print("| processes | steps | pairs | s/epoch without | s/epoch with | difference | quartiles |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for world_size in chosen.world_sizes:
        module = ["-m", "benchmarks.overhead", _INSIDE, f"--data={chosen.data}"]
        module += [f"--pairs={chosen.pairs}"] if chosen.pairs else []
        torchrun = [*["-m", "torch.distributed.run"], f"--nproc_per_node={world_size}"]
        launcher = torchrun if world_size > 1 else []
        subprocess.run([sys.executable, *launcher, *module], check=True)
    return None


if __name__ == "__main__":
    main()
