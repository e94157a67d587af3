"""oneDNN's matrix products, a part of torch that it takes for float32 in few places by itself.

On x86 CPUs torch multiplies float32 matrices by MKL. On an AMD processor oneDNN took about two
thirds of the time for the perceptron's large products (docs/performance.md).
"""

import platform
from typing import Literal

import torch
from torch import Tensor


def is_here(device: torch.device) -> bool:
    """Whether this torch has it for `device`; it is made for x86 CPUs."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    here = x86 and device.type == "cpu" and torch.backends.mkldnn.is_available()
    return here and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    after: Literal["none", "relu"] = "none",
) -> Tensor:
    """Like F.linear, with `after` on the way: (n, k) and (m, k) float32 to (n, m)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, after, [], "")
    return product


def equals_torchs_own(rows: int, columns: int, length: int) -> bool:
    """Whether it gives the last bit of what torch gives, of a (rows, length) and its (columns, ..).

    Both add up `length` terms an element. The bits are the same where both do so in one go, and
    depend on the library, the processor and the threads, so it is tried.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(length, rows, generator=generator).t()
    right = torch.randn(length, columns, generator=generator)
    return torch.equal(left.mm(right), linear(left, right.t()))
