"""DistributedSampler over tensors: which samples of each global batch are this rank's.

One permutation an epoch, the same on all ranks, is cut into global batches; the number of
processes only decides who computes which part of a batch, never what is in it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class Sharding:
    """One rank's part of every global batch.

    DistributedSampler gives rank r the positions p of the permutation with p mod W = r, so
    position p is entry (p - r) / W of rank r's list, and global batch k, the positions
    [kB, (k+1)B), is that list's slice ceil((kB - r) / W) .. ceil(((k+1)B - r) / W). This holds
    for any B and W; with B < W some slices are empty.
    """

    samples: int
    global_batch_size: int
    rank: int
    world_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch; the last may be short."""
        return -(-self.samples // self.global_batch_size)

    def epoch_indices(self, epoch: int) -> Tensor:
        """This rank's sample indices in epoch `epoch`, in order: (n,) int64.

        The sampler pads its lists to equal lengths by repeating samples; the padding is cut off.
        """
        sampler: DistributedSampler[int] = DistributedSampler(
            range(self.samples),  # type: ignore[arg-type]
            num_replicas=self.world_size,
            rank=self.rank,
            seed=self.seed,
        )
        sampler.set_epoch(epoch)
        own = np.fromiter(sampler, np.int64, self._entries_before(self.samples))
        return torch.from_numpy(own)

    def local_slice(self, batch: int) -> slice:
        """Where in `epoch_indices` this rank's part of global batch `batch` lies; may be empty."""
        first = batch * self.global_batch_size
        last = min(first + self.global_batch_size, self.samples)
        return slice(self._entries_before(first), self._entries_before(last))

    def batch_samples(self, batch: int) -> int:
        """Samples in global batch `batch`, summed over all ranks."""
        return min(self.global_batch_size, self.samples - batch * self.global_batch_size)

    def samples_from(self, batch: int) -> int:
        """Samples in an epoch's global batches from `batch` on, summed over all ranks."""
        return max(0, self.samples - batch * self.global_batch_size)

    def _entries_before(self, position: int) -> int:
        """How many of this rank's entries stand before `position` of the permutation."""
        return max(0, -(-(position - self.rank) // self.world_size))


def evaluation_share(rank: int, world_size: int) -> slice:
    """Every world_size-th sample from `rank` on: no padding, each sample on exactly one rank."""
    return slice(rank, None, world_size)
