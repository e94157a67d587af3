"""The 5,000 MNIST digits in the package, for machines without data or network."""

from importlib.resources import files
from typing import Any

from numpy.typing import NDArray

from mnist_dist.data.npz import read_arrays
from mnist_dist.data.splits import SPLIT_NAMES, Dataset, make_split
from mnist_dist.data.splits import fingerprint as fingerprint_of
from mnist_dist.dimensions import IMAGE_PIXELS, NUM_CLASSES

DESCRIPTION = "bundled 5,000-digit subset of MNIST, 4,000 / 500 / 500"

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
    return Dataset(train, validation, test, DESCRIPTION, fingerprint)


def _interleave(by_class: NDArray[Any]) -> NDArray[Any]:
    """(classes, samples, ...) to (classes * samples, ...), first sample of each class first."""
    interleaved: NDArray[Any] = by_class.swapaxes(0, 1).reshape(-1, *by_class.shape[2:])
    return interleaved
