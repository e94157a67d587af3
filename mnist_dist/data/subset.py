"""The 5,000 digits that come with the package, for machines without data or network."""

from importlib.resources import files
from typing import Any

from numpy.typing import NDArray

from mnist_dist.data.npz import read_arrays
from mnist_dist.data.splits import CLASSES, PIXELS, SPLIT_NAMES, Dataset, make_split
from mnist_dist.data.splits import fingerprint as fingerprint_of

DESCRIPTION = "bundled 5,000-digit subset of MNIST, 4,000 / 500 / 500"

# Of the 500 digits of a class, in the file's order: train, validation, test.
_SHARES = (slice(0, 400), slice(400, 450), slice(450, 500))


def load() -> Dataset:
    """The bundled digits: of each class the first 400 to train, 50 to validate, 50 to test.

    Within a split the classes take turns, so that its first N samples hold all of them.
    """
    # Through importlib.resources, so that it also works from an installed or zipped package.
    file = files("mnist_dist.data") / "bundled" / "mnist_5k.npz"
    with file.open("rb") as stream:
        images, labels = read_arrays(stream, ("images", "labels"))
    images, labels = images.reshape(CLASSES, -1, PIXELS), labels.reshape(CLASSES, -1)
    train, validation, test = (
        make_split(name, _in_turn(images[:, share]), _in_turn(labels[:, share]))
        for name, share in zip(SPLIT_NAMES, _SHARES, strict=True)
    )
    fingerprint = fingerprint_of((train, validation, test))
    return Dataset(train, validation, test, DESCRIPTION, fingerprint)


def _in_turn(by_class: NDArray[Any]) -> NDArray[Any]:
    """(classes, samples, ...) to (classes * samples, ...): the first of each class come first."""
    in_turn: NDArray[Any] = by_class.swapaxes(0, 1).reshape(-1, *by_class.shape[2:])
    return in_turn
