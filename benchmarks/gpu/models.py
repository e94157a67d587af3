"""Models other than the MLP, for the checks."""

import torch
from torch import Tensor, nn

from mnist_dist.model import MLP


class SmallCNN(nn.Sequential):
    """The model of examples/small_cnn.patch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )


class DropoutMLP(MLP):
    """Draws random numbers in each training step."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.2, self.training))


class SmoothMLP(MLP):
    """The MLP without ReLU's step in the derivative."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden2(torch.tanh(self.hidden1(images))))
        logits: Tensor = self.out(hidden)
        return logits


class HangingMLP(MLP):
    """Keeps the GPU busy for seconds in each step of a graph."""

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            torch.cuda._sleep(12_000_000_000)  # cycles
        return super().forward(images)


class ReadingMLP(MLP):
    """Reads from the device in each step, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if logits.sum().item() < 1e9 else logits * 0


class UncapturableMLP(MLP):
    """Does in a capture, and only there, what no capture allows."""

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return super().forward(images)
