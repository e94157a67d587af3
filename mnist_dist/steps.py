"""What one training step does: the mean gradient of a global batch over all ranks, and its use."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.by_hand import Perceptron
from mnist_dist.gradients import Compression, GradientSum, average_over_ranks, sum_over_ranks
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD
from mnist_dist.world import World


class Step(Protocol):
    """A callable that takes one optimizer step; every rank must call it equally often."""

    way: str
    """How it is done, in a few words for a person."""

    @property
    def seconds_adding_up(self) -> float | None:
        """Seconds so far that this rank has waited for the other ranks and added up gradients.

        None where that goes on beside the backward pass, so that nobody could say.
        """

    def gradient_norm(self) -> float | None:
        """Euclidean norm of the last step's gradient over all ranks; None before the first step.

        To be asked for before any rank may take another step.
        """

    def __call__(self, pixels: Tensor, labels: Tensor, samples: int) -> Tensor:
        """Step along the mean gradient over a global batch.

        Args:
            pixels: this rank's part of the batch: (n, 784) float32; n may be 0.
            labels: (n,) int64.
            samples: size of the global batch, over all ranks.

        Returns:
            This rank's sum of cross entropies over its part: () float32, detached.
        """


class AutogradStep:
    """By autograd, with DistributedDataParallel when there is more than one process.

    The local loss is sum(cross entropy) * W / n with n the samples in the global batch, so that
    DistributedDataParallel's mean over the W ranks is exactly the mean over the global batch,
    however unequal the ranks' parts are. A rank with an empty part still takes the step: its zero
    gradients are part of the all-reduce.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world_size: int, way: str
    ) -> None:
        """Train `model`, as `average_over_ranks` gave it, with `optimizer`."""
        self.way = way
        self.seconds_adding_up = None
        self._model = model
        self._optimizer = optimizer
        self._world_size = world_size

    def __call__(self, pixels: Tensor, labels: Tensor, samples: int) -> Tensor:
        """See `Step`."""
        loss_sum = F.cross_entropy(self._model(pixels), labels, reduction="sum")
        self._optimizer.zero_grad()
        (loss_sum * (self._world_size / samples)).backward()
        self._optimizer.step()
        return loss_sum.detach()

    def gradient_norm(self) -> float | None:
        """See `Step`."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item() if gradients else None


class StepByHand:
    """Without autograd, for the perceptron on CPUs: the same gradients in half the time.

    Every rank scales its part's gradient by 1 / n, so that the sum over ranks is the mean over the
    global batch.
    """

    def __init__(self, model: MLP, optimizer: FlatSGD, gradients: GradientSum, way: str) -> None:
        """Train `model` with `optimizer`, summing as `sum_over_ranks` says."""
        self.way = way
        self.seconds_adding_up = 0.0
        self._sum: Tensor | None = None
        self._perceptron = Perceptron([model.hidden1, model.hidden2, model.out])
        self._optimizer = optimizer
        self._gradients = gradients
        self._views = [optimizer.views(slot) for slot in gradients.slots]
        self._scales: dict[int, Tensor] = {}

    def __call__(self, pixels: Tensor, labels: Tensor, samples: int) -> Tensor:
        """See `Step`."""
        scale = self._scales.get(samples)
        if scale is None:
            scale = self._scales[samples] = torch.tensor(1 / samples)
        views = self._views[self._gradients.turn]
        loss_sum = self._perceptron.gradients(pixels, labels, scale, views)
        begun = time.perf_counter()
        self._sum = self._gradients.add_up()
        self.seconds_adding_up += time.perf_counter() - begun
        self._optimizer.apply(self._sum)
        return loss_sum

    def gradient_norm(self) -> float | None:
        """See `Step`."""
        return None if self._sum is None else self._sum.norm().item()


@dataclass(frozen=True)
class Choice:
    """What a user may choose about the step."""

    autograd: bool = False
    """Use autograd and DistributedDataParallel in any case."""
    share_memory: bool = True
    """CPU ranks of one host add up in memory they share, where they can."""
    compression: Compression = "none"
    """What ranks send each other; anything but "none" is for DistributedDataParallel only."""
    compile: bool = False
    """Let torch.compile work on the model; for autograd only."""
    timeout: float = 120.0
    """Seconds that a rank may make the others wait."""


def build_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World, choice: Choice
) -> Step:
    """The quickest step for this model on this device; every rank must ask.

    Args:
        model: on the world's device, with equal weights on all ranks.
        optimizer: of the model's parameters.
        world: the ranks.
        choice: the user's.
    """
    plain = not (choice.autograd or choice.compile) and choice.compression == "none"
    by_hand = plain and world.device.type == "cpu"
    share, timeout = choice.share_memory, choice.timeout
    if by_hand and type(model) is MLP and isinstance(optimizer, FlatSGD):
        gradients, way = sum_over_ranks(world, len(optimizer.flat), share, timeout)
        return StepByHand(model, optimizer, gradients, f"by hand, gradients over {way}")
    how = "autograd"
    if choice.compile:
        model, how = _compiled(model, world)
    parallel, way = average_over_ranks(model, world, share, timeout, choice.compression)
    return AutogradStep(parallel, optimizer, world.world_size, f"{how}, gradients over {way}")


def _compiled(model: nn.Module, world: World) -> tuple[nn.Module, str]:
    """The model as torch.compile makes it, if all ranks can, and what became of that in words."""
    try:
        compiled: nn.Module = torch.compile(model, dynamic=True)  # type: ignore[assignment]
        pixels = torch.zeros(8, 784, device=world.device)
        compiled(pixels).sum().backward()
        failure = None
    except Exception as error:  # whatever a compiler that is missing or fails makes torch raise
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    model.zero_grad()
    failures = [text for text in world.gather(failure) if text is not None]
    if failures:
        return model, f"autograd, not compiled ({failures[0]})"
    return compiled, "autograd, compiled"
