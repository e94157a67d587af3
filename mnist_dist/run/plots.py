"""Images for TensorBoard, drawn with Pillow in at most 16 colors.

Few colors make small files: tensorboard computes their checksums in Python, 0.2 ms a kilobyte.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colors = NDArray[np.uint8]
_LIGHT, _DARK = 0, 255  # gray levels while drawing; a palette colors them at the end
_GRAYS = np.linspace((255, 255, 255), (0, 0, 0), 16).round().astype(np.uint8)
_BLUES = np.linspace((247, 251, 255), (8, 48, 107), 16).round().astype(np.uint8)
_RED_WHITE_BLUE = np.concatenate(
    [
        np.linspace((178, 24, 43), (250, 250, 250), 8),
        np.linspace((250, 250, 250), (33, 102, 172), 8)[1:],
    ]
).astype(np.uint8)


def confusion_matrix(counts: Sequence[Sequence[int]]) -> Image.Image:
    """Draw counts by label (row) and prediction (column), with the number in each nonzero cell.

    A cell's shade is the square root of its share of the row, so that a few errors stand out next
    to a diagonal that holds nearly all samples.
    """
    table = np.asarray(counts)
    shades = (_DARK * np.sqrt(table / np.maximum(table.sum(1, keepdims=True), 1))).astype(int)
    size, cell, margin = len(table), 44, 56
    image = Image.new("L", (margin + size * cell, margin + size * cell), _LIGHT)
    middle = margin + size * cell // 2
    _write(ImageDraw.Draw(image), "label", (middle, 16))
    image = image.transpose(Image.Transpose.ROTATE_90)
    draw = ImageDraw.Draw(image)
    _write(draw, "predicted", (middle, 16))
    for row in range(size):
        y = margin + row * cell
        _write(draw, str(row), (y + cell // 2, margin - 14))
        _write(draw, str(row), (margin - 14, y + cell // 2))
        for column in range(size):
            x, shade = margin + column * cell, int(shades[row, column])
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if count := table[row, column]:
                contrast = _LIGHT if shade > 128 else _DARK
                _write(draw, str(count), (x + cell // 2, y + cell // 2), contrast)
    return _colored(np.asarray(image) // 16, _BLUES)


def captioned_digits(
    digits: Sequence[tuple[NDArray[np.uint8], str]], columns: int = 4
) -> Image.Image:
    """Draw digits enlarged, dark on white, each above its caption.

    Args:
        digits: images (28, 28), light on dark as in MNIST, and captions of up to two lines.
        columns: digits in a row.
    """
    side, width, height = 84, 126, 130
    rows = -(-len(digits) // columns)
    image = Image.new("L", (columns * width, rows * height), _LIGHT)
    draw = ImageDraw.Draw(image)
    for number, (digit, caption) in enumerate(digits):
        x, y = number % columns * width, number // columns * height
        image.paste(Image.fromarray(digit).resize((side, side)), (x + (width - side) // 2, y + 4))
        below = (x + width / 2, y + side)
        draw.multiline_text(below, caption, _DARK, _font(15), anchor="ma", align="center")
    return _colored(np.asarray(image) // 16, _GRAYS)


def weight_tiles(weights: NDArray[np.floating[Any]]) -> Image.Image:
    """Draw filters (n, height, width) side by side: negative red, zero white, positive blue."""
    count, height, width = weights.shape
    columns = min(count, 16)
    zero = len(_RED_WHITE_BLUE) // 2
    largest = float(np.abs(weights).max()) or 1.0
    tiles = (weights / largest * zero + zero).round().astype(np.uint8)
    rows = -(-count // columns)
    image = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2), zero, np.uint8)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (height + 2) + 2, number % columns * (width + 2) + 2
        image[y : y + height, x : x + width] = tile
    return _colored(image, _RED_WHITE_BLUE)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(
    draw: ImageDraw.ImageDraw, text: str, center: tuple[int, int], level: int = _DARK
) -> None:
    draw.text(center, text, level, _font(18), anchor="mm")


def _colored(levels: NDArray[Any], colors: Colors) -> Image.Image:
    """Make an image of palette indices (height, width) and RGB colors (n, 3)."""
    image = Image.fromarray(levels)
    image.putpalette(colors.tobytes())
    return image
