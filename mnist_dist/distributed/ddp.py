"""Choose how DistributedDataParallel all-reduces gradients, and prepare what it wraps."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.dimensions import IMAGE_PIXELS
from mnist_dist.distributed.shared_memory import SharedMemoryAllReduce, connect_shared_memory
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError

Compression = Literal["none", "bf16", "powersgd"]


def shared_memory_hook(
    state: tuple[SharedMemoryAllReduce, int], bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Average one bucket of gradients over all ranks in shared memory, as a DDP communication hook.

    See https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html. The all-reduce is done when this
    returns: the model is one bucket, which leaves nothing to overlap it with.

    `state` is the all-reduce and the number of ranks; the mean replaces the content of `bucket`.
    """
    all_reduce, world_size = state
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    mean = bucket.buffer()
    torch.div(all_reduce(mean), world_size, out=mean)
    future.set_result(mean)
    return future


def register_comm_hook(
    model: DistributedDataParallel,
    world: World,
    share_memory: bool,
    timeout: float,
    compression: Compression = "none",
) -> tuple[str, Callable[[], float | None]]:
    """Choose how the gradients of `model` are all-reduced; every rank must call this.

    Args:
        model: just wrapped, before its first forward pass.
        world: at least two ranks.
        share_memory: let the CPU ranks of a node average in memory they share, where possible.
        timeout: seconds to wait for a rank that does not respond.
        compression: of the gradients; anything but "none" goes over the backend.

    Returns:
        A description for the user; a function that returns the seconds this rank has spent in
        all-reduces so far, None if they overlap the backward pass and cannot be timed.
    """
    if compression != "none":
        _register_compression(model, compression)
        return f"gradients over {world.backend}, {compression}", lambda: None
    parameters = list(model.parameters())
    if share_memory and all(p.dtype == torch.float32 for p in parameters):
        size = sum(p.numel() for p in parameters)
        all_reduce, description = connect_shared_memory(world, size, timeout)
        if all_reduce is not None:
            model.register_comm_hook((all_reduce, world.world_size), shared_memory_hook)
            return description, lambda: all_reduce.seconds
        return description, lambda: None
    return f"gradients over {world.backend}", lambda: None


def settle_buckets(model: DistributedDataParallel) -> None:
    """Let DDP choose the final order of its buckets now; every rank must call this.

    It does so after its first backward pass, by the order in which gradients were ready. Where they
    lie in a bucket decides in which order an all-reduce adds them up: without this, the first step
    after a resume would differ in its last bits from the same step of an uninterrupted run.

    To be called after `register_comm_hook`. In evaluation mode `model` draws no random numbers.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    model(torch.zeros(1, IMAGE_PIXELS, device=device)).sum().backward()
    model.zero_grad()
    model.train(was_training)


def check_compression(compression: Compression, world: World) -> None:
    """Raise UserError if PyTorch's hook for `compression` does not work on these devices."""
    if compression == "bf16" and (world.backend == "gloo" or world.device.type == "cpu"):
        raise UserError(
            "--grad-compression bf16: PyTorch's hook needs GPUs with NCCL; use powersgd, or none"
        )


def _register_compression(model: DistributedDataParallel, compression: Compression) -> None:
    # Imported here: rarely used, and they import torch's compiler.
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if compression == "bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=10)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def compile_or_explain(model: nn.Module, world: World) -> tuple[nn.Module, str | None]:
    """Compile `model` with torch.compile if that works on every rank; all must call this.

    Returns:
        The compiled model and None; or `model`, and why it cannot be compiled.
    """
    try:
        compiled: nn.Module = torch.compile(model, dynamic=True)  # type: ignore[assignment]
        compiled(torch.zeros(8, IMAGE_PIXELS, device=world.device)).sum().backward()
        failure = None
    except Exception as error:  # torch raises many types for a missing or failing compiler
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    model.zero_grad()
    failures = [text for text in world.gather(failure) if text is not None]
    return (model, failures[0]) if failures else (compiled, None)


class Bfloat16(nn.Module):
    """A model with bfloat16 matrix products in training; weights and logits stay float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device.type
        self._autocast = torch.autocast(device, torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits, (n, 10) float32."""
        with self._autocast:
            logits: Tensor = self.model(images)
        return logits.float()
