"""The real job, of which each step takes a millisecond more: epochs are long on any machine.

With SLOW_START=SECONDS in the environment the first step comes that much later.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_ddp
from mnist_dist.evaluation import train_epoch
from mnist_dist.steps import Step, build_step


def slowly(*arguments: Any) -> Iterator[torch.Tensor]:
    for loss_sum in train_epoch(*arguments):
        time.sleep(0.001)
        yield loss_sum


def late(*arguments: Any) -> Step:
    time.sleep(float(os.environ.get("SLOW_START", "0")))
    return build_step(*arguments)


if __name__ == "__main__":
    train_ddp.train_epoch = slowly  # type: ignore[assignment, attr-defined]
    train_ddp.build_step = late  # type: ignore[assignment, attr-defined]
    train_ddp.run()
