"""The canonical form of the data: three splits of uint8 images, from any file format."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data as torch_data

from mnist_dist.data.errors import DataError, MalformedError
from mnist_dist.data.numbers import labels_as_integers, pixels_as_bytes
from mnist_dist.errors import printable

SPLIT_NAMES = ("train", "validation", "test")

# `fingerprint` of MNIST, split 50,000 / 10,000 / 10,000.
MNIST_SHA256 = "d9a97ebadde1a3d5a7cd04cba890aa9aa7ca5ab3349340a725bc273a05612698"


@dataclass(frozen=True, eq=False)
class Split(torch_data.Dataset[tuple[Tensor, Tensor]]):
    """Samples in the order of their source.

    ``images`` is (N, 784) uint8, row by row; ``labels`` is (N,) int64, 0 to 9. N is at least 1.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


Splits: TypeAlias = tuple[Split, Split, Split]
Arrays: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits, their description, and their fingerprint.

    ``fingerprint`` is the SHA-256 (hex) of the splits as bytes, with their shapes: equal for the
    same data in every source format.
    """

    train: Split
    validation: Split
    test: Split
    description: str
    fingerprint: str
    is_bundled: bool = False
    """Whether these are the digits in the package."""

    @property
    def splits(self) -> Splits:
        """``(train, validation, test)``."""
        return self.train, self.validation, self.test

    def to(self, device: torch.device) -> "Dataset":
        """Return this data set with its tensors on `device`."""
        train, validation, test = (
            Split(split.images.to(device), split.labels.to(device)) for split in self.splits
        )
        return replace(self, train=train, validation=validation, test=test)

    def first_training_samples(self, count: int) -> "Dataset":
        """Return this data set with the first `count` training samples only, without a copy.

        The new fingerprint is derived from the old one and `count`, not from the pixels, so that
        100 samples do not require reading 50,000.

        Raises:
            DataError: `count` is not between 1 and the size of the training split.
        """
        if not 1 <= count <= len(self.train):
            raise DataError(
                f"--train-samples {count}: the training split has {len(self.train):,} samples",
                f"pass a number from 1 to {len(self.train)}",
            )
        if count == len(self.train):
            return self
        derived = hashlib.sha256(f"{self.fingerprint} first {count}".encode()).hexdigest()
        return replace(
            self,
            train=Split(self.train.images[:count], self.train.labels[:count]),
            description=f"{self.description}, first {count:,} training samples only",
            fingerprint=derived,
        )


def assemble(splits: Splits, source: str) -> Dataset:
    """Describe and fingerprint three splits that were read from `source`."""
    digest = fingerprint(splits)
    return Dataset(*splits, describe(splits, digest, source), digest)


def describe(splits: Splits, digest: str, source: str) -> str:
    """Describe splits of the fingerprint `digest` that come from `source`, in one line."""
    name = "MNIST" if digest == MNIST_SHA256 else "Dataset"
    sizes = " / ".join(f"{len(split):,}" for split in splits)
    return f"{name}, {sizes} from {printable(source)}"


def make_split(name: str, images: NDArray[Any], labels: NDArray[Any]) -> Split:
    """Check the split `name` and copy it into canonical form.

    Raises:
        MalformedError: as `pixels_as_bytes` and `labels_as_integers`, or the lengths are unequal.
    """
    pixels, classes = pixels_as_bytes(name, images), labels_as_integers(name, labels)
    if len(images) != len(labels):
        raise MalformedError(f"{name} has {len(images):,} images but {len(labels):,} labels")
    return Split(torch.from_numpy(pixels), torch.from_numpy(classes))


def hold_out_validation(train: Arrays, test: Arrays) -> Splits:
    """Make three splits of two: the last sixth of `train` becomes validation.

    60,000 training samples become 50,000 and 10,000, the usual split.

    Raises:
        MalformedError: as `make_split`, or `train` has fewer than six samples.
    """
    whole = make_split("train", *train)
    kept = len(whole) - len(whole) // 6
    if kept == len(whole):
        raise MalformedError(f"train has {len(whole)} samples, too few to hold out a sixth")
    return (
        Split(whole.images[:kept], whole.labels[:kept]),
        Split(whole.images[kept:], whole.labels[kept:]),
        make_split("test", *test),
    )


def fingerprint(splits: Splits) -> str:
    """Return the SHA-256 (hex) of the canonical bytes: for each split images, then uint8 labels."""
    digest = hashlib.sha256()
    for name, array in _canonical_arrays(splits):
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()


def _canonical_arrays(splits: Splits) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for name, split in zip(SPLIT_NAMES, splits, strict=True):
        yield f"{name} images", split.images.numpy()
        yield f"{name} labels", split.labels.to(torch.uint8).numpy()
