"""The perceptron's forward and backward pass written out, without autograd's bookkeeping.

Autograd's recording and replaying costs about as much as the arithmetic of so small a model. Here
are the kernels that it would call, in its order and on the same operands, and in place of one a
quicker one with the same bits: the gradients are, to the last bit, those of autograd on one thread,
however many threads there are.
"""

import torch
from torch import Tensor, nn

from mnist_dist.fast import onednn

_aten = torch.ops.aten
_SUM = 2  # aten's number for reduction="sum"
_NO_LABEL = -100  # F.cross_entropy's ignore_index
_FEWEST_ROWS = 32  # fewer are not worth oneDNN's copy of the product to where it is wanted


class Perceptron:
    """The gradients of layers with ReLU between them, ended by a summed cross entropy."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Use the weights and biases of `layers`, as they are at each call."""
        # Detached, so that no operation on them is recorded, whether autograd is on or off.
        self._layers = [(layer.weight.detach().t(), layer.bias.detach()) for layer in layers]
        self._device = layers[0].weight.device
        self._has_onednn = onednn.is_here(self._device)
        self._takes_onednn: dict[tuple[int, int], bool] = {}
        self._may_share: dict[tuple[int, int], bool] = {}

    def gradients(self, pixels: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]) -> Tensor:
        """Backpropagate `scale` times the sum of cross entropies.

        On a CPU the large products are shared among torch's threads if the bits stay those of one
        thread. That depends on the library, the processor and the number of rows, so it is tried
        once for each number of rows and of threads.

        Args:
            pixels: (n, inputs) float32; n may be 0.
            labels: (n,) int64.
            scale: () float32.
            out: filled with the gradient of each layer's weight and bias, in their shapes.

        Returns:
            The sum of cross entropies, not scaled: () float32.
        """
        threads = torch.get_num_threads()
        key = len(pixels), threads
        if key not in self._may_share:
            self._may_share[key] = self._has_the_bits_of_one(*key, pixels.shape[1], out)
        if not self._may_share[key]:
            torch.set_num_threads(1)
        loss_sum = self._gradients(pixels, labels, scale, out)
        torch.set_num_threads(threads)
        return loss_sum

    def _has_the_bits_of_one(self, rows: int, threads: int, inputs: int, out: list[Tensor]) -> bool:
        """Whether so many threads give the last bit of what one gives, by a batch made for it."""
        if threads == 1 or self._device.type != "cpu":
            return True
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(rows, inputs, generator=generator)
        labels = torch.randint(self._layers[-1][1].numel(), (rows,), generator=generator)
        found = []
        for number in (1, threads):
            torch.set_num_threads(number)
            loss_sum = self._gradients(pixels, labels, torch.tensor(1.0), out)
            found.append([loss_sum, *(gradient.clone() for gradient in out)])
        return all(map(torch.equal, *found))

    def _gradients(
        self, pixels: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]
    ) -> Tensor:
        inputs = [pixels]
        for transposed, bias in self._layers[:-1]:
            inputs.append(torch.addmm(bias, inputs[-1], transposed).relu_())
        # The last layer's products are so narrow that threads cost more than they save, and MKL
        # would add up in another order on several.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        loss_sum, gradient = self._last_layer(inputs[-1], labels, scale, out)
        torch.set_num_threads(threads)
        for number in reversed(range(1, len(self._layers) - 1)):
            torch.mm(gradient.t(), inputs[number], out=out[2 * number])
            torch.sum(gradient, 0, out=out[2 * number + 1])
            gradient = self._before(number, gradient, inputs[number])
        self._first_weights_gradient(gradient, pixels, out[0])
        torch.sum(gradient, 0, out=out[1])
        return loss_sum

    def _last_layer(
        self, inputs: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The sum of cross entropies, and the gradient before this layer and the ReLU."""
        transposed, bias = self._layers[-1]
        log_shares = torch._log_softmax(torch.addmm(bias, inputs, transposed), 1, False)
        loss_sum, weights = _aten.nll_loss_forward.default(
            log_shares, labels, None, _SUM, _NO_LABEL
        )
        gradient = _aten.nll_loss_backward.default(
            scale, log_shares, labels, None, _SUM, _NO_LABEL, weights
        )
        gradient = torch._log_softmax_backward_data(gradient, log_shares, 1, torch.float32)
        torch.mm(gradient.t(), inputs, out=out[-2])
        torch.sum(gradient, 0, out=out[-1])
        return loss_sum, self._before(len(self._layers) - 1, gradient, inputs)

    def _before(self, number: int, gradient: Tensor, inputs: Tensor) -> Tensor:
        """The gradient before layer `number` and the ReLU that made its `inputs`."""
        gradient = gradient.mm(self._layers[number][0].t())
        before: Tensor = _aten.threshold_backward.default(gradient, inputs, 0)
        return before

    def _first_weights_gradient(self, gradient: Tensor, pixels: Tensor, out: Tensor) -> None:
        """The largest product of all."""
        key = len(pixels), torch.get_num_threads()
        if key not in self._takes_onednn:
            self._takes_onednn[key] = (
                self._has_onednn
                and len(pixels) >= _FEWEST_ROWS
                and onednn.beats_torchs_own(out.shape[0], out.shape[1], len(pixels))
            )
        if self._takes_onednn[key]:
            out.copy_(onednn.linear(gradient.t(), pixels.t()))
        else:
            torch.mm(gradient.t(), pixels, out=out)
