"""Preprocess images of digits as the images of MNIST were.

LeCun, Cortes and Burges describe it (yann.lecun.com/exdb/mnist): the digit is scaled to fit a box
of 20x20 pixels, with its aspect ratio and with anti-aliasing, and placed in a 28x28 image with its
centre of mass at the centre. In their files this is pixel (14, 14), in whole pixels: the centre of
mass of every test digit is between 13.5 and 14.5.

Files are not trusted: only PNG and JPEG are decoded, by Pillow, and the number of pixels is limited
so that half a gigabyte of memory is enough.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mnist_dist.data.errors import one_line
from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_MAX_PIXELS = 50_000_000
_BOX_SIDE = 20
# Larger images are reduced first: more pixels do not improve a box of 20.
_MAX_SIDE = 1000
# Minimum contrast of a digit to its background, of 255.
_MIN_CONTRAST = 25
# Fractions that count as background: of the contrast (shadows, paper), and of the ink (specks).
_FAINT, _SPECKS = 0.3, 0.004

Grey = NDArray[np.uint8]
Ink = NDArray[np.float32]


def preprocess_image(path: str | Path) -> Tensor:
    """Convert a PNG or JPEG of a digit, of any size, to (784,) uint8, white on black.

    Ink is what differs from the border, whether darker or lighter. An image of 28x28 pixels with a
    black border already has MNIST's format and is returned unchanged.

    Raises:
        UserError: the file is not a PNG or JPEG, is damaged, too large, or blank.
    """
    path = Path(path)
    name = one_line(str(path))
    grey = _read(path, name)
    if grey.shape == (IMAGE_SIDE, IMAGE_SIDE) and np.median(_border(grey)) == 0 and grey.any():
        image = grey
    else:
        image = _centre(_fit(_crop(_ink(grey, name))))
    return torch.from_numpy(image.reshape(-1).copy())


def find_images(path: str | Path) -> list[Path]:
    """Return [path], or if it is a directory its PNG and JPEG files, sorted by name.

    Raises:
        UserError: the directory contains none, or cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    name = one_line(str(path))
    try:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; name a directory that can be read") from error
    if not found:
        raise UserError(f"{name}: holds no .png, .jpg or .jpeg; name a directory with pictures")
    return found


def _read(path: Path, name: str) -> Grey:
    """Read grey levels, rotated by the EXIF tag, without transparency, reduced if large."""
    if not path.is_file():  # reading a pipe or device might never end
        fault = "is no file" if path.exists() else "no such file"
        raise UserError(f"{name}: {fault}; name a PNG or JPEG")
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
        raise UserError(f"{name}: no PNG or JPEG; save the picture as one") from None
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
    factor = max(1, max(image.size) // _MAX_SIDE)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("L") would clip
        levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(levels).reduce(factor)
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


def _border(levels: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])


def _ink(grey: Grey, name: str) -> Ink:
    """Return the contrast of each pixel to the background, 0 to 1; faint pixels are 0."""
    background = float(np.median(_border(grey)))
    darker, lighter = background - float(grey.min()), float(grey.max()) - background
    contrast = max(darker, lighter)
    if contrast < _MIN_CONTRAST:
        raise UserError(f"{name}: is blank: no digit stands out; use a picture with more contrast")
    levels = grey.astype(np.float32)
    ink = (background - levels if darker >= lighter else levels - background) / contrast
    ink[ink < _FAINT] = 0
    return ink


def _crop(ink: Ink) -> Ink:
    """Crop to the bounding box of the ink, except for specks."""
    rows, columns = _extent(ink.sum(1)), _extent(ink.sum(0))
    return ink[rows, columns]


def _extent(ink: NDArray[np.float32]) -> slice:
    share = np.cumsum(ink, dtype=np.float64) / ink.sum(dtype=np.float64)
    first = int(np.searchsorted(share, _SPECKS, side="right"))
    last = int(np.searchsorted(share, 1 - _SPECKS))
    return slice(min(first, last), last + 1)


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
    centre = (np.arange(len(ink)) * ink).sum() / ink.sum()
    return int(np.clip(np.floor(IMAGE_SIDE / 2 - centre + 0.5), 0, IMAGE_SIDE - len(ink)))
