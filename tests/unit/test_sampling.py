"""Contract C1's arithmetic: who computes which part of which global batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from mnist_dist.sampling import Sharding, evaluation_share

sizes = st.integers(1, 300)
batches = st.integers(1, 80)
worlds = st.integers(1, 12)


def permutation(samples: int, seed: int, epoch: int) -> list[int]:
    """DistributedSampler's own order, as its only rank sees it."""
    sampler: DistributedSampler[int] = DistributedSampler(
        range(samples),  # type: ignore[arg-type]
        num_replicas=1,
        rank=0,
        seed=seed,
    )
    sampler.set_epoch(epoch)
    return list(sampler)


@given(sizes, batches, worlds, st.integers(0, 5))
def test_ranks_together_take_exactly_the_global_batch(
    samples: int, batch_size: int, world_size: int, epoch: int
) -> None:
    order = permutation(samples, seed=3, epoch=epoch)
    ranks = [Sharding(samples, batch_size, r, world_size, seed=3) for r in range(world_size)]
    indices = [rank.epoch_indices(epoch) for rank in ranks]
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
        sharding = Sharding(samples, batch_size, rank, world_size, seed=0)
        own = sharding.epoch_indices(0)
        for batch in range(sharding.steps_per_epoch):
            used += own[sharding.local_slice(batch)].tolist()
    assert sorted(used) == list(range(samples))


def test_one_process_keeps_the_samplers_order_within_each_batch() -> None:
    sharding = Sharding(samples=100, global_batch_size=32, rank=0, world_size=1, seed=7)
    assert sharding.epoch_indices(2).tolist() == permutation(100, seed=7, epoch=2)
    assert [sharding.local_slice(k) for k in range(4)] == [
        slice(0, 32),
        slice(32, 64),
        slice(64, 96),
        slice(96, 100),
    ]


def test_fewer_samples_in_a_batch_than_ranks_leaves_some_ranks_an_empty_part() -> None:
    shardings = [
        Sharding(samples=10, global_batch_size=2, rank=r, world_size=4, seed=0) for r in range(4)
    ]
    lengths = [len(s.epoch_indices(0)[s.local_slice(0)]) for s in shardings]
    assert lengths == [1, 1, 0, 0]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        return Sharding(50, 10, 0, 1, seed).epoch_indices(epoch).tolist()

    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)
    assert first_epoch(1, 4) == first_epoch(1, 4)


@given(sizes, worlds)
def test_evaluation_covers_every_sample_exactly_once(samples: int, world_size: int) -> None:
    whole = torch.arange(samples)
    parts = [whole[evaluation_share(rank, world_size)] for rank in range(world_size)]
    assert torch.equal(torch.cat(parts).sort().values, whole)


@given(sizes, batches)
def test_samples_from_counts_what_is_left_of_an_epoch(samples: int, batch_size: int) -> None:
    sharding = Sharding(samples, batch_size, 0, 1, seed=0)
    for batch in range(sharding.steps_per_epoch + 1):
        left = sum(sharding.batch_samples(k) for k in range(batch, sharding.steps_per_epoch))
        assert sharding.samples_from(batch) == left
