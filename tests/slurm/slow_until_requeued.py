"""The real job, of which each step takes 5 ms more until Slurm has started it again.

A test copies it to `train_ddp.py`, beside the real one under the name `real_job.py`: what befalls
the job then happens while it trains, however long Slurm takes over it.
"""

import importlib
import os
import time
from typing import Any

import torch

if __name__ == "__main__":
    real_job = importlib.import_module("real_job")
    train_step = real_job.train_step

    def slowly(*arguments: Any) -> torch.Tensor:
        loss: torch.Tensor = train_step(*arguments)
        time.sleep(0.005)
        return loss

    if "SLURM_RESTART_COUNT" not in os.environ:
        real_job.train_step = slowly  # type: ignore[attr-defined]
    real_job.run()
