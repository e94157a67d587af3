"""The 5,000 MNIST digits in the package, for machines without data or network."""

from importlib.resources import files
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_dist.data.npz import read_arrays
from mnist_dist.data.splits import SPLIT_NAMES, Dataset, Split, make_split
from mnist_dist.data.splits import fingerprint as fingerprint_of
from mnist_dist.dimensions import IMAGE_PIXELS, IMAGE_SIDE, NUM_CLASSES

DESCRIPTION = "bundled 5,000-digit subset of MNIST, 4,000 / 500 / 500"

# Samples used to distinguish digits from other images.
_ENOUGH = 2_000
# The split of each class's 500 digits, in the file's order: train, validation, test.
_SHARES = (slice(0, 400), slice(400, 450), slice(450, 500))


def load() -> Dataset:
    """Load the bundled digits: 400 of each class for training, 50 for validation, 50 for testing.

    Within a split the classes alternate, so that its first N samples are balanced.
    """
    # importlib.resources also reads from a zipped package.
    file = files("mnist_dist.data") / "bundled" / "mnist_5k.npz"
    with file.open("rb") as stream:
        images, labels = read_arrays(stream, ("images", "labels"))
    images, labels = images.reshape(NUM_CLASSES, -1, IMAGE_PIXELS), labels.reshape(NUM_CLASSES, -1)
    train, validation, test = (
        make_split(name, _interleave(images[:, share]), _interleave(labels[:, share]))
        for name, share in zip(SPLIT_NAMES, _SHARES, strict=True)
    )
    fingerprint = fingerprint_of((train, validation, test))
    return Dataset(train, validation, test, DESCRIPTION, fingerprint, is_bundled=True)


def are_transposed(split: Split) -> bool:
    """Return whether `split` is of digits with rows and columns exchanged, as in EMNIST's files.

    The mean image of each class is compared with the bundled digits', after the mean of all classes
    was subtracted. The correlation is above 0.9 for MNIST, below 0.3 for MNIST transposed, and
    about 0 for other images.
    """
    found, expected = _class_means(split), _class_means(load().train)
    turned = found.reshape(-1, IMAGE_SIDE, IMAGE_SIDE).swapaxes(1, 2).reshape(found.shape)
    upright, transposed = _correlation(found, expected), _correlation(turned, expected)
    return transposed > 0.5 and transposed > 2 * upright


def _class_means(split: Split) -> Tensor:
    """(10, 784) float32: the mean image of each class, less their mean; zero without samples."""
    images, labels = split.images[:_ENOUGH].float(), split.labels[:_ENOUGH]
    counts = labels.bincount(minlength=NUM_CLASSES).unsqueeze(1)
    sums = torch.zeros(NUM_CLASSES, IMAGE_PIXELS).index_add_(0, labels, images)
    means = sums / counts.clamp(min=1)
    return (means - means.sum(0) / (counts > 0).sum()) * (counts > 0)


def _correlation(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float((one * other).sum() / norms) if norms > 0 else 0.0


def _interleave(by_class: NDArray[Any]) -> NDArray[Any]:
    """(classes, samples, ...) to (classes * samples, ...), first sample of each class first."""
    interleaved: NDArray[Any] = by_class.swapaxes(0, 1).reshape(-1, *by_class.shape[2:])
    return interleaved
