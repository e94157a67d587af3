"""The real job, of which each step takes 4 ms more: epochs are long on any machine.

With SLOW_START=SECONDS in the environment the first step comes that much later.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_ddp
from mnist_dist.steps import prepare_steps

_train_step = train_ddp.train_step


def slowly(*arguments: Any) -> torch.Tensor:
    loss = _train_step(*arguments)
    time.sleep(0.004)
    return loss


def late(*arguments: Any) -> Any:
    time.sleep(float(os.environ.get("SLOW_START", "0")))
    return prepare_steps(*arguments)


if __name__ == "__main__":
    train_ddp.train_step = slowly  # type: ignore[assignment]
    train_ddp.prepare_steps = late  # type: ignore[assignment, attr-defined]
    train_ddp.run()
