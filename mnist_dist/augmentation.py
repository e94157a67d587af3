"""Random shifts of the training images: the same at every number of processes and every resume."""

import random

import torch.nn.functional as F
from torch import Tensor

_SIDE = 28


def random_shifts(largest: int, seed: int, epoch: int, batches: int) -> list[tuple[int, int]]:
    """How far each global batch of an epoch moves: pixels (down, right), negative for up and left.

    They follow from the arguments alone, so every rank has the same, and a resume in the middle of
    an epoch needs no saved state. A batch moves as one: that costs one operation, whatever its
    size, and teaches the model as much as a shift for each sample (docs/performance.md).

    Args:
        largest: all whole numbers from -largest to largest are equally likely; 0 for no shifts.
        seed: of the run.
        epoch: 0-based.
        batches: global batches in the epoch.
    """
    if largest == 0:
        return [(0, 0)] * batches
    generator = random.Random(f"shifts of epoch {epoch}, seed {seed}")

    def pixels() -> int:
        return generator.randint(-largest, largest)

    return [(pixels(), pixels()) for _ in range(batches)]


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """(N, 784) images, moved by less than 28 pixels: what leaves is cut off, what enters is 0."""
    if down == right == 0:
        return images
    rows = images.unflatten(1, (_SIDE, _SIDE))
    return F.pad(rows, (right, -right, down, -down)).flatten(1)
