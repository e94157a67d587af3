"""Logits without gradients, by the quickest matrix products at hand."""

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnist_dist.model import MLP


def quick_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from pixels to `model`'s logits, equal to its own to rounding.

    On x86 CPUs torch multiplies matrices by MKL. oneDNN, which is part of torch too, took about
    half the time on an AMD processor (docs/performance.md), and adds bias and ReLU on the way.

    Args:
        model: its weights are used as they are at each call. Any but the perceptron on such a CPU
            is returned as it is.
    """
    if type(model) is not MLP or not _has_onednn(model.out.weight.device):
        return model
    layers = [(model.hidden1, "relu"), (model.hidden2, "relu"), (model.out, "none")]

    def logits(pixels: Tensor) -> Tensor:
        values = pixels
        for layer, after in layers:
            values = torch.ops.mkldnn._linear_pointwise(
                values, layer.weight, layer.bias, after, [], ""
            )
        return values

    return logits


def _has_onednn(device: torch.device) -> bool:
    x86 = platform.machine() in ("x86_64", "AMD64")
    here = x86 and device.type == "cpu" and torch.backends.mkldnn.is_available()
    return here and hasattr(torch.ops.mkldnn, "_linear_pointwise")
