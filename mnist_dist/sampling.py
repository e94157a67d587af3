"""DistributedSampler's order, cut into global batches.

One permutation per epoch, the same on all ranks, is cut into global batches; the number of
processes only decides which rank computes which part of a batch, never what is in it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split
from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.model import pixels

# Rows gathered at once on a CPU: 64 cost little less than 256, and more would have left the core's
# cache when they are used. On a GPU, where launches are what costs.
_ROWS_PER_GATHER, _ROWS_PER_GATHER_GPU = 256, 8192


@dataclass(frozen=True)
class Sharding:
    """One rank's local batch of every global batch.

    DistributedSampler gives rank r the positions p of the permutation with p mod W = r, so
    position p is entry (p - r) / W of rank r's list, and global batch k, the positions
    [kB, (k+1)B), is that list's slice ceil((kB - r) / W) .. ceil(((k+1)B - r) / W). This holds
    for any B and W; with B < W some slices are empty. With B = 5 and W = 2, rank 0's entries
    0, 1, 2 are positions 0, 2, 4 of batch 0; its entries 3, 4 are positions 6, 8 of batch 1.
    """

    samples: int
    global_batch_size: int
    rank: int
    world_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch; the last may be short."""
        return -(-self.samples // self.global_batch_size)

    @property
    def local_samples(self) -> int:
        """This rank's samples in an epoch."""
        return self._entries_before(self.samples)

    def local_slice(self, batch: int) -> slice:
        """Return the slice of this rank's indices that is its local batch; it may be empty."""
        first = batch * self.global_batch_size
        last = min(first + self.global_batch_size, self.samples)
        return slice(self._entries_before(first), self._entries_before(last))

    def batch_samples(self, batch: int) -> int:
        """Return the number of samples in global batch `batch`, over all ranks."""
        return min(self.global_batch_size, self.samples - batch * self.global_batch_size)

    def samples_from(self, batch: int) -> int:
        """Return the samples in an epoch's global batches from `batch` on, over all ranks."""
        return max(0, self.samples - batch * self.global_batch_size)

    def _entries_before(self, position: int) -> int:
        """Return how many of this rank's entries come before `position` of the permutation."""
        return max(0, -(-(position - self.rank) // self.world_size))


def local_indices(sampler: "DistributedSampler[Any]", sharding: Sharding) -> Tensor:
    """Return this rank's sample indices of the sampler's epoch, in order: (n,) int64.

    The sampler pads its lists to equal lengths by repeating samples; the padding is cut off.
    """
    return torch.from_numpy(np.fromiter(sampler, np.int64, sharding.local_samples))


def global_batches(
    split: Split,
    sampler: "DistributedSampler[Any]",
    sharding: Sharding,
    first_batch: int = 0,
    max_shift: int = 0,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield this rank's part of each global batch of the sampler's epoch.

    There is no DataLoader: the images are tensors already, and rows are gathered for a few small
    batches at a time.

    Args:
        split: training samples, on the model's device.
        sampler: of this rank, after `set_epoch`.
        sharding: this rank's local batches.
        first_batch: global batches of this epoch that are already done.
        max_shift: the largest random shift of a global batch's images, in pixels.

    Yields:
        (n, 784) float32 pixels, overwritten later; (n,) int64 labels; and the number of samples in
        the global batch. n may be 0: the rank still takes part in the step's collectives.
    """
    shifts = random_shifts(max_shift, sampler.seed, sampler.epoch, sharding.steps_per_epoch)
    indices = local_indices(sampler, sharding).to(split.images.device)
    labels = split.labels.index_select(0, indices)
    rows = _ROWS_PER_GATHER_GPU if split.images.is_cuda else _ROWS_PER_GATHER
    batches_per_gather = max(1, rows * sharding.world_size // sharding.global_batch_size)
    most_rows = -(-batches_per_gather * sharding.global_batch_size // sharding.world_size)
    gathered = split.images.new_empty(min(most_rows, len(indices)), split.images.shape[1])
    floats = torch.empty_like(gathered, dtype=torch.float32)
    for first in range(first_batch, sharding.steps_per_epoch, batches_per_gather):
        batches = range(first, min(first + batches_per_gather, sharding.steps_per_epoch))
        slices = [sharding.local_slice(batch) for batch in batches]
        chosen = indices[slices[0].start : slices[-1].stop]
        # index_select takes a fifth of the time of images[chosen].
        raw = torch.index_select(split.images, 0, chosen, out=gathered[: len(chosen)])
        images = pixels(raw, floats[: len(chosen)]).split([s.stop - s.start for s in slices])
        for batch, local, part in zip(batches, slices, images, strict=True):
            yield shift_images(part, *shifts[batch]), labels[local], sharding.batch_samples(batch)


def random_shifts(largest: int, seed: int, epoch: int, batches: int) -> list[tuple[int, int]]:
    """Return how far each global batch of an epoch is shifted: pixels (down, right).

    All whole numbers from -`largest` to `largest` are equally likely. They follow from the
    arguments alone, so every rank has the same, and a resume in the middle of an epoch needs no
    saved state. A batch is shifted as a whole: that is one operation, whatever its size, and helps
    the model as much as a shift per sample (docs/performance.md).
    """
    if largest == 0:
        return [(0, 0)] * batches
    draw = random.Random(f"shifts of epoch {epoch}, seed {seed}").randint
    return [(draw(-largest, largest), draw(-largest, largest)) for _ in range(batches)]


def shift_images(images: Tensor, down: int, right: int) -> Tensor:
    """Shift (N, 784) images by less than 28 pixels each way; the pixels that enter are 0."""
    if down == right == 0:
        return images
    rows = images.unflatten(1, (IMAGE_SIDE, IMAGE_SIDE))
    return F.pad(rows, (right, -right, down, -down)).flatten(1)
