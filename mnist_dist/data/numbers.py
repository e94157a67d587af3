"""Pixels and labels of any number type and common shape, as bytes; nothing is rounded."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.errors import MalformedError
from mnist_dist.data.signatures import SAVE_AS_NPZ
from mnist_dist.dimensions import IMAGE_PIXELS, IMAGE_SIDE, NUM_CLASSES

# Rows converted at a time, to save memory.
_ROWS = 4096
_SHAPES = {
    (IMAGE_SIDE, IMAGE_SIDE),
    (IMAGE_PIXELS,),
    (IMAGE_SIDE, IMAGE_SIDE, 1),
    (1, IMAGE_SIDE, IMAGE_SIDE),
}
_AS_BYTES = "save the original pixels, 0 to 255, as uint8"


def check_image_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise `MalformedError` unless `shape` is of one or more images of 28 x 28 grey pixels."""
    if shape[1:] not in _SHAPES:
        problem = f"{name} images have shape {shape}, not (N, 28, 28) or (N, 784)"
        raise MalformedError(problem, _shape_remedy(shape))
    if shape[0] == 0:
        raise MalformedError(f"{name} has no samples")


def _shape_remedy(shape: tuple[int, ...]) -> str:
    if shape[:-1] in _SHAPES:
        return f"move its last axis, the samples, to the front, then {SAVE_AS_NPZ}"
    if 3 in shape[1:] and len(shape) == 4:
        return f"convert the images to grey, then {SAVE_AS_NPZ}"
    return f"bring the images to 28 x 28 pixels, then {SAVE_AS_NPZ}"


def pixels_as_bytes(name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert images to (N, 784) uint8, a copy.

    Args:
        name: the split's name in errors, such as ``train``.
        images: (N, 28, 28), (N, 784), (N, 28, 28, 1) or (N, 1, 28, 28); whole numbers from 0 to
            255 of any type, or floats of byte/256, as in the classic pickle.

    Raises:
        MalformedError: another shape, or other numbers.
    """
    check_image_shape(name, images.shape)
    if images.dtype.kind not in "iuf":
        raise MalformedError(f"{name} images are {images.dtype}, not numbers", _AS_BYTES)
    if images.dtype == np.uint8:
        peak, whole = images.max(), np.array(images, order="C")
    else:
        # NaN makes the maximum NaN, which no comparison below accepts.
        peak = images.max()
        converted = _whole(images, 256 if images.dtype.kind == "f" and 0 < peak < 1 else 1)
        if converted is None:
            raise _not_bytes(name, images)
        whole = converted
    if peak == 1:
        raise MalformedError(
            f"{name} images have no pixel above 1: they are binarized, or divided by 255", _AS_BYTES
        )
    return whole.reshape(len(images), IMAGE_PIXELS)


def labels_as_integers(name: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    """Convert labels to (N,) int64, a copy.

    Args:
        name: the split's name in errors.
        labels: (N,) or (N, 1); whole numbers from 0 to 9 of any type.

    Raises:
        MalformedError: another shape, or other numbers.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] == NUM_CLASSES:
        raise MalformedError(
            f"{name} labels are one-hot {labels.shape}, not integers (N,)",
            "save labels.argmax(axis=1) instead",
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise MalformedError(f"{name} labels are {labels.dtype} {labels.shape}, not integers (N,)")
    if len(labels) and not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise _not_digits(name, labels)
    converted = labels.astype(np.int64)
    if not np.array_equal(converted, labels):
        raise MalformedError(f"{name} labels are {labels.dtype} with fractions, not 0 to 9")
    return converted


def _whole(values: NDArray[Any], scale: int) -> NDArray[np.uint8] | None:
    """Return `values` times `scale` as uint8, None if one of them is no whole number 0 to 255."""
    whole = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = values[rows] * scale if scale != 1 else values[rows]
            whole[rows] = scaled
        if not np.array_equal(whole[rows], scaled):
            return None
    return whole


def _not_bytes(name: str, images: NDArray[Any]) -> MalformedError:
    problem = f"{name} images are not byte/256, nor whole numbers from 0 to 255: "
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        return MalformedError(f"{problem}some are not finite")
    if _whole(images.byteswap(), 1) is not None:
        return MalformedError(
            f"{problem}they are in the wrong byte order",
            f"call images.byteswap(), then {SAVE_AS_NPZ}",
        )
    if low >= 0 and high <= 1:
        scaled = images[:_ROWS] * 255
        if np.allclose(scaled, np.rint(scaled), atol=1e-3):
            remedy = f"multiply them by 255, round, convert to uint8, then {SAVE_AS_NPZ}"
            return MalformedError(f"{problem}they are byte/255", remedy)
    return MalformedError(f"{problem}they run from {low:g} to {high:g}", _AS_BYTES)


def _not_digits(name: str, labels: NDArray[Any]) -> MalformedError:
    low, high = labels.min(), labels.max()
    problem = f"{name} labels run from {low} to {high}, not 0 to 9"
    swapped = labels.byteswap()
    if 0 <= swapped.min() <= swapped.max() < NUM_CLASSES:
        return MalformedError(f"{problem}: they are in the wrong byte order", "swap their bytes")
    if (low, high) == (1, 26):
        problem += ": they are letters"
    return MalformedError(problem, "pass a data set of ten classes that are labelled 0 to 9")
