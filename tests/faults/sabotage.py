"""The real job, with one fault built in: `sabotage.py FAULT RANK FLAGS...` under torchrun.

The fault happens on one rank only, at its fifth batch or at the start; the rest is `train_ddp.py`.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_ddp
from mnist_dist import model
from mnist_dist.run.state import TrainState

_AT_BATCH = 5


def main() -> int:
    fault, rank, *flags = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        FAULTS[fault](flags)
    return train_ddp.main(flags) or 0


def at_batch(act: Any) -> None:
    """Let `act` change the pixels of one training batch."""
    original, seen = train_ddp.train_step, 0

    def train_step(model: Any, optimizer: Any, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == _AT_BATCH:
            images = act(images)
        return original(model, optimizer, images, *rest)

    train_ddp.train_step = train_step  # type: ignore[assignment]


def raise_error(_: list[str]) -> None:
    def act(pixels: torch.Tensor) -> torch.Tensor:
        raise ValueError("the cat sat on the keyboard")

    at_batch(act)


def not_a_number(_: list[str]) -> None:
    at_batch(lambda pixels: pixels * float("nan"))


def out_of_memory(_: list[str]) -> None:
    def act(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    at_batch(act)


def other_weights(_: list[str]) -> None:
    original = model.MLP.__init__

    def init(self: model.MLP) -> None:
        original(self)
        with torch.no_grad():
            self.out.bias[3] += 1

    model.MLP.__init__ = init  # type: ignore[method-assign]


def flipped_weight(_: list[str]) -> None:
    """A bit of a weight changes in the middle of an epoch, as by bad memory."""
    original = TrainState.count_steps

    def count_steps(self: TrainState, loss_sums: torch.Tensor) -> None:
        original(self, loss_sums)
        if self.step == _AT_BATCH:
            with torch.no_grad():
                next(iter(self.model.parameters()))[0, 0] += 2**-20

    TrainState.count_steps = count_steps  # type: ignore[method-assign]


def infinite_bias(_: list[str]) -> None:
    """A unit that is always off after step 6: no loss shows it."""
    original = TrainState.count_steps

    def count_steps(self: TrainState, loss_sums: torch.Tensor) -> None:
        original(self, loss_sums)
        if self.step == 6:
            with torch.no_grad():
                self.model.get_parameter("hidden1.bias")[0] = -math.inf

    TrainState.count_steps = count_steps  # type: ignore[method-assign]


def other_flag(flags: list[str]) -> None:
    flags.append("--lr=0.75")


def other_data(flags: list[str]) -> None:
    flags.append("--data=auto")


FAULTS: dict[str, Callable[[list[str]], None]] = {
    "raise_error": raise_error,
    "not_a_number": not_a_number,
    "out_of_memory": out_of_memory,
    "other_weights": other_weights,
    "flipped_weight": flipped_weight,
    "infinite_bias": infinite_bias,
    "other_flag": other_flag,
    "other_data": other_data,
}


if __name__ == "__main__":
    sys.exit(main())
