"""The real job, of which each step takes a millisecond more: epochs are long on any machine."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_ddp
from mnist_dist.engine import train_epoch


def slowly(*arguments: Any) -> Iterator[torch.Tensor]:
    for loss_sum in train_epoch(*arguments):
        time.sleep(0.001)
        yield loss_sum


if __name__ == "__main__":
    train_ddp.train_epoch = slowly  # type: ignore[assignment, attr-defined]
    train_ddp.run()
