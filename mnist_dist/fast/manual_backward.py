"""The MLP's forward and backward pass without autograd's bookkeeping.

Recording and replaying a graph costs autograd about as much as the arithmetic of so small a model.
This calls the same kernels, in the same order and on the same operands, so on any number of threads
the gradients are bitwise those of autograd on one thread.
"""

import torch
from torch import Tensor, nn

from mnist_dist.torch_internals import (
    log_softmax,
    log_softmax_backward,
    nll_loss_backward,
    nll_loss_forward,
    threshold_backward,
)

_SUM = 2  # ATen's number for reduction="sum"
_IGNORE_INDEX = -100  # F.cross_entropy's default


class ManualBackward:
    """Gradients of linear layers with ReLU between them and a summed cross-entropy at the end."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Use the weights and biases of `layers`, whatever they are at each call."""
        # Detached, so that no operation on them is recorded.
        self._layers = [(layer.weight.detach().t(), layer.bias.detach()) for layer in layers]
        self._can_share: dict[tuple[int, int], bool] = {}

    def __call__(self, images: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]) -> Tensor:
        """Compute the gradients of `scale` times the summed cross-entropy.

        The large matrix products use torch's threads if that gives the bits of one thread. Whether
        it does depends on the library, the processor and the number of rows, so it is tried once
        for each number of rows and threads.

        Args:
            images: (n, inputs) float32; n may be 0.
            labels: (n,) int64.
            scale: () float32.
            out: filled with the gradient of each layer's weight and bias, in their shapes.

        Returns:
            The summed cross-entropy, not scaled: () float32.
        """
        threads = torch.get_num_threads()
        key = len(images), threads
        if key not in self._can_share:
            self._can_share[key] = self._matches_one_thread(*key, images.shape[1], out)
        if not self._can_share[key]:
            torch.set_num_threads(1)
        loss_sum = self._gradients(images, labels, scale, out)
        torch.set_num_threads(threads)
        return loss_sum

    def _matches_one_thread(self, rows: int, threads: int, inputs: int, out: list[Tensor]) -> bool:
        """Return whether `threads` give the bits of one, tried on a random batch."""
        if threads == 1:
            return True
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(rows, inputs, generator=generator)
        labels = torch.randint(self._layers[-1][1].numel(), (rows,), generator=generator)
        results = []
        for number in (1, threads):
            torch.set_num_threads(number)
            loss_sum = self._gradients(images, labels, torch.tensor(1.0), out)
            results.append([loss_sum, *(gradient.clone() for gradient in out)])
        return all(map(torch.equal, *results))

    def _gradients(
        self, images: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]
    ) -> Tensor:
        inputs = [images]
        for weight, bias in self._layers[:-1]:
            inputs.append(torch.addmm(bias, inputs[-1], weight).relu_())
        # The last layer's products are so narrow that threads cost more than they save, and MKL
        # sums in another order on several.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        loss_sum, gradient = self._last_layer(inputs[-1], labels, scale, out)
        torch.set_num_threads(threads)
        for number in reversed(range(len(self._layers) - 1)):
            torch.mm(gradient.t(), inputs[number], out=out[2 * number])
            torch.sum(gradient, 0, out=out[2 * number + 1])
            if number:
                gradient = self._input_gradient(number, gradient, inputs[number])
        return loss_sum

    def _last_layer(
        self, inputs: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the gradient before this layer and its ReLU."""
        weight, bias = self._layers[-1]
        log_probabilities = log_softmax(torch.addmm(bias, inputs, weight), 1, False)
        loss_sum, total_weight = nll_loss_forward(
            log_probabilities, labels, None, _SUM, _IGNORE_INDEX
        )
        gradient = nll_loss_backward(
            scale, log_probabilities, labels, None, _SUM, _IGNORE_INDEX, total_weight
        )
        gradient = log_softmax_backward(gradient, log_probabilities, 1, torch.float32)
        torch.mm(gradient.t(), inputs, out=out[-2])
        torch.sum(gradient, 0, out=out[-1])
        return loss_sum, self._input_gradient(len(self._layers) - 1, gradient, inputs)

    def _input_gradient(self, number: int, gradient: Tensor, inputs: Tensor) -> Tensor:
        """Return the gradient before layer `number` and the ReLU that made its `inputs`."""
        return threshold_backward(gradient.mm(self._layers[number][0].t()), inputs, 0)
