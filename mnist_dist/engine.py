"""The arithmetic of training and evaluation: no files, no flags, no environment."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_dist.data import Split
from mnist_dist.sharding import Sharding, evaluation_indices
from mnist_dist.world import World

_EVALUATION_BATCH = 1024
_CLASSES = 10


def pixels(images: Tensor) -> Tensor:
    """(N, 784) uint8 to float32 byte/256: bitwise the values of the original mnist.pkl.gz."""
    return images.to(torch.float32) / 256


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    split: Split,
    sharding: Sharding,
    epoch: int,
    first_batch: int = 0,
) -> Iterator[Tensor]:
    """Take the optimizer steps of epoch `epoch` from global batch `first_batch` on.

    The local loss is sum(cross entropy) * W / n with n the samples in the global batch, so that
    DistributedDataParallel's mean over the W ranks is exactly the mean over the global batch,
    however unequal the ranks' parts are. A rank with an empty part still takes the step: its zero
    gradients are part of the all-reduce.

    Args:
        model: wrapped in DistributedDataParallel when there is more than one process.
        optimizer: steps once per global batch.
        scheduler: stepped after each optimizer step, or None for a constant learning rate.
        split: training samples, on the model's device.
        sharding: this rank's part of each global batch.
        epoch: 0-based; chooses the permutation.
        first_batch: global batches of this epoch that are already done.

    Yields:
        After each step, this rank's sum of cross entropies over its part: () float32, detached.
    """
    model.train()
    indices = sharding.epoch_indices(epoch).to(split.images.device)
    for batch in range(first_batch, sharding.steps_per_epoch):
        part = indices[sharding.local_slice(batch)]
        logits = model(pixels(split.images[part]))
        loss_sum = F.cross_entropy(logits, split.labels[part], reduction="sum")
        optimizer.zero_grad()
        (loss_sum * (sharding.world_size / sharding.batch_samples(batch))).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield loss_sum.detach()


@dataclass(frozen=True)
class Evaluation:
    """Exact figures of a model on a whole split."""

    loss: float
    """Mean cross entropy over all samples."""
    accuracy: float
    """Correct share of all samples, 0 to 1."""
    count: int
    """Samples evaluated: the split's size."""
    accuracy_by_class: tuple[float, ...]
    """Correct share of each digit's samples; nan for a digit that does not occur."""


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, world: World) -> Evaluation:
    """Evaluate every sample of `split` once, shared out over all ranks.

    Sums are taken in float64 and divided once, after the all-reduce, so the result does not depend
    on the number of ranks beyond float64 rounding.

    Args:
        model: the bare model, never the DistributedDataParallel wrapper, whose forward has
            collectives of its own.
        split: the whole split, on the model's device.
        world: the ranks that share the work.

    Raises:
        RuntimeError: the ranks did not evaluate each sample exactly once.
    """
    model.eval()
    device = split.images.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros(_CLASSES, dtype=torch.float64, device=device)
    total = torch.zeros(_CLASSES, dtype=torch.float64, device=device)
    for part in evaluation_indices(len(split), world.rank, world.world_size).split(
        _EVALUATION_BATCH
    ):
        part = part.to(device)
        labels = split.labels[part]
        logits = model(pixels(split.images[part]))
        loss_sum += F.cross_entropy(logits, labels, reduction="none").double().sum()
        correct += torch.bincount(labels[logits.argmax(1) == labels], minlength=_CLASSES)
        total += torch.bincount(labels, minlength=_CLASSES)
    sums = world.sum(torch.cat([loss_sum.reshape(1), correct, total])).cpu()
    right, count = sums[1 : 1 + _CLASSES], int(sums[1 + _CLASSES :].sum())
    if count != len(split):
        raise RuntimeError(f"evaluated {count} samples of a split of {len(split)}")
    return Evaluation(
        loss=sums[0].item() / count,
        accuracy=right.sum().item() / count,
        count=count,
        accuracy_by_class=tuple((right / sums[1 + _CLASSES :]).tolist()),
    )
