"""torch.optim.SGD with its tensors side by side in memory, so that a step is few operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without its decorator, which imports torch's compiler.

    That import takes as long as torch's own, for a compiler that nothing here uses.
    """
    plain: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return plain


class FlatSGD(torch.optim.SGD):
    """SGD on parameters that are views of one vector; `step` is torch's, `apply` is for vectors.

    Both compute the same, element by element, to the last bit, and have the same state dict.
    """

    add_param_group = _without_compiler(torch.optim.SGD.add_param_group)
    state_dict = _without_compiler(torch.optim.SGD.state_dict)
    zero_grad = _without_compiler(torch.optim.SGD.zero_grad)

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        """Move the parameters of `model`, all float32 on one device, into one vector."""
        parameters = list(model.parameters())
        super().__init__(parameters, lr, momentum, weight_decay=weight_decay)
        self.flat = nn.utils.parameters_to_vector(parameters).detach()
        for parameter, view in zip(parameters, self.views(self.flat), strict=True):
            parameter.data = view
        self._momentum: Tensor | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat`, (elements of all parameters,), in the shapes of the parameters."""
        parameters = self.param_groups[0]["params"]
        parts = flat.split([parameter.numel() for parameter in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]

    def apply(self, gradients: Tensor) -> None:
        """Step along `gradients`, a vector like `flat`, which stays as it is."""
        self._opt_called = True  # a scheduler asks whether there was a step before its own
        group = self.param_groups[0]
        if group["weight_decay"]:
            gradients = gradients.add(self.flat, alpha=group["weight_decay"])
        if group["momentum"]:
            if self._momentum is None:
                self._momentum = self._gather_momentum()
            gradients = self._momentum.mul_(group["momentum"]).add_(gradients)
        self.flat.add_(gradients, alpha=-group["lr"])

    def _gather_momentum(self) -> Tensor:
        """One vector of the momentum that the state holds, zeros at first; the state views it."""
        parameters = self.param_groups[0]["params"]
        nothing = torch.zeros_like(self.flat)
        for parameter, view in zip(parameters, self.views(nothing), strict=True):
            before = self.state[parameter].get("momentum_buffer")
            if before is not None:
                view.copy_(before)
            self.state[parameter]["momentum_buffer"] = view
        return nothing

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own."""
        _without_compiler(torch.optim.SGD.load_state_dict)(self, state_dict)
        self._momentum = None
