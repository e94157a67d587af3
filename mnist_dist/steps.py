"""What one training step does: the mean gradient of a global batch over all ranks, and its use."""

import contextlib
import time
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.distributed.ddp import Compression, GradientSum, average_over_ranks, sum_over_ranks
from mnist_dist.distributed.threads import QuickestThreads
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError
from mnist_dist.fast.captured import CapturedPerceptron, fault
from mnist_dist.fast.manual_backward import Perceptron
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD

Precision = Literal["fp32", "tf32", "bf16"]


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
            pixels: this rank's part of the batch: (n, 784) float32; n may be 0. Their memory has
                other pixels later: a step that keeps them must copy.
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
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world_size: int,
        way: str,
        bfloat16: bool = False,
    ) -> None:
        """Train `model`, as `average_over_ranks` gave it, with `optimizer`.

        With `bfloat16` matrix products are of bfloat16; weights and loss are float32 in any case.
        """
        self.way = way
        device = next(model.parameters()).device.type
        self._products: contextlib.AbstractContextManager[None] = (
            torch.autocast(device, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
        )
        self.seconds_adding_up = None
        self._model = model
        self._optimizer = optimizer
        self._world_size = world_size

    def __call__(self, pixels: Tensor, labels: Tensor, samples: int) -> Tensor:
        """See `Step`."""
        with self._products:
            logits = self._model(pixels)
        loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
        self._optimizer.zero_grad()
        (loss_sum * (self._world_size / samples)).backward()
        self._optimizer.step()
        return loss_sum.detach()

    def gradient_norm(self) -> float | None:
        """See `Step`."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item() if gradients else None


class StepByHand:
    """Without autograd, for the perceptron: the same gradients in half the time.

    Every rank scales its part's gradient by 1 / n, so that the sum over ranks is the mean over the
    global batch.
    """

    def __init__(
        self,
        perceptron: Perceptron | CapturedPerceptron,
        optimizer: FlatSGD,
        gradients: GradientSum,
        way: str,
    ) -> None:
        """Train what `perceptron` computes with, by `optimizer`; sum as `sum_over_ranks` says."""
        self.way = way
        # What a GPU is asked for it does later: nobody could say how long that takes.
        on_cpu = optimizer.flat.device.type == "cpu"
        self.seconds_adding_up = 0.0 if on_cpu else None
        self._sum: Tensor | None = None
        self._perceptron = perceptron
        self._optimizer = optimizer
        self._gradients = gradients
        self._views = optimizer.views(gradients.own)
        self._scales: dict[int, Tensor] = {}
        self._threads = QuickestThreads(torch.get_num_threads() if on_cpu else 1)

    def __call__(self, pixels: Tensor, labels: Tensor, samples: int) -> Tensor:
        """See `Step`; leaves torch with the number of threads that it has found the quickest."""
        self._threads.begin_step()
        scale = self._scales.get(samples)
        if scale is None:
            scale = self._scales[samples] = torch.tensor(1 / samples, device=pixels.device)
        loss_sum = self._perceptron.gradients(pixels, labels, scale, self._views)
        begun = time.perf_counter()
        self._sum = self._gradients.add_up(self._gradients.own)
        if self.seconds_adding_up is not None:
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
    cuda_graphs: bool = True
    """Launch the perceptron's kernels on a GPU as one."""
    precision: Precision = "fp32"
    """Of matrix products; as `use_precision` has set it."""
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
    share, timeout = choice.share_memory, choice.timeout
    exactly = "" if choice.precision == "fp32" else f", {choice.precision}"
    how = "autograd"
    if isinstance(optimizer, FlatSGD) and _by_formulas(model, choice):
        perceptron, how = _by_hand(model, world, choice.cuda_graphs)
        if perceptron is not None:
            gradients, way = sum_over_ranks(world, len(optimizer.flat), share, timeout)
            return StepByHand(perceptron, optimizer, gradients, f"{how}{exactly}, {way}")
    if choice.compile:
        model, how = _compiled(model, world)
    parallel, way = average_over_ranks(model, world, share, timeout, choice.compression)
    way = f"{how}{exactly}, {way}"
    return AutogradStep(parallel, optimizer, world.world_size, way, choice.precision == "bf16")


def use_precision(precision: Precision, device: torch.device) -> None:
    """Let float32 matrix products on a GPU be of TF32, if that is meant.

    Raises:
        UserError: `device` has no TF32.
    """
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError("--precision tf32: needs a GPU; use fp32, or bf16")
        torch.set_float32_matmul_precision("high")


def _by_formulas(model: nn.Module, choice: Choice) -> TypeGuard[MLP]:
    """Whether the gradients may be computed by the perceptron's own formulas."""
    plain = not (choice.autograd or choice.compile) and choice.compression == "none"
    return type(model) is MLP and plain and choice.precision != "bf16"


def _by_hand(
    model: MLP, world: World, cuda_graphs: bool
) -> tuple[Perceptron | CapturedPerceptron | None, str]:
    """The perceptron without autograd, None if some rank cannot; and what became of that."""
    perceptron = Perceptron([model.hidden1, model.hidden2, model.out])
    if world.device.type == "cpu":
        return perceptron, "by hand"
    if not cuda_graphs:
        return None, "autograd"
    captured = CapturedPerceptron(perceptron)
    failures = [text for text in world.gather(fault(captured, model)) if text is not None]
    if failures:
        return None, f"autograd, no CUDA graphs ({failures[0]})"
    return captured, "by hand in CUDA graphs"


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
