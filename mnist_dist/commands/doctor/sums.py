"""Sums over all ranks, by the backend and by shared memory: are they right, how long they take."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnist_dist.distributed.failures import brief
from mnist_dist.distributed.shared_memory import HostSum
from mnist_dist.distributed.world import World
from mnist_dist.model import build_model

_SECONDS_A_SIZE = 0.2
_MOST_CALLS = 30


def gradient_bytes() -> int:
    """Bytes of the model's gradients, which training sums in each step."""
    return sum(parameter.nbytes for parameter in build_model().parameters())


def sizes() -> list[int]:
    """Bytes of the tensors to sum: latency, the model's gradients, bandwidth."""
    return [1024, gradient_bytes(), 16 << 20]


def by_backend(world: World) -> dict[str, Any]:
    """Sum tensors of three sizes by gloo or NCCL; every rank must take part.

    Returns:
        `sums`, a list of `bytes`, `seconds` (median of one sum) and `right`; `error` if it failed.
    """
    try:
        return {"sums": [_measure(world, world.sum, size) for size in sizes()]}
    except RuntimeError as error:
        return {"error": brief(error)}


def by_shared_memory(world: World, seconds: float) -> dict[str, Any]:
    """The same by the memory that ranks of a host share, as training would.

    Returns:
        As `by_backend`; `unused` says why training does without it, `refused` why it has to.
    """
    if world.device.type != "cpu":
        return {"unused": "GPUs sum by themselves"}
    try:
        if min(world.gather(world.launch.local_world_size)) == 1:
            return {"unused": "a host has one rank only"}
        try:
            host_sum = HostSum(world, gradient_bytes() // 4, seconds)
        except OSError as error:
            return {"refused": str(error)}
        return {"sums": [_measure(world, host_sum.add_up, size) for size in sizes()[:2]]}
    except (OSError, RuntimeError) as error:
        return {"error": brief(error)}


def _measure(world: World, total: Callable[[Tensor], Tensor], size: int) -> dict[str, Any]:
    """One sum of small whole numbers, which float32 adds exactly, then a few for the clock."""
    base = torch.arange(size // 4, device=world.device, dtype=torch.float32) % 1024
    count = world.world_size
    begun = time.perf_counter()
    result = total(base + world.rank)
    right = torch.equal(result, base * count + count * (count - 1) // 2)
    longest = max(first for (first,) in world.gather_numbers([time.perf_counter() - begun]))
    calls = max(3, min(_MOST_CALLS, int(_SECONDS_A_SIZE / longest)))
    taken, zeros = [], torch.zeros_like(base)
    for _ in range(calls):
        begun = time.perf_counter()
        total(zeros)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        taken.append(time.perf_counter() - begun)
    return {"bytes": size, "seconds": statistics.median(taken), "right": right}
