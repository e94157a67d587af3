"""The arithmetic of training and evaluation: no files, no flags, no environment."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mnist_dist.augmentation import random_shifts, shifted
from mnist_dist.data import Split
from mnist_dist.distributed.world import World
from mnist_dist.fast.inference import quick_logits
from mnist_dist.model import pixels
from mnist_dist.sampling import Sharding, evaluation_share
from mnist_dist.steps import Step

_EVALUATION_BATCH = 1000
_ROWS_TOGETHER = 256
_CLASSES = 10


def train_epoch(
    step: Step,
    scheduler: LRScheduler | None,
    split: Split,
    sharding: Sharding,
    epoch: int,
    first_batch: int = 0,
    random_shift: int = 0,
) -> Iterator[Tensor]:
    """Take the optimizer steps of epoch `epoch` from global batch `first_batch` on.

    Args:
        step: takes one, given this rank's part of the global batch.
        scheduler: stepped after each optimizer step, or None for a constant learning rate.
        split: training samples, on the model's device.
        sharding: this rank's part of each global batch.
        epoch: 0-based; chooses the permutation.
        first_batch: global batches of this epoch that are already done.
        random_shift: the largest shift of a global batch's images, in pixels.

    Yields:
        After each step, this rank's sum of cross entropies over its part: () float32, detached.
    """
    threads = torch.get_num_threads()
    shifts = random_shifts(random_shift, sharding.seed, epoch, sharding.steps_per_epoch)
    parts = _own_parts(split, sharding, epoch, first_batch)
    for batch, (images, labels) in enumerate(parts, first_batch):
        samples = sharding.batch_samples(batch)
        loss_sum = step(shifted(images, *shifts[batch]), labels, samples)
        if scheduler is not None:
            scheduler.step()
        yield loss_sum
    torch.set_num_threads(threads)  # training may have found fewer to be quicker


def _own_parts(
    split: Split, sharding: Sharding, epoch: int, first_batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (n, 784) float32 pixels and (n,) int64 labels of one global batch after another.

    To fetch 64 rows costs little less than to fetch 256, so small batches are fetched together;
    more would have left the core's cache when they are used. Pixels are overwritten by the next
    ones, for the same reason.
    """
    indices = sharding.epoch_indices(epoch).to(split.images.device)
    labels = split.labels.index_select(0, indices)
    together = max(1, _ROWS_TOGETHER * sharding.world_size // sharding.global_batch_size)
    most = min(-(-together * sharding.global_batch_size // sharding.world_size), len(indices))
    images = split.images.new_empty(most, split.images.shape[1])
    floats = torch.empty_like(images, dtype=torch.float32)
    for first in range(first_batch, sharding.steps_per_epoch, together):
        last = min(first + together, sharding.steps_per_epoch)
        own = [sharding.local_slice(batch) for batch in range(first, last)]
        chosen = indices[own[0].start : own[-1].stop]
        # index_select takes a fifth of the time of images[chosen].
        fetched = torch.index_select(split.images, 0, chosen, out=images[: len(chosen)])
        parts = pixels(fetched, floats[: len(chosen)]).split([s.stop - s.start for s in own])
        yield from zip(parts, (labels[s] for s in own), strict=True)


@dataclass(frozen=True)
class ConfidentError:
    """A misclassified sample."""

    index: int
    """Position in the split."""
    label: int
    predicted: int
    probability: float
    """Softmax probability of the prediction, 0 to 1."""


@dataclass(frozen=True)
class Evaluation:
    """Exact metrics of a model on a whole split."""

    loss: float
    """Mean cross entropy over all samples."""
    confusion: tuple[tuple[int, ...], ...]
    """Samples by label (row) and prediction (column): the diagonal is correct."""
    most_confident_errors: tuple[ConfidentError, ...] = ()
    """Misclassified samples by falling probability of the prediction, as many as requested."""

    @property
    def count(self) -> int:
        """Samples evaluated: the split's size."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """Correct share of all samples, 0 to 1."""
        return sum(row[digit] for digit, row in enumerate(self.confusion)) / self.count

    @property
    def accuracy_by_class(self) -> tuple[float, ...]:
        """Correct share of each digit's samples; nan for a digit that does not occur."""
        rows = enumerate(self.confusion)
        return tuple(row[digit] / sum(row) if any(row) else math.nan for digit, row in rows)

    @property
    def confusions(self) -> list[tuple[int, int, int]]:
        """(samples, label, predicted) of each pair that was confused, the most frequent first."""
        pairs = [
            (count, label, predicted)
            for label, row in enumerate(self.confusion)
            for predicted, count in enumerate(row)
            if count and predicted != label
        ]
        return sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, world: World, errors: int = 0) -> Evaluation:
    """Evaluate every sample of `split` once, shared out over all ranks.

    Sums are taken in float64 and divided once, after the all-reduce, so the result does not depend
    on the number of ranks beyond float64 rounding. The random state stays as it is: a checkpoint
    made after this holds the one from before.

    Args:
        model: the bare model, never the DistributedDataParallel wrapper, whose forward has
            collectives of its own.
        split: the whole split, on the model's device.
        world: the ranks that share the work.
        errors: number of most confident errors to return; equal on all ranks.

    Raises:
        RuntimeError: the ranks did not evaluate each sample exactly once.
    """
    was_training = model.training
    model.eval()
    share = evaluation_share(world.rank, world.world_size)
    images, labels = split.images[share], split.labels[share]
    logits_of = quick_logits(model)
    with torch.random.fork_rng(devices=[]):
        logits = torch.cat([logits_of(part) for part in images.split(_EVALUATION_BATCH)])
    model.train(was_training)
    loss_sum = F.cross_entropy(logits, labels, reduction="none").double().sum()
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * _CLASSES + predicted, minlength=_CLASSES**2)
    sums = world.sum(torch.cat([loss_sum.reshape(1), confusion.double()])).cpu()
    count = int(sums[1:].sum())
    if count != len(split):
        raise RuntimeError(f"evaluated {count} samples of a split of {len(split)}")
    table = sums[1:].long().view(_CLASSES, _CLASSES).tolist()
    found = _most_confident_errors(logits, predicted, labels, world, errors) if errors else ()
    return Evaluation(sums[0].item() / count, tuple(map(tuple, table)), found)


def _most_confident_errors(
    logits: Tensor, predicted: Tensor, labels: Tensor, world: World, most: int
) -> tuple[ConfidentError, ...]:
    """Gather `most` rows from each rank, padded with index -1, and return the most confident."""
    wrong = (predicted != labels).nonzero().flatten()
    probability, order = logits[wrong].softmax(1).amax(1).sort(descending=True)
    chosen = wrong[order[:most]]
    places = world.rank + world.world_size * chosen  # as evaluation_share has it
    columns = [places, labels[chosen], predicted[chosen], probability[:most]]
    rows = torch.full((most, 4), -1, dtype=torch.float64)
    rows[: len(chosen)] = torch.stack([column.double() for column in columns], 1).cpu()
    found = [
        ConfidentError(int(index), int(label), int(prediction), confidence)
        for part in world.gather_tensors(rows)
        for index, label, prediction, confidence in part.tolist()
        if index >= 0
    ]
    return tuple(sorted(found, key=lambda error: (-error.probability, error.index))[:most])
