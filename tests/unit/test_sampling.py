"""Sharding: which rank computes which part of which global batch."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split
from mnist_dist.evaluation import eval_shard
from mnist_dist.model import pixels
from mnist_dist.sampling import (
    Sharding,
    global_batches,
    local_indices,
    random_shifts,
    shift_images,
)

sizes = st.integers(1, 300)
batches = st.integers(1, 80)
worlds = st.integers(1, 12)


def sampler_of(sharding: Sharding, seed: int, epoch: int) -> "DistributedSampler[int]":
    sampler: DistributedSampler[int] = DistributedSampler(
        range(sharding.samples),  # type: ignore[arg-type]
        num_replicas=sharding.world_size,
        rank=sharding.rank,
        seed=seed,
    )
    sampler.set_epoch(epoch)
    return sampler


def indices_of(sharding: Sharding, seed: int, epoch: int) -> Tensor:
    return local_indices(sampler_of(sharding, seed, epoch), sharding)


def permutation(samples: int, seed: int, epoch: int) -> list[int]:
    """DistributedSampler's own order, as its only rank sees it."""
    return list(sampler_of(Sharding(samples, 1, 0, 1), seed, epoch))


@given(sizes, batches, worlds, st.integers(0, 5))
def test_ranks_together_take_exactly_the_global_batch(
    samples: int, batch_size: int, world_size: int, epoch: int
) -> None:
    order = permutation(samples, seed=3, epoch=epoch)
    ranks = [Sharding(samples, batch_size, r, world_size) for r in range(world_size)]
    indices = [indices_of(rank, seed=3, epoch=epoch) for rank in ranks]
    for batch in range(ranks[0].steps_per_epoch):
        taken: list[int] = []
        for rank, own in zip(ranks, indices, strict=True):
            taken += own[rank.local_slice(batch)].tolist()
        expected = order[batch * batch_size : (batch + 1) * batch_size]
        assert sorted(taken) == sorted(expected)
        assert len(taken) == ranks[0].batch_samples(batch)


@given(sizes, batches, worlds)
def test_every_sample_is_used_once_an_epoch(samples: int, batch_size: int, world_size: int) -> None:
    used: list[int] = []
    for rank in range(world_size):
        sharding = Sharding(samples, batch_size, rank, world_size)
        own = indices_of(sharding, seed=0, epoch=0)
        for batch in range(sharding.steps_per_epoch):
            used += own[sharding.local_slice(batch)].tolist()
    assert sorted(used) == list(range(samples))


def test_one_process_keeps_the_samplers_order_within_each_batch() -> None:
    sharding = Sharding(samples=100, global_batch_size=32, rank=0, world_size=1)
    assert indices_of(sharding, seed=7, epoch=2).tolist() == permutation(100, seed=7, epoch=2)
    assert [sharding.local_slice(k) for k in range(4)] == [
        slice(0, 32),
        slice(32, 64),
        slice(64, 96),
        slice(96, 100),
    ]


def test_fewer_samples_in_a_batch_than_ranks_leaves_some_ranks_an_empty_part() -> None:
    shardings = [Sharding(samples=10, global_batch_size=2, rank=r, world_size=4) for r in range(4)]
    lengths = [len(indices_of(s, 0, 0)[s.local_slice(0)]) for s in shardings]
    assert lengths == [1, 1, 0, 0]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        return indices_of(Sharding(50, 10, 0, 1), seed, epoch).tolist()

    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)
    assert first_epoch(1, 4) == first_epoch(1, 4)


@given(sizes, worlds)
def test_evaluation_covers_every_sample_exactly_once(samples: int, world_size: int) -> None:
    whole = torch.arange(samples)
    parts = [whole[eval_shard(rank, world_size)] for rank in range(world_size)]
    assert torch.equal(torch.cat(parts).sort().values, whole)


@given(sizes, batches)
def test_samples_from_counts_what_is_left_of_an_epoch(samples: int, batch_size: int) -> None:
    sharding = Sharding(samples, batch_size, 0, 1)
    for batch in range(sharding.steps_per_epoch + 1):
        left = sum(sharding.batch_samples(k) for k in range(batch, sharding.steps_per_epoch))
        assert sharding.samples_from(batch) == left


@given(st.integers(-27, 27), st.integers(-27, 27), st.integers(0, 3))
def test_every_pixel_moves_by_the_shift_and_blank_fills_in(
    down: int, right: int, count: int
) -> None:
    images = torch.randint(1, 256, (count, 784), dtype=torch.uint8)
    moved = shift_images(images, down, right).view(count, 28, 28)
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
        sharding = Sharding(len(split), 5, rank, world_size)
        sampler = sampler_of(sharding, seed=7, epoch=2)
        batches = global_batches(split, sampler, sharding, first_batch, max_shift=3)
        ranks.append([images.clone() for images, _, _ in batches])
    together = zip(*ranks, strict=True)
    return [{row.numpy().tobytes() for part in parts for row in part} for parts in together]


def test_any_number_of_ranks_and_a_resume_within_the_epoch_see_the_same_shifted_batches() -> None:
    images = torch.randint(0, 256, (23, 784), dtype=torch.uint8)
    split = Split(images, torch.zeros(23, dtype=torch.int64))
    whole = batches_seen(split, world_size=1)
    originals = {row.numpy().tobytes() for row in images.float() / 256}
    assert not whole[0] & originals, "the first batch of this epoch is shifted"
    for world_size in (2, 3, 7):
        assert batches_seen(split, world_size) == whole, world_size
    assert batches_seen(split, world_size=2, first_batch=2) == whole[2:]


@given(st.integers(1, 900), st.integers(1, 700), st.integers(1, 7), st.data())
def test_every_step_gets_the_ranks_own_rows_of_its_global_batch_in_order(
    samples: int, global_batch_size: int, world_size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1), "rank")
    sharding = Sharding(samples, global_batch_size, rank, world_size)
    first = data.draw(st.integers(0, sharding.steps_per_epoch), "first batch")
    images = torch.arange(samples * 784).mul(7).remainder(251).byte().view(samples, 784)
    split = Split(images, torch.arange(samples))
    sampler = sampler_of(sharding, seed=1, epoch=3)
    seen = [
        (values.clone(), labels, count)
        for values, labels, count in global_batches(split, sampler, sharding, first)
    ]
    assert len(seen) == sharding.steps_per_epoch - first
    order = local_indices(sampler, sharding)
    for batch, (values, labels, count) in enumerate(seen, first):
        own = order[sharding.local_slice(batch)]
        assert torch.equal(labels, own)
        assert torch.equal(values, pixels(images[own]))
        assert count == sharding.batch_samples(batch)
