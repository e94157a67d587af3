"""The perceptron's forward and backward pass written out, without autograd's bookkeeping.

Autograd's recording and replaying costs about as much as the arithmetic of so small a model. Here
are the kernels that it would call, in its order and on the same operands, and in place of one a
quicker one with the same bits: the gradients are equal to the last bit.
"""

import torch
from torch import Tensor, nn

from mnist_dist import onednn

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
        self._has_onednn = onednn.is_here(layers[0].weight.device)
        self._takes_onednn: dict[int, bool] = {}

    def gradients(self, pixels: Tensor, labels: Tensor, scale: Tensor, out: list[Tensor]) -> Tensor:
        """Backpropagate `scale` times the sum of cross entropies.

        Args:
            pixels: (n, inputs) float32; n may be 0.
            labels: (n,) int64.
            scale: () float32.
            out: filled with the gradient of each layer's weight and bias, in their shapes.

        Returns:
            The sum of cross entropies, not scaled: () float32.
        """
        inputs = [pixels]
        for transposed, bias in self._layers[:-1]:
            inputs.append(torch.addmm(bias, inputs[-1], transposed).relu_())
        transposed, bias = self._layers[-1]
        logits = torch.addmm(bias, inputs[-1], transposed)
        log_shares = torch._log_softmax(logits, 1, False)
        loss_sum: Tensor
        loss_sum, weights = _aten.nll_loss_forward.default(
            log_shares, labels, None, _SUM, _NO_LABEL
        )
        gradient = _aten.nll_loss_backward.default(
            scale, log_shares, labels, None, _SUM, _NO_LABEL, weights
        )
        gradient = torch._log_softmax_backward_data(gradient, log_shares, 1, torch.float32)
        for number in reversed(range(1, len(self._layers))):
            torch.mm(gradient.t(), inputs[number], out=out[2 * number])
            torch.sum(gradient, 0, out=out[2 * number + 1])
            gradient = gradient.mm(self._layers[number][0].t())
            gradient = _aten.threshold_backward.default(gradient, inputs[number], 0)
        self._first_weights_gradient(gradient, pixels, out[0])
        torch.sum(gradient, 0, out=out[1])
        return loss_sum

    def _first_weights_gradient(self, gradient: Tensor, pixels: Tensor, out: Tensor) -> None:
        """The largest product of all."""
        rows = len(pixels)
        if rows not in self._takes_onednn:
            self._takes_onednn[rows] = (
                self._has_onednn
                and rows >= _FEWEST_ROWS
                and onednn.equals_torchs_own(out.shape[0], out.shape[1], rows)
            )
        if self._takes_onednn[rows]:
            out.copy_(onednn.linear(gradient.t(), pixels.t()))
        else:
            torch.mm(gradient.t(), pixels, out=out)
