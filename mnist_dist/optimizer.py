"""The optimizer and its learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from mnist_dist.torch_internals import (
    foreach_add,
    foreach_add_,
    foreach_mul_,
    fused_sgd_,
    without_compiler,
    without_profiler,
)

Schedule = Literal["constant", "onecycle"]
TrainStep = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor, Tensor], Tensor]
"""(model, optimizer, images, labels, scale) to this rank's summed loss, as `train_step`."""


class LeanSGD(torch.optim.SGD):
    """torch.optim.SGD without its per-step bookkeeping: the same bits, the same state dict.

    For a model this small, the `step` of torch.optim.SGD spends more time on grouping tensors,
    profiling hooks and closures than on arithmetic. Works for one group of dense float parameters
    on one device.

    On a GPU one fused kernel makes the update. The learning rate may then be a tensor on the GPU,
    as a CUDA graph needs it, which gives the bits of the same number as a float.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group of parameters that there can be.

        Raises:
            ValueError: there is one already.
        """
        if self.param_groups:
            raise ValueError("LeanSGD takes one group of parameters; use torch.optim.SGD for more")
        without_compiler(torch.optim.SGD.add_param_group)(self, param_group)

    state_dict = without_compiler(torch.optim.SGD.state_dict)
    load_state_dict = without_compiler(torch.optim.SGD.load_state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients. `set_to_none` only matches torch's signature."""
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
        buffers = self._momentum_buffers(parameters) if group["momentum"] else []
        if parameters[0].is_cuda or isinstance(group["lr"], Tensor):
            _fused_update(parameters, gradients, buffers, group)
            return
        if group["weight_decay"]:
            gradients = foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if buffers:
            foreach_mul_(buffers, group["momentum"])
            foreach_add_(buffers, gradients)
            gradients = buffers
        foreach_add_(parameters, gradients, alpha=-group["lr"])

    def _momentum_buffers(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the momentum buffers; zeros at first, to which a step adds its gradients."""
        buffers = [self.state[p].get("momentum_buffer") for p in parameters]
        if any(buffer is None for buffer in buffers):
            for p, buffer in zip(parameters, buffers, strict=True):
                if buffer is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        return buffers


def _fused_update(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    """Make SGD's update in one kernel; `buffers` are empty without momentum."""
    lr = group["lr"]
    fused_sgd_(
        parameters,
        gradients,
        buffers,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=lr if isinstance(lr, Tensor) else float(np.float32(lr)),  # the bits of a tensor's
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def build_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: Schedule,
    total_steps: int,
) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Build SGD and its learning-rate scheduler, None for a constant rate.

    `model` must be on its device already. With "onecycle", torch's OneCycleLR over `total_steps`,
    the steps of the whole run, `lr` is the peak.
    """
    optimizer = LeanSGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    if schedule == "constant":
        return optimizer, None
    return optimizer, OneCycleLR(optimizer, lr, total_steps, cycle_momentum=False)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """Return the Euclidean norm of the last step's gradient, None before the first step."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients).item() if gradients else None
