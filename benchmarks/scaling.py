"""Fit a model of a step's time to this machine, check it here, and extrapolate to many GPUs.

python -m benchmarks.scaling --data ../shared/data/mnist.pkl.gz

    t(W, B) = max(1, W / cores) * (c0 + c1 * B / W + ddp + waits * alpha + passes * beta * bytes)

W ranks of one thread each take a step of global batch B. c0 is the cost of a step and c1 of a
sample, fitted at W = 1, where DDP is not used. The rest is fitted at W = 2: ddp is what DDP costs
without communication, alpha one wait at the barrier and beta one byte of gradient summed (Hockney's
alpha-beta model of a message). Two ranks wait once and pass over the whole vector; more wait twice
and sum a share each. Ranks beyond the cores take turns.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.stepping import Kind, Stepper, Transport
from mnist_dist.data import Split, find_data, load
from mnist_dist.distributed.devices import cpus_allowed
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.shared_memory import SharedMemoryAllReduce
from mnist_dist.distributed.world import World

_INSIDE = "--inside"
_STEPS = 100
_FIT_BATCHES = [16, 64, 256, 512]
_FIT_SIZES = [64, 16_384, 136_074, 1_000_000]  # float32
_CHECKED = [1, 2, 3, 4, 6, 8]
_BATCHES = [64, 512]
_GRADIENT = 4 * 136_074
# Not measured: a rank's GPU takes a step of b samples in 40 us + b * 10 ns, one hop of a tree 4 us
# within a node and 10 us between nodes, and a GPU sends 40 GB/s.
_GPU = {"c0": 40e-6, "c1": 10e-9, "hop_near": 4e-6, "hop_far": 10e-6, "beta": 1 / 40e9}


def step_seconds(
    world: World,
    split: Split,
    batch: int,
    rounds: int,
    kind: Kind = "ddp",
    transport: Transport = "shared memory",
) -> float:
    """Return the median of a step's seconds."""
    stepper = Stepper(world, split, batch, kind, transport)
    batches = itertools.chain.from_iterable(map(stepper.batches, itertools.count()))

    def steps() -> None:
        for batch in itertools.islice(batches, _STEPS):
            stepper.step(*batch)

    return _median(world, rounds, steps) / _STEPS


def sum_seconds(world: World, size: int, rounds: int) -> float:
    """Return the median of the seconds of one all-reduce in shared memory."""
    all_reduce, values = SharedMemoryAllReduce(world, size, timeout=60), torch.zeros(size)

    def sums() -> None:
        for _ in range(_STEPS):
            all_reduce(values)

    seconds = _median(world, rounds, sums) / _STEPS
    all_reduce.close()
    return seconds


def _median(world: World, rounds: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(rounds + 1):
        world.barrier()
        started = time.perf_counter()
        work()
        world.barrier()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first warms up


def inside(data: str, rounds: int) -> None:
    """Run one rank; rank 0 prints its measurements as JSON."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        torch.set_num_threads(1)
        split = load(world.once_per_host(lambda: find_data(data, None))).train
        found: dict[str, dict[int, float]] = {}
        if world.world_size == 1:
            found["local"] = {b: step_seconds(world, split, b, rounds) for b in _FIT_BATCHES}
        if world.world_size == 2:
            found["sums"] = {size: sum_seconds(world, size, rounds) for size in _FIT_SIZES}
            wrapped = step_seconds(world, split, _BATCHES[0], rounds, "ddp", "none")
            bare = step_seconds(world, split, _BATCHES[0], rounds, "local", "none")
            found["ddp"] = {_BATCHES[0]: wrapped - bare}
        found["steps"] = {b: step_seconds(world, split, b, rounds) for b in _BATCHES}
        if world.is_main_process:
            print(json.dumps(found))


def measured(data: str, world_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return what `inside` prints at one world size."""
    module = ["-m", "benchmarks.scaling", _INSIDE, f"--data={data}", f"--rounds={rounds}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if world_size > 1 else []), *module],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def line(points: dict[float, float]) -> tuple[float, float]:
    """Return intercept and slope of the line with the least squared relative errors."""
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    x_mean = sum(w * x for x, w in weights.items()) / total
    y_mean = sum(weights[x] * y for x, y in points.items()) / total
    covariance = sum(weights[x] * (x - x_mean) * (y - y_mean) for x, y in points.items())
    slope = covariance / sum(w * (x - x_mean) ** 2 for x, w in weights.items())
    return y_mean - slope * x_mean, slope


def predicted(world_size: int, batch: int, fit: dict[str, float], cores: int) -> float:
    """Return the seconds of a step, by the formula above."""
    waits, passes = {1: (0, 0.0), 2: (1, 1.0)}.get(world_size, (2, 0.5))
    local = fit["c0"] + fit["c1"] * batch / world_size
    local += fit["ddp"] if world_size > 1 else 0.0
    return max(1, world_size / cores) * (
        local + waits * fit["alpha"] + passes * fit["beta"] * _GRADIENT
    )


def on_gpus(world_size: int, batch: int) -> float:
    """Return the seconds of a step on nodes of 8 GPUs: latency of a tree, bytes of a ring."""
    near, far = math.log2(min(world_size, 8)), math.log2(max(1, world_size / 8))
    latency = 2 * (near * _GPU["hop_near"] + far * _GPU["hop_far"])
    moved = 2 * (world_size - 1) / world_size * _GRADIENT * _GPU["beta"]
    return _GPU["c0"] + _GPU["c1"] * batch / world_size + latency + moved


def check(found: dict[int, dict[str, dict[str, float]]], cores: int) -> Iterator[str]:
    """Yield the fit, and the lines of the table of measured and predicted steps."""
    c0, c1 = line({float(b): s for b, s in found[1]["local"].items()})
    alpha, beta = line({4 * float(n): s for n, s in found[2]["sums"].items()})
    (ddp,) = found[2]["ddp"].values()
    fit = {"c0": c0, "c1": c1, "ddp": ddp, "alpha": alpha, "beta": beta}
    yield (
        f"c0 {1e6 * c0:.0f} us, c1 {1e6 * c1:.2f} us/sample, ddp {1e6 * ddp:.0f} us, "
        f"alpha {1e6 * alpha:.0f} us, 1/beta {1e-9 / beta:.1f} GB/s, {cores} cores"
    )
    yield from ("", "| processes | global batch | ms/step | predicted | error |")
    yield "|---|---|---|---|---|"
    for world_size, kinds in found.items():
        for batch, seconds in kinds["steps"].items():
            model = predicted(world_size, int(batch), fit, cores)
            off = f"{model / seconds - 1:+.0%}"
            cells = [f"{1e3 * seconds:.3f}", f"{1e3 * model:.3f}", off]
            yield "| " + " | ".join([str(world_size), str(batch), *cells]) + " |"


def extrapolation() -> Iterator[str]:
    """Yield the lines of the speed-up over one GPU, by the model and the numbers assumed above."""
    batches = [64, 1024, 16_384, 262_144]
    yield "| GPUs | " + " | ".join(f"batch {b:,}" for b in batches) + " |"
    yield "|---" * (len(batches) + 1) + "|"
    for gpus in (1, 8, 64, 256, 1024):
        gains = [f"{on_gpus(1, b) / on_gpus(gpus, b):.1f}" for b in batches]
        yield f"| {gpus} | " + " | ".join(gains) + " |"


def main() -> None:
    """Print the fit, the check and the extrapolation; with --inside, run one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--rounds", type=int, default=15, help=f"of {_STEPS} steps each")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return inside(chosen.data, chosen.rounds)
    found = {n: measured(chosen.data, n, chosen.rounds) for n in _CHECKED}
    print("\n".join([*check(found, cpus_allowed()), "", *extrapolation()]))
    return None


if __name__ == "__main__":
    main()
