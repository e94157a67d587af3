"""Training steps on one device, eager or as CUDA graphs, without a run around them."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from mnist_dist.cuda_graphs import STEPS_PER_LAUNCH, GraphSteps
from mnist_dist.data import Split, find_data, load
from mnist_dist.distributed.devices import pick_device, set_precision
from mnist_dist.distributed.launcher import Launch
from mnist_dist.model import MLP
from mnist_dist.optimizer import Schedule, build_optimizer
from mnist_dist.sampling import Sharding, global_batches
from train_ddp import train_step


@dataclass(frozen=True)
class Recipe:
    """What a few steps are taken with."""

    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.0
    decay: float = 0.0
    schedule: Schedule = "constant"
    shift: int = 0
    total_steps: int = 100_000
    """Of the schedule."""


def set_up(device: str) -> torch.device:
    """Use a device as the job does."""
    chosen = pick_device(Launch("none"), device)
    set_precision("fp32", chosen)
    return chosen


def load_split(data: str, device: torch.device) -> Split:
    return load(find_data(data, None)).to(device).train


def start_group_of_one(device: torch.device) -> None:
    """Form a process group of this process alone, for DistributedDataParallel."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # as the job does
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class Steps:
    """A model in training, one step after the other over as many epochs as it takes."""

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        steps_per_launch: int = STEPS_PER_LAUNCH,
        build: Callable[[], nn.Module] = MLP,
        graphs: bool = True,
        ddp: bool = False,
    ) -> None:
        """Build model, optimizer and, with `graphs`, tables and (on a GPU) graphs.

        Without them, steps are launched one by one, from the same data on the device.
        """
        self.split, self.recipe = split, recipe
        self.sharding = Sharding(len(split), recipe.batch, 0, 1)
        self._sampler = DistributedSampler[int](split, 1, 0)
        torch.manual_seed(0)
        self.bare = build().to(split.images.device)
        self.model = (
            DistributedDataParallel(self.bare, gradient_as_bucket_view=True) if ddp else self.bare
        )
        self.optimizer, self.scheduler = build_optimizer(
            self.bare, recipe.lr, recipe.momentum, recipe.decay, recipe.schedule, recipe.total_steps
        )
        self.graphs = None
        self._epoch = 0
        if graphs:
            self.graphs = GraphSteps(
                train_step,
                self.model,
                self.optimizer,
                split,
                self.sharding,
                recipe.shift,
                steps_per_launch,
            )
            if split.images.is_cuda:
                self.graphs.capture()
        self._eager = self._eager_steps()

    def take(self, steps: int) -> Tensor:
        """Take steps from the first global batch of the next epoch on; return their losses."""
        if self.graphs is None:
            return torch.stack(list(itertools.islice(self._eager, steps)))
        found = []
        while steps:
            now = min(steps, self.sharding.steps_per_epoch)
            self._sampler.set_epoch(self._epoch)
            self.graphs.start_epoch(self._sampler, 0)
            found.append(self.graphs.take(self._rates(now)).clone())
            steps -= now
            self._epoch += 1
        return torch.cat(found)

    def _rates(self, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(self.optimizer.param_groups[0]["lr"])
            if self.scheduler is not None:
                self.scheduler.step()
        return rates

    def _eager_steps(self) -> Iterator[Tensor]:
        device = self.split.images.device
        for epoch in itertools.count():
            self._sampler.set_epoch(epoch)
            for images, labels, size in global_batches(
                self.split, self._sampler, self.sharding, 0, self.recipe.shift
            ):
                scale = torch.full((), 1 / size, device=device)
                loss = train_step(self.model, self.optimizer, images, labels, scale)
                if self.scheduler is not None:
                    self.scheduler.step()
                yield loss

    def weights(self) -> Tensor:
        """Return all weights as one vector on the CPU."""
        return torch.cat([p.detach().flatten() for p in self.bare.parameters()]).cpu()

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
