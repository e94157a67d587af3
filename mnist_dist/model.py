"""The model: the original script's perceptron."""

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
