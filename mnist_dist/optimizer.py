"""The optimizer and its learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from mnist_dist.torch_internals import (
    foreach_add,
    foreach_add_,
    foreach_mul_,
    without_compiler,
    without_profiler,
)

Schedule = Literal["constant", "onecycle"]


class LeanSGD(torch.optim.SGD):
    """torch.optim.SGD without its per-step bookkeeping: the same bits, the same state dict.

    For a model this small torch's own `step` spends more time on grouping tensors, profiling hooks
    and closures than on arithmetic. Works for one group of dense float parameters on one device.
    """

    add_param_group = without_compiler(torch.optim.SGD.add_param_group)
    state_dict = without_compiler(torch.optim.SGD.state_dict)
    load_state_dict = without_compiler(torch.optim.SGD.load_state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. `set_to_none` is there for torch's signature."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @without_profiler
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters along their gradients. `closure` is not supported."""
        group = self.param_groups[0]
        parameters: list[Tensor] = group["params"]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if len(gradients) < len(parameters):  # a layer that this step did not use
            parameters = [p for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            gradients = foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if group["momentum"]:
            gradients = self._momentum(parameters, gradients, group["momentum"])
        foreach_add_(parameters, gradients, alpha=-group["lr"])

    def _momentum(
        self, parameters: list[Tensor], gradients: list[Tensor], momentum: float
    ) -> list[Tensor]:
        """Update and return the momentum buffers, which start as the first gradients."""
        buffers = [self.state[p].get("momentum_buffer") for p in parameters]
        if any(buffer is None for buffer in buffers):
            for p, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
                if buffer is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(gradient)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        foreach_mul_(buffers, momentum)
        foreach_add_(buffers, gradients)
        return buffers


def build_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: Schedule,
    total_steps: int,
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Build SGD and its learning-rate scheduler, None for a constant rate.

    Args:
        model: on its device already.
        lr: learning rate; the peak with "onecycle".
        momentum: 0 for none.
        weight_decay: L2 penalty.
        schedule: "constant", or "onecycle" for torch's OneCycleLR over the whole run.
        total_steps: optimizer steps of the whole run.
    """
    optimizer = LeanSGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    if schedule == "constant":
        return optimizer, None
    return optimizer, OneCycleLR(optimizer, lr, total_steps, cycle_momentum=False)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """Return the Euclidean norm of the last step's gradient, None before the first step."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients).item() if gradients else None
