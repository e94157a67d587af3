"""How the ranks add up their gradients: in shared memory, by the backend, or not at all."""

from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.distributed.shared_memory import HostSum
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError

Compression = Literal["none", "bf16", "powersgd"]


class GradientSum(Protocol):
    """Adds up one vector of gradients over all ranks."""

    own: Tensor
    """(elements,) float32, on the rank's device: where it had best make its vector."""

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks of `values`: to be read only, and only until the next call.

        It may be in the place of `values`.
        """


class BackendSum:
    """Sums by the process group's backend; of one process, nothing but its own vector."""

    def __init__(self, world: World, size: int) -> None:
        """Add up vectors of `size` float32 over the ranks of `world`."""
        self._world = world
        self.own = torch.empty(size, device=world.device)

    def add_up(self, values: Tensor) -> Tensor:
        """See `GradientSum`."""
        return self._world.sum(values)


def sum_over_ranks(
    world: World, size: int, share_memory: bool, timeout: float
) -> tuple[GradientSum, str]:
    """The quickest way to add up vectors of `size` float32, and what it is, for a person.

    Args:
        world: the ranks, all of which must take part.
        size: elements of the vectors.
        share_memory: CPU ranks of one host add up in memory they share, where they can.
        timeout: seconds that a rank may make the others wait.
    """
    host_sum, way = _share_memory(world, size, share_memory, timeout)
    return host_sum or BackendSum(world, size), way


def average_over_ranks(
    model: nn.Module,
    world: World,
    share_memory: bool,
    timeout: float,
    compression: Compression = "none",
) -> tuple[nn.Module, str]:
    """Let every backward pass of `model` leave the mean gradient over all ranks, and say how.

    Args:
        model: on the world's device, with equal weights on all ranks.
        world: with one process there is nothing to average and `model` is returned as it is.
        share_memory: as for `sum_over_ranks`.
        timeout: seconds that a rank may make the others wait.
        compression: what the ranks send each other, over the backend in any case if it is not
            "none".
    """
    if world.world_size == 1:
        return model, "alone"
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compression != "none":
        _compress(parallel, compression)
        return parallel, f"gradients over {world.backend}, {compression}"
    parameters = list(model.parameters())
    share_memory = share_memory and all(p.dtype == torch.float32 for p in parameters)
    size = sum(parameter.numel() for parameter in parameters)
    host_sum, way = _share_memory(world, size, share_memory, timeout)
    if host_sum is not None:
        parallel.register_comm_hook((host_sum, world.world_size), _average)
    return parallel, way


def require_compression(compression: Compression, backend: str) -> None:
    """Raise UserError where PyTorch's hook for `compression` does not work over `backend`."""
    if compression == "bf16" and backend == "gloo":
        raise UserError(
            "--grad-compression bf16: PyTorch's hook needs GPUs with NCCL; use powersgd, or none"
        )


def _compress(parallel: DistributedDataParallel, compression: Compression) -> None:
    # Imported here: they are seldom used, and bring torch's compiler with them.
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if compression == "bf16":
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=10)
    parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _share_memory(
    world: World, size: int, wanted: bool, timeout: float
) -> tuple[HostSum | None, str]:
    """Sums in shared memory where they are wanted and can be had; and what is done, in words."""
    if world.world_size == 1:
        return None, "alone"
    if not wanted or world.device.type != "cpu":
        return None, f"gradients over {world.backend}"
    if min(world.gather(world.launch.local_world_size)) == 1:
        return None, f"gradients over {world.backend}: a host has one process only"
    try:
        host_sum = HostSum(world, size, timeout)
    except OSError as error:
        return None, (
            f"gradients over {world.backend}: processes of a host share no memory ({error})"
        )
    one_host = world.launch.local_world_size == world.world_size
    beyond = "" if one_host else f", {world.backend} beyond"
    return host_sum, f"gradients over shared memory{beyond}"


def _average(state: tuple[HostSum, int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over all ranks of one bucket of gradients, as a communication hook of DDP."""
    host_sum, world_size = state
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    mean = bucket.buffer()
    torch.div(host_sum.add_up(mean), world_size, out=mean)
    future.set_result(mean)
    return future
