"""What a rank's steps are given, however its rows are fetched."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_step import RecordingStep

from mnist_dist.data import Split
from mnist_dist.evaluation import train_epoch
from mnist_dist.model import pixels
from mnist_dist.sampling import Sharding


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 700), st.integers(1, 7), st.data())
def test_every_step_gets_the_ranks_own_rows_of_its_global_batch_in_order(
    samples: int, global_batch_size: int, world_size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1), "rank")
    sharding = Sharding(samples, global_batch_size, rank, world_size, seed=1)
    first = data.draw(st.integers(0, sharding.steps_per_epoch), "first batch")
    images = torch.arange(samples * 784).mul(7).remainder(251).byte().view(samples, 784)
    split = Split(images, torch.arange(samples))
    step = RecordingStep()
    for _ in train_epoch(step, None, split, sharding, 3, first):
        pass
    assert len(step.seen) == sharding.steps_per_epoch - first
    order = sharding.epoch_indices(3)
    for batch, (values, labels, count) in enumerate(step.seen, first):
        own = order[sharding.local_slice(batch)]
        assert torch.equal(labels, own)
        assert torch.equal(values, pixels(images[own]))
        assert count == sharding.batch_samples(batch)
