"""Separate a digit from the rest of a picture: light, margins, tables, lines, frames and blots.

Paper is a grey closing of the picture: over a square wider than a stroke, the maximum and then the
minimum. It follows light that falls off and the edges of the paper. What is darker is ink.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.uint8]
Ink = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""Top, left, bottom and right."""

# Sides of squares, of the picture's `_side`: wider than any stroke, and wider than some.
_PAPER_WINDOW, _STROKE_WINDOWS = 1 / 3, (1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6)
# What strokes differ from paper, as a mean of squares, of the square of the picture's range.
_ENOUGH_INK = 0.004
# Of the picture's range: the range along an even edge, and what differs from that edge.
_EVEN, _DISTINCT = 0.15, 0.25
# What a sheet, perhaps turned, fills of its box, and of its rows and columns from end to end.
_SHEET_IN_BOX, _SHEET_IN_ROWS = 0.7, 0.91
# How many times as much ink of one kind settles whether ink is dark.
_OUTWEIGHS = 2.5
# Paper in the dark counts as this bright, of the brightest: dark noise is no ink.
_DARKEST = 0.3
# Minimum contrast of ink to paper, and of a pixel, of the digit's: less is paper and shadows.
_MIN_CONTRAST, _FAINT = 0.1, 0.3
# Smaller pictures are not smoothed.
_SMOOTHED_SIDE = 100
# Share of a side of the picture that a margin touches, and that no digit touches.
_MARGIN, _WHOLE_SIDE = 0.5, 0.95
# Of lines: thickness, of the picture's and of the frame's side; height per width; share of the
# width that is line, and that is line or stroke.
_LINE_THICKNESS, _FRAME_THICKNESS, _MAX_SLOPE = 0.025, 0.06, 0.04
_LINE_SEEN, _LINE_COVERAGE = 0.25, 0.9
# Parts of one digit, relative to the largest: minimum extent, maximum gap.
_PART, _GAP = 0.2, 0.15
# Pixels of a speck, of the picture's.
_SPECK = 5e-5
# Another digit, relative to the first: minimum extent and mass. 1 % of MNIST's are wider than this.
_SECOND, _SECOND_MASS, _WIDE = 0.5, 0.2, 1.4


@dataclass(frozen=True)
class Digit:
    """A digit that was found in a picture."""

    ink: Ink
    """(height, width), 0 to 1, cropped to the digit."""
    notes: tuple[str, ...]
    """Why it may be misread."""


@dataclass(frozen=True)
class _Shape:
    """Connected pixels of ink."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    mass: float
    """The sum of their contrasts."""

    @property
    def box(self) -> Box:
        rows, columns = self.rows, self.columns
        return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1

    @property
    def extent(self) -> int:
        top, left, bottom, right = self.box
        return max(bottom - top, right - left)

    @property
    def score(self) -> float:
        """Blots have little extent, and hairs little mass."""
        return self.mass * self.extent


def find_digit(grey: Grey) -> Digit | None:
    """Return the largest digit in a picture, None if nothing stands out."""
    levels = (grey if _is_ink_dark(grey) else 255 - grey).astype(np.float32)
    soft = _blur(levels) if _side(levels) >= _SMOOTHED_SIDE else levels
    paper = _closing(soft, _PAPER_WINDOW)
    brightness = np.maximum(paper, max(1.0, _DARKEST * paper.max()))
    contrast, smooth = (((paper - dark) / brightness).clip(0) for dark in (levels, soft))
    clutter = np.zeros(levels.shape, bool)
    shapes: list[_Shape] = []
    for _ in range(4):  # without a dark margin, paler ink may be seen
        strongest = float(smooth[~clutter].max(initial=0))
        if strongest < _MIN_CONTRAST:
            shapes = [shape for shape in shapes if _contact(shape, clutter.shape) < _WHOLE_SIDE]
            clutter[:] = False
            break
        shapes = _handwriting((smooth > _FAINT * strongest) & ~clutter, clutter, contrast)
        margins = [shape for shape in shapes if _contact(shape, clutter.shape) >= _MARGIN]
        if not margins:
            break
        for shape in margins:
            clutter[shape.rows, shape.columns] = True
        clutter = _grow(_grow(_grow(clutter)))
    return _read_shapes(shapes, contrast, clutter) if shapes else None


def _is_ink_dark(grey: Grey) -> bool:
    """Return whether ink is darker than paper. Strokes are narrower than the paper between them.

    So a closing by a small square removes dark ink, and an opening removes light ink. An even edge
    all around settles it, unless it is a margin around a sheet.
    """
    factor = math.ceil(_side(grey) / 200)
    levels = np.asarray(Image.fromarray(grey).reduce(factor), np.float32)
    edge, contrast = np.concatenate([*levels[[0, -1]], *levels.T[[0, -1]]]), np.ptp(levels)
    inside = abs(levels - np.median(edge)) > _DISTINCT * contrast
    if np.ptp(edge) <= _EVEN * contrast and inside.any() and not _is_sheet(inside):
        return bool(np.median(edge) > levels[inside].mean())
    removed = [
        tuple(
            float(((_closing(each, window) - each) ** 2).mean()) for each in (levels, 255 - levels)
        )
        for window in _STROKE_WINDOWS
    ]
    enough = min(_ENOUGH_INK * np.ptp(levels) ** 2, max(map(max, removed)) / 2)
    first = next(place for place, ink in enumerate(removed) if max(ink) >= enough)
    # What bold strokes enclose is narrower than they are, but they outweigh it in wider squares.
    wider = removed[min(first + 2, len(removed) - 1)]
    dark, light = wider if max(wider) >= _OUTWEIGHS * min(wider) else removed[first]
    return dark >= light


def _is_sheet(mask: Mask) -> bool:
    """Return whether a mask fills its box, and its rows and columns from end to end."""
    rows, columns = mask.nonzero()
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    ends = [(m.shape[1] - m.argmax(1) - m[:, ::-1].argmax(1))[m.any(1)] for m in (mask, mask.T)]
    return bool(
        len(rows) >= _SHEET_IN_BOX * box
        and len(rows) >= _SHEET_IN_ROWS * max(lengths.sum() for lengths in ends)
    )


def _handwriting(mask: Mask, clutter: Mask, contrast: Ink) -> list[_Shape]:
    """Return the shapes of a mask without ruled lines and the frames of form fields."""
    thickest = max(2, round(_LINE_THICKNESS * _side(mask)))
    known = mask | clutter
    mask = mask & ~(_lines(mask, known, thickest) | _lines(mask.T, known.T, thickest).T)
    shapes = _shapes(mask, contrast)
    frames = np.zeros(mask.shape, bool)
    for shape in shapes:
        top, left, bottom, right = shape.box
        own = np.zeros((bottom - top, right - left), bool)
        own[shape.rows - top, shape.columns - left] = True
        thickest = max(2, round(_FRAME_THICKNESS * max(own.shape)))
        across, down = _lines(own, own, thickest), _lines(own.T, own.T, thickest).T
        high, wide = across.any(axis=1).nonzero()[0], down.any(axis=0).nonzero()[0]
        if _spans(high, bottom - top) and _spans(wide, right - left):
            frames[top:bottom, left:right] |= across | down
    return (_shapes(mask & ~frames, contrast) or shapes) if frames.any() else shapes


def _spans(lines: NDArray[np.intp], side: int) -> bool:
    """Return whether there are lines in the first and in the last fifth of a side."""
    return len(lines) > 0 and int(lines[0]) < side / 5 and int(lines[-1]) >= side * 4 / 5


def _read_shapes(shapes: Sequence[_Shape], contrast: Ink, clutter: Mask) -> Digit:
    """Join the parts of the largest digit; the shapes at an edge only if there are no others."""
    edge = _grow(clutter)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    inside: list[_Shape] = []
    outside: list[_Shape] = []
    for shape in shapes:
        (outside if edge[shape.rows, shape.columns].any() else inside).append(shape)
    largest = [max(group, key=lambda shape: shape.score) for group in (inside, outside) if group]
    main = largest[0]
    if len(largest) == 2 and largest[0].extent < 0.3 * largest[1].extent:
        main, inside = largest[1], []
    chosen = np.zeros(contrast.shape, bool)
    several = False
    for shape in inside or outside:
        is_near = _gap(shape.box, main.box) < _GAP * main.extent
        if shape is main or (is_near and shape.extent > _PART * main.extent):
            chosen[shape.rows, shape.columns] = True
        elif shape.extent > _SECOND * main.extent and shape.mass > _SECOND_MASS * main.mass:
            several = True
    ink = np.where(_grow(chosen), contrast / np.percentile(contrast[chosen], 95), 0).clip(0, 1)
    ink[ink < _FAINT] = 0
    rows, columns = (ink.any(axis).nonzero()[0] for axis in (1, 0))
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    notes = []
    if several or digit.shape[1] > _WIDE * digit.shape[0]:
        notes.append("perhaps several digits: one per image is classified")
    if (edge & chosen).any():
        notes.append("perhaps cut off: ink reaches an edge")
    return Digit(digit, tuple(notes))


def _gap(one: Box, other: Box) -> float:
    across = max(one[1] - other[3], other[1] - one[3], 0)
    down = max(one[0] - other[2], other[0] - one[2], 0)
    return float(np.hypot(across, down))


def _contact(shape: _Shape, size: tuple[int, ...]) -> float:
    """Return the largest share of a side of the picture that the shape touches."""
    (height, width), rows, columns = size, shape.rows, shape.columns
    across = max((rows == 0).sum(), (rows == height - 1).sum()) / width
    down = max((columns == 0).sum(), (columns == width - 1).sum()) / height
    return float(max(across, down))


def _side(picture: NDArray[Any]) -> float:
    """Return the side of a square of the same area."""
    return math.sqrt(picture.size)


def _closing(levels: Ink, window: float) -> Ink:
    """Return the grey closing by a square with a side of `window` of `_side`."""
    half = max(1, round(_side(levels) * window / 2))
    # Reflected at the edge's value, so that light that falls off goes on to fall.
    closed = np.pad(np.rint(levels).astype(np.int16), 2 * half, "reflect", reflect_type="odd")
    for extreme in (np.maximum, np.minimum):
        for _ in range(2):
            closed = _slide(closed, 2 * half + 1, extreme).T
    return closed.astype(np.float32)


def _slide(values: NDArray[np.int16], width: int, extreme: np.ufunc) -> NDArray[np.int16]:
    """Return the extremes of `width` neighbours in each row; rows get shorter by width - 1."""
    span = 1
    while span < width:
        step = min(span, width - span)
        values = extreme(values[:, :-step], values[:, step:])
        span += step
    return values


def _blur(levels: Ink) -> Ink:
    """Return the means of 3x3 pixels."""
    padded = np.pad(levels, 1, "edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean: Ink = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return mean


def _grow(mask: Mask) -> Mask:
    """Add the neighbours of each pixel."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _lines(mask: Mask, covered: Mask, thickest: int) -> Mask:
    """Return the pixels of straight, thin, nearly horizontal lines from side to side.

    Where they cross a stroke, or `covered` pixels, they are not seen, and the stroke remains.
    """
    found = np.zeros(mask.shape, bool)
    height, width = mask.shape
    # Vertical runs of ink: a line is a short one in every column, at one height but for a slope.
    steps = np.diff(np.pad(mask, ((1, 1), (0, 0))).T.astype(np.int8), axis=1)
    columns, starts = (steps == 1).nonzero()
    ends = (steps == -1).nonzero()[1]
    thin = ends - starts <= thickest
    columns, starts, ends = columns[thin], starts[thin], ends[thin]
    if not len(columns) or width < 20:
        return found
    centres, along = (starts + ends - 1) / 2, columns - width / 2
    slopes = np.linspace(-_MAX_SLOPE, _MAX_SLOPE, 2 * round(_MAX_SLOPE * width) + 1)
    levelled = [_counts(centres - slope * along, height) for slope in slopes]
    slope = slopes[int(np.argmax([(counts**2).sum() for counts in levelled]))]
    heights = np.rint(centres - slope * along).astype(int)
    drift = np.rint(slope * (np.arange(width) - width / 2)).astype(int)
    known = np.pad(covered | mask, ((2, 2), (0, 0)))
    for line in (_counts(heights, height) > _LINE_SEEN * width).nonzero()[0]:
        rows = (line + drift).clip(0, height - 1) + 2
        way = np.any([known[rows + offset, np.arange(width)] for offset in (-2, -1, 0, 1, 2)], 0)
        if way.mean() >= _LINE_COVERAGE:
            own = abs(heights - line) <= 2
            for column, start, end in zip(columns[own], starts[own], ends[own], strict=True):
                found[start:end, column] = True
    return found


def _counts(heights: NDArray[Any], height: int) -> NDArray[np.intp]:
    """Count the runs at each height, with those one pixel above and below."""
    counts = np.bincount(np.rint(heights).astype(int).clip(0, height - 1), minlength=height)
    padded = np.pad(counts, 1)
    total: NDArray[np.intp] = padded[:-2] + padded[1:-1] + padded[2:]
    return total


def _shapes(mask: Mask, contrast: Ink) -> list[_Shape]:
    """Return the connected shapes of a mask, diagonals included, without specks."""
    rows, columns = mask.nonzero()
    index = np.full((mask.shape[0] + 1, mask.shape[1] + 2), -1)
    index[rows, columns + 1] = np.arange(len(rows))
    pairs = []
    for down, across in ((0, 1), (1, -1), (1, 0), (1, 1)):
        neighbors = index[rows + down, columns + 1 + across]
        own = (neighbors >= 0).nonzero()[0]
        pairs.append((own, neighbors[own]))
    one, other = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    # Union by hooking the higher root to the lower one.
    root = np.arange(len(rows))
    while len(one):
        high, low = np.maximum(root[one], root[other]), np.minimum(root[one], root[other])
        apart = high != low
        one, other = one[apart], other[apart]
        root[high[apart]] = low[apart]
        while (root[root] != root).any():
            root = root[root]
    order = np.argsort(root, kind="stable")
    bounds = np.flatnonzero(np.diff(root[order])) + 1
    weights = contrast[rows, columns]
    return [
        _Shape(rows[own], columns[own], float(weights[own].sum()))
        for own in np.split(order, bounds)
        if len(own) > _SPECK * mask.size
    ]
