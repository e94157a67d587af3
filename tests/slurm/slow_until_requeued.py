"""The real job, of which each step takes 5 ms more until Slurm has started it again.

A test copies it to `train_ddp.py`, beside the real one under the name `real_job.py`: what befalls
the job then happens while it trains, however long Slurm takes over it.
"""

import importlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from mnist_dist.evaluation import train_epoch


def slowly(*arguments: Any) -> Iterator[torch.Tensor]:
    for loss_sum in train_epoch(*arguments):
        time.sleep(0.005)
        yield loss_sum


if __name__ == "__main__":
    real_job = importlib.import_module("real_job")
    if "SLURM_RESTART_COUNT" not in os.environ:
        real_job.train_epoch = slowly  # type: ignore[attr-defined]
    real_job.run()
