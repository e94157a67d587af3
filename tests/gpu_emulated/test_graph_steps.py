"""The steps that a GPU takes as CUDA graphs, taken here one by one: those of eager DDP.

Every rank loops over all cases, so that a world size costs one start of processes.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from digits import DropoutMLP, flat_weights, random_split, wrap_ddp
from processes import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DistributedSampler

import train_ddp
from mnist_dist.cuda_graphs import GraphSteps
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.model import MLP
from mnist_dist.optimizer import Schedule, build_optimizer
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding, global_batches
from mnist_dist.torch_internals import mark_stepped

WORLD_SIZES = [1, 2, 3, 4]
BATCHES = [64, 48, 8, 5, 1]  # of 211 samples: the last of an epoch has 19, 19, 3, 1, 1
EPOCHS = 2
SEED = 3


class Recipe(NamedTuple):
    """How a case trains, besides its global batch."""

    momentum: float
    weight_decay: float
    max_shift: int
    schedule: Schedule


PLAIN = Recipe(0, 0, 0, "constant")
FULL = Recipe(0.9, 1e-3, 2, "onecycle")
RECIPES = [PLAIN, FULL, Recipe(0.9, 0, 0, "constant"), Recipe(0, 1e-3, 1, "onecycle")]


class Run:
    """A run of one rank, by GraphSteps or step by step."""

    def __init__(
        self,
        world: World,
        batch: int,
        recipe: Recipe,
        steps_per_launch: int = 4,
        bare: nn.Module | None = None,
    ) -> None:
        samples = 211 if batch > 1 else 37
        self.world, self.split = world, random_split(samples)
        self.shift = recipe.max_shift
        self.sharding = Sharding(samples, batch, world.rank, world.world_size)
        self.sampler = DistributedSampler[int](self.split, world.world_size, world.rank, seed=SEED)
        torch.manual_seed(0)
        bare = MLP() if bare is None else bare
        self.model = wrap_ddp(bare, world)
        steps = EPOCHS * self.sharding.steps_per_epoch
        optimizer, scheduler = build_optimizer(
            bare, 0.05, recipe.momentum, recipe.weight_decay, recipe.schedule, steps
        )
        mark_stepped(optimizer)  # as capturing does
        self.optimizer: Optimizer = optimizer
        self.scheduler: LRScheduler | None = scheduler
        self.state = TrainState(bare, optimizer, scheduler, {"seed": 0})
        self.graphs = GraphSteps(
            train_ddp.train_step,
            self.model,
            optimizer,
            self.split,
            self.sharding,
            self.shift,
            steps_per_launch,
        )
        self.losses: list[Tensor] = []

    def step_scheduler(self) -> float:
        """Return this step's rate, and go on to the next step's."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step()
        return rate

    def train_eagerly(self) -> None:
        """As train_ddp.fit does."""
        for epoch in range(EPOCHS):
            self.sampler.set_epoch(epoch)
            for images, labels, size in global_batches(
                self.split, self.sampler, self.sharding, 0, self.shift
            ):
                scale = torch.full((), self.world.world_size / size)
                loss = train_ddp.train_step(self.model, self.optimizer, images, labels, scale)
                self.step_scheduler()
                self.losses.append(loss[None])

    def take(self, *calls: int) -> list[dict[str, Any]]:
        """Train to the end, by `calls` steps at a time in turn; the states after each call."""
        saved: list[dict[str, Any]] = []
        while self.state.epoch < EPOCHS:
            self.sampler.set_epoch(self.state.epoch)
            self.graphs.start_epoch(self.sampler, self.state.batch)
            while left := self.sharding.steps_per_epoch - self.state.batch:
                count = min(left, calls[len(saved) % len(calls)])
                losses = self.graphs.take([self.step_scheduler() for _ in range(count)])
                self.losses.append(losses.clone())
                self.state.count_steps(losses)
                self.state.drain_losses()
                saved.append(copy.deepcopy(self.state.state_dict(self.world)))
            self.state.finish_epoch(0.0)
        return saved

    def result(self) -> tuple[Tensor, Tensor]:
        """The weights, and the loss of each step."""
        return flat_weights(self.state.model), torch.cat(self.losses)


def largest_differences() -> list[tuple[int, Recipe, float, float, bool]]:
    """Per case: how far weights and losses are from eager DDP's; and whether the weights moved.

    A loss above 1 is compared relatively: it is the sum over a local batch.
    """
    found = []
    with init_distributed(read_launch(), "cpu", "auto") as world:
        for batch in BATCHES:
            for recipe in RECIPES if batch == 48 else [PLAIN, FULL]:
                eager, graphs = Run(world, batch, recipe), Run(world, batch, recipe)
                start = flat_weights(eager.state.model)
                eager.train_eagerly()
                graphs.take(7, 1, 4)
                (weights, losses), (others, other_losses) = eager.result(), graphs.result()
                apart = (weights - others).abs().max().item()
                losses_apart = ((losses - other_losses).abs() / losses.clamp(min=1)).max().item()
                found.append((batch, recipe, apart, losses_apart, not torch.equal(start, others)))
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_from_tables_are_those_of_eager_ddp(world_size: int) -> None:
    for rank, cases in enumerate(run_ranks(largest_differences, world_size)):
        assert len(cases) == 12
        for batch, recipe, weights_apart, losses_apart, has_moved in cases:
            case = f"rank {rank}, batch {batch}, {recipe}"
            assert has_moved, case
            assert weights_apart <= 1e-6, case
            assert losses_apart <= 1e-5, case


def unequal_launches() -> list[str]:
    """The cases in which steps per launch, or per call, change a bit."""
    found = []
    with init_distributed(read_launch(), "cpu", "auto") as world:
        for batch in BATCHES:
            one = Run(world, batch, FULL, steps_per_launch=1)
            one.take(10**6)
            for steps, calls in ((4, (10**6,)), (4, (6, 1, 3)), (32, (10**6,))):
                other = Run(world, batch, FULL, steps_per_launch=steps)
                other.take(*calls)
                if not all(map(torch.equal, one.result(), other.result())):
                    found.append(f"batch {batch}, {steps} steps per launch, calls of {calls}")
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_per_launch_and_per_call_change_no_bit(world_size: int) -> None:
    assert run_ranks(unequal_launches, world_size) == [[]] * world_size


def inexact_resumes() -> tuple[int, list[str]]:
    """How many resumes there were, and those that did not end in the uninterrupted run's bits."""
    count, found = 0, []
    with init_distributed(read_launch(), "cpu", "auto") as world:
        for batch in (64, 48):
            whole = Run(world, batch, FULL, bare=DropoutMLP())
            saved = whole.take(1)
            for step, state in enumerate(saved[:-1], start=1):
                torch.manual_seed(99)  # another random state, and other weights
                resumed = Run(world, batch, FULL, bare=DropoutMLP())
                torch.manual_seed(98)
                resumed.state.load_state_dict(state, world)
                if resumed.state.batch == whole.sharding.steps_per_epoch:
                    resumed.state.finish_epoch(0.0)
                last = resumed.take(3)[-1]
                count += 1
                ends = [flat_weights(run.state.model) for run in (whole, resumed)]
                losses_equal = torch.equal(
                    torch.cat(whole.losses)[step:], torch.cat(resumed.losses)
                )
                sums_equal = last["loss_sums"] == saved[-1]["loss_sums"]
                if not (torch.equal(*ends) and losses_equal and sums_equal):
                    found.append(f"batch {batch}, step {step}")
    return count, found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resume_at_any_step_gives_the_bits_of_the_whole_run(world_size: int) -> None:
    """Of a model with dropout, so that the random state counts."""
    assert run_ranks(inexact_resumes, world_size) == [(7 + 9, [])] * world_size
