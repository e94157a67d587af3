"""oneDNN's matrix products, a part of torch that it takes for float32 in few places by itself.

On x86 CPUs torch multiplies float32 matrices by MKL. Which of the two is quicker for the
perceptron's large products depends on the processor: one AMD EPYC differed from another.
"""

import platform
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

_TRIALS = 7


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


def beats_torchs_own(rows: int, columns: int, length: int) -> bool:
    """Whether it has the bits of torch's own product, in less time, of a (rows, length) matrix and
    a (columns, length) one as they come in a backward pass.

    Both add up `length` terms an element. The bits are the same where both do so in one go, and
    depend on the library and the processor, as the time does, so it is tried.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(length, rows, generator=generator).t()
    right = torch.randn(length, columns, generator=generator)
    out = torch.empty(rows, columns)

    def own() -> None:
        torch.mm(left, right, out=out)

    def other() -> None:
        out.copy_(linear(left, right.t()))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    same = torch.equal(left.mm(right), linear(left, right.t()))
    torch.set_num_threads(threads)
    if not same:
        return False
    seconds: dict[Callable[[], None], list[float]] = {own: [], other: []}
    for _ in range(_TRIALS):
        for product, taken in seconds.items():
            begun = time.perf_counter()
            product()
            taken.append(time.perf_counter() - begun)
    return min(seconds[other]) < min(seconds[own])
