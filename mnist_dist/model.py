"""The model: the original script's perceptron, or what you put in its place."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """784-128-256-10 with ReLU; the attribute names are those of the original's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 128)
        self.hidden2 = nn.Linear(128, 256)
        self.out = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 784) float32 pixels in [0, 1) to (N, 10) float32 logits."""
        hidden = F.relu(self.hidden1(images))
        hidden = F.relu(self.hidden2(hidden))
        logits: Tensor = self.out(hidden)
        return logits

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return "784-128-256-10"


def build_model() -> nn.Module:
    """The model of this project, on the CPU, with weights drawn from torch's random numbers.

    All that trains, evaluates, predicts, exports or examines takes it from here. It must take
    (N, 784) float32 pixels in [0, 1), for N of 0, too, and give (N, 10) float32 logits.
    """
    return MLP()


def describe(model: nn.Module) -> str:
    """What it is and how large, for a person."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.extra_repr() or type(model).__name__}, {parameters:,} parameters"


def difference(weights: Any, model: nn.Module) -> str | None:
    """The first way in which `weights` are not those of `model`, for a person; None if they are.

    Args:
        weights: as from `nn.Module.state_dict`, or whatever else a file held in its place.
        model: whose weights' names and shapes are meant; the values do not matter.
    """
    own = model.state_dict()
    if not isinstance(weights, Mapping):
        return "it has no weights"
    for name, weight in own.items():
        if name not in weights:
            return f"it has no {name}"
        found = weights[name]
        if not isinstance(found, Tensor):
            return f"its {name} is {type(found).__name__}"
        if found.shape != weight.shape:
            return f"its {name} is {tuple(found.shape)}, this one's {tuple(weight.shape)}"
        if found.is_floating_point() != weight.is_floating_point():
            return f"its {name} is {found.dtype}, this one's {weight.dtype}"
    more = [name for name in weights if name not in own]
    return f"there is no place for its {more[0]}" if more else None


def pixels(images: Tensor, out: Tensor | None = None) -> Tensor:
    """(N, 784) uint8 to float32 byte/256: bitwise the values of the original mnist.pkl.gz.

    Args:
        images: as `Split` has them.
        out: (N, 784) float32, to be filled and returned; None for new memory.
    """
    values = images.to(torch.float32) if out is None else out.copy_(images)
    return values.mul_(1 / 256)
