"""Random shifts of the training images: what they do, and that only the global batch decides."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recording_step import RecordingStep

from mnist_dist.augmentation import random_shifts, shifted
from mnist_dist.data import Split
from mnist_dist.evaluation import train_epoch
from mnist_dist.sampling import Sharding

SAMPLES = 23


@given(st.integers(-27, 27), st.integers(-27, 27), st.integers(0, 3))
def test_every_pixel_moves_by_the_shift_and_blank_fills_in(
    down: int, right: int, count: int
) -> None:
    images = torch.randint(1, 256, (count, 784), dtype=torch.uint8)
    moved = shifted(images, down, right).view(count, 28, 28)
    assert moved.dtype == torch.uint8
    expected = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for row, column in product(range(28), range(28)):
        if 0 <= row - down < 28 and 0 <= column - right < 28:
            expected[:, row, column] = images.view(count, 28, 28)[:, row - down, column - right]
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_all_shifts_up_to_the_largest_are_about_equally_likely(largest: int) -> None:
    shifts = random_shifts(largest, seed=0, epoch=0, batches=9000)
    steps = range(-largest, largest + 1)
    possible = {(down, right) for down in steps for right in steps}
    assert set(shifts) == possible
    for shift in possible:
        assert shifts.count(shift) == pytest.approx(9000 / len(possible), rel=0.25)


def test_every_seed_and_every_epoch_has_shifts_of_its_own() -> None:
    draws = [
        tuple(random_shifts(1, seed, epoch, 50)) for seed, epoch in product(range(4), range(4))
    ]
    assert len(set(draws)) == len(draws)
    assert draws[0] == tuple(random_shifts(1, 0, 0, 50))


def batches_seen(split: Split, world_size: int, first_batch: int = 0) -> list[set[bytes]]:
    """The images of every global batch of epoch 2 that the ranks' steps are given together."""
    ranks = []
    for rank in range(world_size):
        step = RecordingStep()
        sharding = Sharding(SAMPLES, 5, rank, world_size, seed=7)
        for _ in train_epoch(step, None, split, sharding, 2, first_batch, random_shift=3):
            pass
        ranks.append([images for images, _, _ in step.seen])
    batches = zip(*ranks, strict=True)
    return [{row.numpy().tobytes() for part in parts for row in part} for parts in batches]


def test_any_number_of_ranks_and_a_resume_within_the_epoch_see_the_same_shifted_batches() -> None:
    images = torch.randint(0, 256, (SAMPLES, 784), dtype=torch.uint8)
    split = Split(images, torch.zeros(SAMPLES, dtype=torch.int64))
    whole = batches_seen(split, world_size=1)
    originals = {row.numpy().tobytes() for row in images.float() / 256}
    assert not whole[0] & originals, "the first batch of this epoch is moved"
    for world_size in (2, 3, 7):
        assert batches_seen(split, world_size) == whole, world_size
    assert batches_seen(split, world_size=2, first_batch=2) == whole[2:]
