"""The perceptron's kernels on a GPU as one launch: a CUDA graph.

A step of so small a model is some twenty kernels of a few microseconds each, which take longer to
launch one by one than to run. A graph is recorded once for each size of a batch and replayed on
what is copied into its inputs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
The sum over ranks is no part of it: NCCL watches over its own calls only, and with it
`--step-timeout` does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.fast.manual_backward import Perceptron

Replay = Callable[[Tensor, Tensor, Tensor], Tensor]


class CapturedPerceptron:
    """Like `Perceptron`, on a GPU. Not safe to call while another thread captures."""

    def __init__(self, perceptron: Perceptron) -> None:
        """Record what `perceptron` does, when it is asked for."""
        self._perceptron = perceptron
        self._replays: dict[tuple[int, int], Replay] = {}

    def gradients(self, pixels: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]) -> Tensor:
        """See `Perceptron.gradients`; all tensors are on the GPU."""
        if len(labels) == 0:  # there is nothing to capture
            return self._perceptron.gradients(pixels, labels, scale, out)
        key = len(labels), out[0].data_ptr()
        if key not in self._replays:
            self._replays[key] = self._capture(pixels, labels, scale, out)
        return self._replays[key](pixels, labels, scale)

    def _capture(self, pixels: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]) -> Replay:
        inputs = pixels.clone(), labels.clone(), scale.clone()
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries make their workspaces before they are captured
            for _ in range(3):
                self._perceptron.gradients(*inputs, out)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's thread, which asks for events of its own, must not end the capture of this one.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss_sum = self._perceptron.gradients(*inputs, out)

        def replay(*given: Tensor) -> Tensor:
            for kept, new in zip(inputs, given, strict=True):
                kept.copy_(new)
            graph.replay()
            return loss_sum.clone()

        return replay


def fault(perceptron: Perceptron | CapturedPerceptron, model: nn.Module) -> str | None:
    """Why `perceptron` cannot take the place of autograd on `model`; None if it can.

    It computes the gradients of two batches, one captured and one replayed, as autograd does.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(1 / 8, device=device)
    out = [torch.empty_like(parameter) for parameter in parameters]
    try:
        for _ in range(2):
            pixels = torch.rand(8, 784, generator=generator).to(device)
            labels = torch.randint(10, (8,), generator=generator).to(device)
            loss = F.cross_entropy(model(pixels), labels, reduction="sum")
            expected = torch.autograd.grad(loss * scale, parameters)
            loss_sum = perceptron.gradients(pixels, labels, scale, out)
            pairs = [(loss_sum, loss.detach()), *zip(out, expected, strict=True)]
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs):
                return "a replayed graph gives other gradients than autograd"
    except RuntimeError as error:  # whatever a driver or a library makes torch raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
