"""Pictures for TensorBoard: drawn with numpy, a millisecond each; no plotting library."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_GLYPHS = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    ">": "..... ...#. ....# ##### ....# ...#. .....",
    "%": "##..# ##..# ...#. ..#.. .#... #..## #..##",
    "v": "..#.. ..#.. ..#.. ..#.. #.#.# .###. ..#..",
    "a": "..... ..... .###. ....# .#### #...# .####",
    "d": "....# ....# .##.# #..## #...# #...# .####",
    "e": "..... ..... .###. #...# ##### #.... .###.",
    "g": "..... .#### #...# #...# .#### ....# .###.",
    "i": "..#.. ..... .##.. ..#.. ..#.. ..#.. .###.",
    "k": "#.... #.... #..#. #.#.. ##... #.#.. #..#.",
    "n": "..... ..... #.##. ##..# #...# #...# #...#",
    "s": "..... ..... .#### #.... .###. ....# ####.",
    "t": ".#... .#... ###.. .#... .#... .#..# ..##.",
    " ": "..... ..... ..... ..... ..... ..... .....",
}
_FONT = {
    character: np.array([[dot == "#" for dot in row] for row in rows.split()])
    for character, rows in _GLYPHS.items()
}
_ADVANCE, _HEIGHT = 6, 7  # of a character, before it is enlarged

_INK = np.arange(255, -1, -1, dtype=np.uint8)[:, None].repeat(3, 1)
_SIDE = 28
_BLUES = np.linspace((247, 251, 255), (8, 48, 107), 256).astype(np.uint8)
_RED_BLUE = np.concatenate(
    [
        np.linspace((178, 24, 43), (250, 250, 250), 128),
        np.linspace((250, 250, 250), (33, 102, 172), 128),
    ]
).astype(np.uint8)


@dataclass(frozen=True)
class Picture:
    """Indexed pixels."""

    pixels: Pixels
    """(height, width): indices into the palette."""
    palette: Pixels
    """(256, 3): red, green, blue."""

    def png(self) -> bytes:
        """The picture as PNG with a palette (https://www.w3.org/TR/png/)."""
        height, width = self.pixels.shape
        header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
        lines = np.zeros((height, width + 1), np.uint8)  # a line begins with its filter: 0, none
        lines[:, 1:] = self.pixels
        chunks = [(b"IHDR", header), (b"PLTE", self.palette.tobytes())]
        # Runs of one colour are all there is to find; to look for more takes three times as long.
        packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
        chunks += [(b"IDAT", packer.compress(lines.tobytes()) + packer.flush()), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@cache
def _glyph(character: str, scale: int) -> NDArray[np.bool_]:
    return _FONT[character].repeat(scale, 0).repeat(scale, 1)


def _write(pixels: Pixels, text: str, middle: tuple[int, int], value: int, scale: int = 2) -> None:
    """Put `text` centred on `middle` (row, column) in colour `value`."""
    row = middle[0] - _HEIGHT * scale // 2
    column = middle[1] - (len(text) * _ADVANCE - 1) * scale // 2
    for character in text:
        glyph = _glyph(character, scale)
        place = pixels[row : row + glyph.shape[0], column : column + glyph.shape[1]]
        place[glyph] = value
        column += _ADVANCE * scale


def confusion_matrix(table: Sequence[Sequence[int]]) -> Picture:
    """Digits downwards, what they were taken for across; darker is a larger share of the digit.

    The colour grows with the root of the share: single mistakes are to be seen beside a diagonal
    that holds nearly all.
    """
    counts = np.asarray(table, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shade = (np.sqrt(shares) * 255).astype(np.uint8)
    size, height, width, left, top = len(counts), 34, 52, 112, 56
    pixels = np.zeros((top + size * height, left + size * width), np.uint8)
    cells = shade.repeat(height, 0).repeat(width, 1)
    cells[::height] = cells[:, ::width] = 0
    pixels[top:, left:] = cells
    _write(pixels, "taken as >", (16, left + size * width // 2), 255)
    _write(pixels, "digit v", (top - 18, left // 2), 255)
    for digit in range(size):
        _write(pixels, str(digit), (top - 12, left + digit * width + width // 2), 255)
        _write(pixels, str(digit), (top + digit * height + height // 2, left - 20), 255)
    for row, column in zip(*counts.nonzero(), strict=True):
        middle = (top + row * height + height // 2 + 1, left + column * width + width // 2 + 1)
        dark = shade[row, column] > 128
        _write(pixels, f"{counts[row, column]:.0f}", middle, 0 if dark else 255)
    return Picture(pixels, _BLUES)


def captioned_digits(digits: Sequence[tuple[Pixels, str]], columns: int = 6) -> Picture:
    """Digits, (28, 28) each and white on black as in the data, with a caption below each."""
    scale, gap, caption = 3, 18, 26
    width, height = _SIDE * scale + gap, _SIDE * scale + caption
    rows = max(1, -(-len(digits) // columns))
    pixels = np.zeros((rows * height + gap, columns * width + gap), np.uint8)
    for number, (digit, text) in enumerate(digits):
        row, column = number // columns * height + gap, number % columns * width + gap
        large = digit.repeat(scale, 0).repeat(scale, 1)
        pixels[row : row + _SIDE * scale, column : column + _SIDE * scale] = large
        _write(pixels, text, (row + _SIDE * scale + 10, column + _SIDE * scale // 2), 255)
    return Picture(pixels, _INK)


def weights(tiles: NDArray[np.floating[Any]]) -> Picture:
    """Filters (n, height, width) side by side: red below zero, blue above, white at zero."""
    count, height, width = tiles.shape
    columns = min(count, 16)
    rows = -(-count // columns)
    most = float(np.abs(tiles).max()) or 1.0
    # 64 steps of colour: to the eye the same, a third of the bytes.
    colours = (np.clip(tiles / most, -1, 1) * 31.5 + 31.5).round().astype(np.uint8) * 4 + 2
    pixels = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2), 128, np.uint8)
    for number, tile in enumerate(colours):
        row, column = number // columns * (height + 2) + 2, number % columns * (width + 2) + 2
        pixels[row : row + height, column : column + width] = tile
    return Picture(pixels, _RED_BLUE)
