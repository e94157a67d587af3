"""Exact evaluation: every sample counts once, however many ranks share the work."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data import Split
from mnist_dist.dimensions import NUM_CLASSES
from mnist_dist.distributed.devices import threads_for
from mnist_dist.distributed.world import World
from mnist_dist.model import pixels

_BATCH_SIZE = 512


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
        return sum(self.count_by_class)

    @property
    def count_by_class(self) -> list[int]:
        """Samples of each digit."""
        return [sum(row) for row in self.confusion]

    @property
    def correct_by_class(self) -> list[int]:
        """Correct samples of each digit."""
        return [row[digit] for digit, row in enumerate(self.confusion)]

    @property
    def accuracy(self) -> float:
        """Correct share of all samples, 0 to 1."""
        return sum(self.correct_by_class) / self.count

    @property
    def accuracy_by_class(self) -> tuple[float, ...]:
        """Correct share of each digit's samples; nan for a digit that does not occur."""
        both = zip(self.correct_by_class, self.count_by_class, strict=True)
        return tuple(correct / count if count else math.nan for correct, count in both)

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
def evaluate(
    model: nn.Module,
    split: Split,
    world: World,
    errors: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate every sample of `split` once, shared out over all ranks.

    Sums are taken in float64 and divided once, after the all-reduce, so the result does not depend
    on the number of ranks beyond float64 rounding. The random state is preserved, so that a
    checkpoint made after this holds the one from before.

    Args:
        model: the bare model, never the DistributedDataParallel wrapper: its forward pass has
            collectives of its own.
        split: the whole split, on the model's device.
        world: the ranks that share the work.
        errors: number of most confident errors to return; equal on all ranks.
        wait: called before results are read, which blocks for as long as a GPU hangs; it may raise.

    Raises:
        RuntimeError: the ranks did not evaluate each sample exactly once.
    """
    shard = eval_shard(world.rank, world.world_size)
    images, labels = split.images[shard], split.labels[shard]
    with threads_for(_BATCH_SIZE, world.launch):  # more than a training step's few rows are worth
        logits = _logits(model, images)
    loss_sum = F.cross_entropy(logits, labels, reduction="none").double().sum()
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
    local_sums = torch.cat([loss_sum.reshape(1), confusion.double()])
    wait()
    sums = world.all_reduce_sum(local_sums.cpu())
    count = int(sums[1:].sum())
    if count != len(split):
        raise RuntimeError(f"evaluated {count} samples of a split of {len(split)}")
    table = sums[1:].long().view(NUM_CLASSES, NUM_CLASSES).tolist()
    found = _most_confident_errors(logits, predicted, labels, world, errors) if errors else ()
    return Evaluation(sums[0].item() / count, tuple(map(tuple, table)), found)


def eval_shard(rank: int, world_size: int) -> slice:
    """Return every world_size-th sample from `rank` on: each sample on one rank, no padding."""
    return slice(rank, None, world_size)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's logits in evaluation mode; the random state stays as it was."""
    was_training = model.training
    model.eval()
    buffer = torch.empty(_BATCH_SIZE, images.shape[1], device=images.device)
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        parts = images.split(_BATCH_SIZE)
        logits = [model(pixels(part, buffer[: len(part)])) for part in parts]
    model.train(was_training)
    return torch.cat(logits)


def _most_confident_errors(
    logits: Tensor, predicted: Tensor, labels: Tensor, world: World, most: int
) -> tuple[ConfidentError, ...]:
    """Return the `most` most confident errors of all ranks, gathered from those of each."""
    wrong = (predicted != labels).nonzero().flatten()
    probability, order = logits[wrong].softmax(1).amax(1).sort(descending=True)
    chosen = wrong[order[:most]]
    places = world.rank + world.world_size * chosen  # as in eval_shard
    columns = [places, labels[chosen], predicted[chosen], probability[:most]]
    rows = torch.stack([column.double() for column in columns], 1).tolist()
    local = [ConfidentError(int(i), int(label), int(p), share) for i, label, p, share in rows]
    found = itertools.chain(*world.gather(local))
    return tuple(sorted(found, key=lambda error: (-error.probability, error.index))[:most])
