"""What the tests of GraphSteps train: synthetic digits, an MLP, and one with dropout."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.data import Split
from mnist_dist.distributed.ddp import register_comm_hook
from mnist_dist.distributed.world import World
from mnist_dist.model import MLP
from mnist_dist.torch_internals import keep_compiler_out_of_ddp


def random_split(samples: int) -> Split:
    """Images and labels from a generator of their own, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 784), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(10, (samples,), generator=generator))


class DropoutMLP(MLP):
    """A model whose steps depend on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.dropout(images))


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """As train_ddp.py and `prepare_steps` wrap it."""
    if world.world_size == 1:
        return model
    keep_compiler_out_of_ddp()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    register_comm_hook(wrapped, world, share_memory=True, timeout=60)
    return wrapped


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of all parameters."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
