"""All-reduce over all ranks, by the backend and by shared memory: check the sums, time them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnist_dist.distributed.failures import brief
from mnist_dist.distributed.shared_memory import SharedMemoryAllReduce
from mnist_dist.distributed.world import World
from mnist_dist.model import build_model

_SECONDS_PER_SIZE = 0.1
_MAX_CALLS = 30


def sizes() -> list[int]:
    """Return the bytes of the tensors to sum: for latency, the model's gradients, bandwidth."""
    return [1024, sum(parameter.nbytes for parameter in build_model().parameters()), 16 << 20]


def by_backend(world: World) -> dict[str, Any]:
    """All-reduce tensors of three sizes over gloo or NCCL; every rank must take part.

    Returns:
        `sums`, a list of `bytes`, median `seconds` and `correct`; or `error`.
    """
    try:
        return {"sums": [_measure(world, world.all_reduce_sum, size) for size in sizes()]}
    except RuntimeError as error:
        return {"error": brief(error)}


def by_shared_memory(world: World, seconds: float) -> dict[str, Any]:
    """All-reduce through the memory that ranks of a node share, as training would.

    Returns:
        As `by_backend`; or `unused`, why training does not use it, or `refused`, why it cannot.
    """
    if world.device.type != "cpu":
        return {"unused": "GPUs use NCCL"}
    try:
        if min(world.gather(world.launch.local_world_size)) == 1:
            return {"unused": "a node has only one rank"}
        small, gradients, _ = sizes()
        try:
            all_reduce = SharedMemoryAllReduce(world, gradients // 4, seconds)
        except OSError as error:
            return {"refused": str(error)}
        return {"sums": [_measure(world, all_reduce, size) for size in (small, gradients)]}
    except (OSError, RuntimeError) as error:
        return {"error": brief(error)}


def _measure(world: World, all_reduce: Callable[[Tensor], Tensor], size: int) -> dict[str, Any]:
    """Check one sum of small whole numbers, which float32 adds exactly, then time a few sums."""
    base = torch.arange(size // 4, device=world.device, dtype=torch.float32) % 1024
    count = world.world_size
    start = time.perf_counter()
    result = all_reduce(base + world.rank)
    correct = torch.equal(result, base * count + count * (count - 1) // 2)
    longest = max(world.gather(time.perf_counter() - start))
    calls = max(3, min(_MAX_CALLS, int(_SECONDS_PER_SIZE / longest)))
    taken, zeros = [], torch.zeros_like(base)
    for _ in range(calls):
        start = time.perf_counter()
        all_reduce(zeros)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        taken.append(time.perf_counter() - start)
    return {"bytes": size, "seconds": statistics.median(taken), "correct": correct}
