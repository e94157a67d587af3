"""The model: the original script's MLP, or your replacement."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.dimensions import IMAGE_PIXELS, NUM_CLASSES


class MLP(nn.Module):
    """784-128-256-10 with ReLU and the attribute names of the original script."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(IMAGE_PIXELS, 128)
        self.hidden2 = nn.Linear(128, 256)
        self.out = nn.Linear(256, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 784) float32 pixels in [0, 1) to (N, 10) float32 logits."""
        hidden = F.relu(self.hidden1(images))
        hidden = F.relu(self.hidden2(hidden))
        logits: Tensor = self.out(hidden)
        return logits

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return "784-128-256-10"


def build_model() -> nn.Module:
    """Build the model on the CPU with random weights, from torch's global generator.

    Training and all commands use it. It must map (N, 784) float32 pixels in [0, 1), also for N = 0,
    to (N, 10) float32 logits.
    """
    return MLP()


def describe(model: nn.Module) -> str:
    """Describe the model and its size in one line."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.extra_repr() or type(model).__name__}, {parameters:,} parameters"


def state_dict_mismatch(weights: Any, model: nn.Module) -> str | None:
    """Describe the first mismatch between `weights` and the parameters of `model`; None if none.

    `weights` may be any object that a file contained. Names, shapes and kinds of dtype must match.
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
    return f"it has an unknown {more[0]}" if more else None


def pixels(images: Tensor, out: Tensor | None = None) -> Tensor:
    """Convert (N, 784) uint8 to float32 byte/256, bitwise the values of the original mnist.pkl.gz.

    With `out`, fill and return it.
    """
    if out is None:
        return images * (1 / 256)  # one kernel, which gives float32
    return out.copy_(images).mul_(1 / 256)  # faster on a CPU
