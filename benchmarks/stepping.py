"""Training steps without a run around them: what the benchmarks time."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split
from mnist_dist.distributed.ddp import register_comm_hook
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import World
from mnist_dist.fast import ManualStep
from mnist_dist.model import MLP
from mnist_dist.optimizer import TrainStep, build_optimizer
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding, global_batches
from mnist_dist.torch_internals import keep_compiler_out_of_ddp
from train_ddp import train_step

Kind = Literal["local", "ddp", "manual"]
Transport = Literal["shared memory", "gloo", "none"]
_TIMEOUT_S = 60.0


class Stepper:
    """A model in training."""

    def __init__(
        self,
        world: World,
        split: Split,
        batch: int,
        kind: Kind = "ddp",
        transport: Transport = "shared memory",
    ) -> None:
        """Build model and step; every rank of `world` must call this.

        Args:
            world: the ranks.
            split: training samples.
            batch: global batch size.
            kind: of step, as for --step; "local" is `train_step` without DDP.
            transport: of gradients; "none" leaves every rank with its local ones.
        """
        self.sharding = Sharding(len(split), batch, world.rank, world.world_size)
        self._split = split
        torch.manual_seed(0)
        model = MLP()
        optimizer, _ = build_optimizer(model, 0.001, 0.0, 0.0, "constant", 1)
        self.state = TrainState(model, optimizer, None, {})
        self._model: nn.Module = model
        self._step: TrainStep = train_step
        if kind == "manual":
            ranks = World(Launch("none"), world.device, "none") if transport == "none" else world
            share_memory = transport == "shared memory"
            self._step = ManualStep(model, optimizer, ranks, share_memory, _TIMEOUT_S)
        elif kind == "ddp" and world.world_size > 1:
            self._model = _wrap(model, world, transport)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Return an epoch's `global_batches`."""
        sharding = self.sharding
        sampler = DistributedSampler[int](self._split, sharding.world_size, sharding.rank)
        sampler.set_epoch(epoch)
        return global_batches(self._split, sampler, sharding)

    def step(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Train on this rank's part of a global batch; return its summed loss."""
        scale = torch.full((), self.sharding.world_size / batch_size, device=images.device)
        return self._step(self._model, self.state.optimizer, images, labels, scale)

    def train_epoch(self, epoch: int) -> None:
        """Train on every batch of an epoch."""
        for batch in self.batches(epoch):
            self.step(*batch)


def _wrap(model: nn.Module, world: World, transport: Transport) -> DistributedDataParallel:
    keep_compiler_out_of_ddp()
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if transport == "none":
        ddp_model.register_comm_hook(None, _keep_local)
    else:
        register_comm_hook(ddp_model, world, transport == "shared memory", _TIMEOUT_S)
    return ddp_model


def _keep_local(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Return the gradients unchanged, as a DDP communication hook."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
