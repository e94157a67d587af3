"""Training on one rank without a job around it: what benchmarks time."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split
from mnist_dist.distributed.ddp import register_comm_hook
from mnist_dist.distributed.devices import set_threads
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import World
from mnist_dist.fast import ManualStep
from mnist_dist.model import MLP
from mnist_dist.optimizer import build_optimizer
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding, global_batches
from train_ddp import train_step

Kind = Literal["ddp", "manual"]
_TIMEOUT_S = 60.0


class Stepper:
    """A model in training."""

    def __init__(
        self,
        world: World,
        split: Split,
        batch: int,
        kind: Kind = "ddp",
        share_memory: bool = True,
        communicate: bool = True,
    ) -> None:
        """Build model and step; every rank of `world` must call this.

        Args:
            world: the ranks.
            split: training samples.
            batch: global batch size.
            kind: of step, as for --step.
            share_memory: as for --shared-memory.
            communicate: False leaves every rank with its own gradients.
        """
        self.sharding = Sharding(len(split), batch, world.rank, world.world_size)
        self._split = split
        torch.manual_seed(0)
        model = MLP()
        optimizer, _ = build_optimizer(model, 0.001, 0.0, 0.0, "constant", 1)
        self.state = TrainState(model, optimizer, None, {})
        set_threads(world.launch, -(-batch // world.world_size))
        group = world if communicate else World(Launch("none"), world.device, "none")
        self._step, self._model = train_step, self._wrap(model, group, share_memory)
        if kind == "manual":
            self._step = ManualStep(model, optimizer, group, share_memory, _TIMEOUT_S)
            self._model = model

    @staticmethod
    def _wrap(model: nn.Module, world: World, share_memory: bool) -> nn.Module:
        if world.world_size == 1:
            return model
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        register_comm_hook(ddp_model, world, share_memory, _TIMEOUT_S)
        return ddp_model

    def epoch(self, number: int) -> Iterator[Tensor]:
        """Train epoch `number`; yield each step's summed loss."""
        sharding = self.sharding
        sampler = DistributedSampler[int](self._split, sharding.world_size, sharding.rank)
        sampler.set_epoch(number)
        for images, labels, size in global_batches(self._split, sampler, sharding):
            scale = sharding.world_size / size
            yield self._step(self._model, self.state.optimizer, images, labels, scale)
