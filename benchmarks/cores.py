"""How far apart two cores are, and what a step then costs on one thread and on two.

python -m benchmarks.cores --seconds 60

A virtual machine's cores may be moved: now they share a cache, now they do not. Every second or so
a byte goes to and fro between two processes, each on a core of its own, and steps are taken on one
thread and on two.
"""

import argparse
import mmap
import os
import time

import torch

from benchmarks.parts import step_alone
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD

_ROUNDS = 20_000
_STEPS = 300
_LINE = 64  # bytes: each process writes to a cache line of its own


def round_trip() -> float:
    """Seconds until a byte that was sent to another core is back."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    everything = os.sched_getaffinity(0)
    here, there, *_ = sorted(everything)
    if (child := os.fork()) == 0:
        os.sched_setaffinity(0, {there})
        for number in range(1, _ROUNDS + 1):
            while memory[0] != number % 2:
                pass
            memory[_LINE] = number % 2
        os._exit(0)
    os.sched_setaffinity(0, {here})
    time.sleep(0.05)  # until the other is there
    begun = time.perf_counter()
    for number in range(1, _ROUNDS + 1):
        memory[0] = number % 2
        while memory[_LINE] != number % 2:
            pass
    taken = time.perf_counter() - begun
    os.waitpid(child, 0)
    os.sched_setaffinity(0, everything)
    return taken / _ROUNDS


def seconds_a_step(threads: int) -> float:
    """Of the perceptron by hand, batch 64."""
    torch.set_num_threads(threads)
    model = MLP()
    step = step_alone(model, FlatSGD(model, 0.001, 0, 0))
    pixels, labels = torch.rand(64, 784), torch.randint(10, (64,))
    for _ in range(30):
        step(pixels, labels, 64)
    begun = time.perf_counter()
    for _ in range(_STEPS):
        step(pixels, labels, 64)
    return (time.perf_counter() - begun) / _STEPS


def main() -> None:
    """Print a row per look, the nearest cores first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    end = time.monotonic() + parser.parse_args().seconds
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("there is one core only: nothing to compare")
    looks = []
    while time.monotonic() < end:
        looks.append((round_trip(), seconds_a_step(1), seconds_a_step(2)))
        time.sleep(1)
    print("| there and back, ns | us a step, 1 thread | 2 threads |")
    print("|---|---|---|")
    for trip, one, two in sorted(looks):
        print(f"| {1e9 * trip:.0f} | {1e6 * one:.0f} | {1e6 * two:.0f} |")


if __name__ == "__main__":
    main()
