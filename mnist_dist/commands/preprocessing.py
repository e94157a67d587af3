"""Preprocess images of digits as the images of MNIST were.

LeCun, Cortes and Burges describe it (yann.lecun.com/exdb/mnist): the digit is scaled to fit a box
of 20x20 pixels, with its aspect ratio and with anti-aliasing, and placed in a 28x28 image with its
centre of mass at the centre. In their files this is pixel (14, 14), in whole pixels: the centre of
mass of every test digit is between 13.5 and 14.5.

Files are not trusted: only PNG and JPEG are decoded, by Pillow, and the number of pixels is limited
so that half a gigabyte of memory is enough.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mnist_dist.commands.segmentation import Grey, Ink, find_digit
from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.errors import UserError, printable

SUFFIXES = (".png", ".jpg", ".jpeg")
_MAX_PIXELS = 50_000_000
_BOX_SIDE = 20
# Of the centre of mass, in pixels: 0.50 in MNIST's test split, 0.52 in its training split.
_OFF_CENTRE = 0.53
# Images of more than this squared are reduced first: more pixels do not improve a box of 20.
_MAX_SIDE = 800


def preprocess_image(path: str | Path) -> Tensor:
    """Convert a PNG or JPEG of a digit, of any size, to (784,) uint8, white on black.

    An image that already has MNIST's format, in white on black or black on white, keeps its pixels.

    Raises:
        UserError: the file is not a PNG or JPEG, is damaged, too large, or blank.
    """
    return read_digit(path)[0]


def read_digit(path: str | Path) -> tuple[Tensor, tuple[str, ...]]:
    """Return what `preprocess_image` returns, and why the digit may be misread."""
    path = Path(path)
    name = printable(str(path))
    grey = _read(path, name)
    image, notes = _as_mnist(grey), tuple[str, ...]()
    if image is None:
        digit = find_digit(grey)
        if digit is None:
            raise UserError(
                f"{name}: is blank: no digit stands out; use an image with more contrast"
            )
        image, notes = _centre(_fit(digit.ink)), digit.notes
    return torch.from_numpy(image.reshape(-1).copy()), notes


def find_images(path: str | Path) -> list[Path]:
    """Return [path], or if it is a directory its PNG and JPEG files, sorted by name.

    Raises:
        UserError: the directory contains none, or cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    name = printable(str(path))
    try:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; use a readable directory") from error
    if not found:
        raise UserError(f"{name}: contains no .png, .jpg or .jpeg file; use a directory of images")
    return found


def _read(path: Path, name: str) -> Grey:
    """Read grey levels, rotated by the EXIF tag, without transparency, reduced if large."""
    if not path.is_file():  # reading a pipe or device might never end
        fault = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{name}: {fault}; use a PNG or JPEG file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are handled below
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.draft("L", (_MAX_SIDE, _MAX_SIDE))  # JPEGs are decoded at a smaller size
                if image.width * image.height > _MAX_PIXELS:
                    raise UserError(_too_large(name))
                ImageOps.exif_transpose(image, in_place=True)
                return np.asarray(_flatten(image))
    except Image.DecompressionBombError:
        raise UserError(_too_large(name)) from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a PNG or JPEG; convert the image to one") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises more than it documents for damaged files
        raise UserError(
            f"{name}: is damaged or cannot be read ({type(error).__name__}); save it again"
        ) from error


def _too_large(name: str) -> str:
    return f"{name}: has more than {_MAX_PIXELS:,} pixels; scale it down"


def _flatten(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit grey levels and reduce large images."""
    factor = math.ceil(math.sqrt(image.width * image.height) / _MAX_SIDE)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("L") would clip
        levels = np.asarray(image).astype(np.int64).clip(0)
        levels >>= max(0, int(levels.max()).bit_length() - 8)  # cameras fill 8, 12 or 16 bits
        return Image.fromarray(levels.astype(np.uint8)).reduce(factor)
    if "A" in image.getbands() or "transparency" in image.info:
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
        return _without_transparency(whole.reduce(factor))
    return image.convert("L").reduce(factor)


def _without_transparency(image: Image.Image) -> Image.Image:
    """Convert an RGBA image to grey levels on a suitable background.

    If most of it is transparent, the rest is ink and needs a contrasting background. Otherwise the
    background is part of the image, and transparent pixels take its colour.
    """
    grey, alpha = np.asarray(image.convert("L"), np.float32), np.asarray(image)[:, :, 3] / 255
    opaque = alpha > 0.5
    median = float(np.median(grey[opaque])) if opaque.any() else 0.0
    background = median if opaque.mean() > 0.5 else (0.0 if median > 127 else 255.0)
    return Image.fromarray(np.rint(grey * alpha + background * (1 - alpha)).astype(np.uint8))


def _as_mnist(grey: Grey) -> Grey | None:
    """Return the image if it is scaled and centred as every digit of MNIST is, else None."""
    if grey.shape != (IMAGE_SIDE, IMAGE_SIDE):
        return None
    for image in (grey, 255 - grey):
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        if len(rows) and max(np.ptp(rows), np.ptp(columns)) + 1 in (_BOX_SIDE - 1, _BOX_SIDE):
            centres = [_centre_of_mass(image.sum(axis, dtype=np.float64)) for axis in (1, 0)]
            if all(abs(centre - IMAGE_SIDE / 2) <= _OFF_CENTRE for centre in centres):
                return image
    return None


def _fit(ink: Ink) -> Grey:
    """Scale the longer side to 20 pixels and restore full contrast: thin lines turn pale."""
    height, width = (max(1, round(side * _BOX_SIDE / max(ink.shape))) for side in ink.shape)
    scaled = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    levels = np.asarray(scaled).clip(0)
    stretched: Grey = np.rint(255 * levels / levels.max()).astype(np.uint8)
    return stretched


def _centre(digit: Grey) -> Grey:
    """Place the digit in a black 28x28 image, centre of mass as close to (14, 14) as it fits."""
    image = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.uint8)
    top, left = (_offset(digit.sum(axis, dtype=np.float64)) for axis in (1, 0))
    image[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return image


def _offset(ink: NDArray[np.float64]) -> int:
    offset = np.floor(IMAGE_SIDE / 2 - _centre_of_mass(ink) + 0.5)
    return int(np.clip(offset, 0, IMAGE_SIDE - len(ink)))


def _centre_of_mass(ink: NDArray[np.float64]) -> float:
    return float((np.arange(len(ink)) * ink).sum() / ink.sum())
