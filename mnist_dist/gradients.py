"""How the ranks average their gradients: DistributedDataParallel and its communication hooks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.shared_memory import HostSum
from mnist_dist.world import World


def average_over_ranks(
    model: nn.Module, world: World, share_memory: bool, timeout: float
) -> tuple[nn.Module, str]:
    """Let every backward pass of `model` leave the mean gradient over all ranks, and say how.

    Args:
        model: on the world's device, with equal weights on all ranks.
        world: with one process there is nothing to average and `model` is returned as it is.
        share_memory: CPU ranks of one host add up in memory they share, where they can.
        timeout: seconds that a rank may make the others wait.

    Returns:
        The model to train, and the way in a few words, for a person.
    """
    if world.world_size == 1:
        return model, "nothing to average"
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not share_memory or world.device.type != "cpu":
        return parallel, world.backend
    if min(world.gather(world.launch.local_world_size)) == 1:
        return parallel, f"{world.backend}: a host has one process only"
    size = sum(parameter.nbytes for parameter in model.parameters())
    try:
        host_sum = HostSum(world, size, timeout)
    except OSError as error:
        return parallel, f"{world.backend}: processes of a host share no memory ({error})"
    parallel.register_comm_hook(host_sum, _average)
    beyond = (
        "" if world.launch.local_world_size == world.world_size else f", {world.backend} beyond"
    )
    return parallel, f"shared memory{beyond}"


def _average(host_sum: HostSum, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over all ranks of one bucket of gradients."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(host_sum.sum(bucket.buffer()).div_(host_sum.world_size))
    return future
