"""Pictures of digits, prepared as MNIST's own were.

LeCun, Cortes and Burges describe it (yann.lecun.com/exdb/mnist): the digit is scaled to fit a box
of 20x20 pixels, its aspect ratio kept, with grey levels from anti-aliasing, and moved in a field of
28x28 so that its centre of mass is at the centre. In their files that is pixel (14, 14), by whole
pixels: the centre of mass of every test digit lies between 13.5 and 14.5.

Files are not trusted: two formats, both decoded by Pillow, and no more pixels to decode than a
limit, for which half a gigabyte of memory is enough.
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
from mnist_dist.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_MOST_PIXELS = 50_000_000
_FIELD, _BOX = 28, 20
# A longer side than this adds nothing to a box of 20 pixels but work.
_LONGEST_SIDE = 1000
# Levels of 255 by which a digit must stand out from its background.
_LEAST_CONTRAST = 25
# Shares that count as background, not as ink: shadows and paper; specks beside the digit.
_FAINT, _SPECKS = 0.3, 0.004

Grey = NDArray[np.uint8]
Ink = NDArray[np.float32]


def prepare(path: str | Path) -> Tensor:
    """The digit in the picture `path`, a PNG or JPEG of any size: (784,) uint8, white on black.

    What stands out from the border is ink, whether darker or lighter. A picture of 28x28 pixels
    with a black border is MNIST's own form already, and is taken as it is.

    Raises:
        UserError: the file is no such picture, is damaged, too large, or blank.
    """
    path = Path(path)
    name = one_line(str(path))
    grey = _read(path, name)
    if grey.shape == (_FIELD, _FIELD) and np.median(_border(grey)) == 0 and grey.any():
        field = grey
    else:
        field = _centre(_fit(_crop(_ink(grey, name))))
    return torch.from_numpy(field.reshape(-1).copy())


def find_pictures(path: str | Path) -> list[Path]:
    """`path` itself, or if it is a directory the PNG and JPEG files in it, by name.

    Raises:
        UserError: the directory holds none, or cannot be read.
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
    """The picture as grey levels, turned upright, without transparency, not too large."""
    if not path.is_file():  # a pipe or device might never end
        fault = "is no file" if path.exists() else "no such file"
        raise UserError(f"{name}: {fault}; name a PNG or JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is an error below
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.draft("L", (_LONGEST_SIDE, _LONGEST_SIDE))  # a JPEG decodes smaller at once
                if image.width * image.height > _MOST_PIXELS:
                    raise UserError(_too_large(name))
                ImageOps.exif_transpose(image, in_place=True)
                return np.asarray(_flatten(image))
    except Image.DecompressionBombError:
        raise UserError(_too_large(name)) from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: no PNG or JPEG; save the picture as one") from None
    except UserError:
        raise
    except Exception as error:  # Pillow fed hostile bytes raises more kinds than it documents
        raise UserError(
            f"{name}: is damaged or cannot be read ({type(error).__name__}); save it anew"
        ) from error


def _too_large(name: str) -> str:
    return f"{name}: has more than {_MOST_PIXELS:,} pixels; scale it down"


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as 8 bit grey, not much larger than is of use."""
    factor = max(1, max(image.size) // _LONGEST_SIDE)
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow's own conversion would clip
        levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(levels).reduce(factor)
    if "A" in image.getbands() or "transparency" in image.info:
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
        return _without_transparency(whole.reduce(factor))
    return image.convert("L").reduce(factor)


def _without_transparency(image: Image.Image) -> Image.Image:
    """Grey levels of an RGBA picture, on the background that its author would see it on.

    Where most is transparent, the rest is ink, and the background must be unlike it; else the
    background is part of the picture, and what shows through must be like it.
    """
    grey, alpha = np.asarray(image.convert("L"), np.float32), np.asarray(image)[:, :, 3] / 255
    opaque = alpha > 0.5
    middle = float(np.median(grey[opaque])) if opaque.any() else 0.0
    behind = middle if opaque.mean() > 0.5 else (0.0 if middle > 127 else 255.0)
    return Image.fromarray(np.rint(grey * alpha + behind * (1 - alpha)).astype(np.uint8))


def _border(levels: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])


def _ink(grey: Grey, name: str) -> Ink:
    """How much each pixel stands out from the background, 0 to 1; 0 where it hardly does."""
    background = float(np.median(_border(grey)))
    darker, lighter = background - float(grey.min()), float(grey.max()) - background
    contrast = max(darker, lighter)
    if contrast < _LEAST_CONTRAST:
        raise UserError(f"{name}: is blank: no digit stands out; use a picture with more contrast")
    levels = grey.astype(np.float32)
    ink = (background - levels if darker >= lighter else levels - background) / contrast
    ink[ink < _FAINT] = 0
    return ink


def _crop(ink: Ink) -> Ink:
    """The box around all the ink but the outermost specks."""
    rows, columns = _extent(ink.sum(1)), _extent(ink.sum(0))
    return ink[rows, columns]


def _extent(ink: NDArray[np.float32]) -> slice:
    share = np.cumsum(ink, dtype=np.float64) / ink.sum(dtype=np.float64)
    first = int(np.searchsorted(share, _SPECKS, side="right"))
    last = int(np.searchsorted(share, 1 - _SPECKS))
    return slice(min(first, last), last + 1)


def _fit(ink: Ink) -> Grey:
    """Scaled so that the longer side has 20 pixels, and to full contrast: thin lines turn pale."""
    height, width = (max(1, round(side * _BOX / max(ink.shape))) for side in ink.shape)
    scaled = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    levels = np.asarray(scaled).clip(0)
    stretched: Grey = np.rint(255 * levels / levels.max()).astype(np.uint8)
    return stretched


def _centre(digit: Grey) -> Grey:
    """In a black field of 28x28, its centre of mass as near to pixel (14, 14) as it fits."""
    field = np.zeros((_FIELD, _FIELD), np.uint8)
    top, left = (_offset(digit.sum(axis, dtype=np.float64)) for axis in (1, 0))
    field[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return field


def _offset(ink: NDArray[np.float64]) -> int:
    centre = (np.arange(len(ink)) * ink).sum() / ink.sum()
    return int(np.clip(np.floor(_FIELD / 2 - centre + 0.5), 0, _FIELD - len(ink)))
