"""Measure how many test digits `mnist-dist predict` reads right in pictures as people take them.

python -m benchmarks.photographs runs/tuned --data mnist.pkl.gz

A condition is a function that draws one digit on a page. Plain pages are the control: what is
lost there is the model's, or is lost in scaling.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mnist_dist.commands.loading import load_model
from mnist_dist.commands.predict import predict
from mnist_dist.data import Split, find_data, load

Page = NDArray[Any]
"""(height, width), the reflectance of paper and ink from 0 to 1."""
Random = np.random.Generator
Condition = Callable[[Page, Random], Page]


def write_photographs(
    split: Split, which: Sequence[int], directory: Path, name: str, seed: int = 0
) -> list[int]:
    """Draw test digits under the condition `name`, as `0007.png`; return their labels."""
    directory.mkdir()
    for place, index in enumerate(which):
        random = np.random.default_rng([seed, index])
        digit = split.images[index].numpy().reshape(28, 28)
        page = CONDITIONS[name](_page(digit, random), random)
        _picture(page, name, random).save(directory / f"{place:04}.png")
    return [int(split.labels[index]) for index in which]


def _page(digit: NDArray[np.uint8], random: Random) -> Page:
    """Draw a digit 150 to 430 pixels high, on a page of up to twice its size."""
    side = int(random.integers(200, 601))
    width, height = (int(side * random.uniform(1.1, 2)) for _ in range(2))
    left, top = (int(random.integers(0, page - side + 1)) for page in (width, height))
    ink = Image.new("L", (width, height), 0)
    drawn = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    ink.paste(drawn, (left, top))
    paper, contrast = random.uniform(0.8, 1), random.uniform(0.6, 0.95)
    return paper * (1 - contrast * np.asarray(ink, np.float64) / 255)


def _picture(page: Page, name: str, random: Random) -> Image.Image:
    """Add the camera's noise, and store as the condition does."""
    page = (page + random.normal(0, random.uniform(0, 0.015), page.shape)).clip(0, 1)
    bits = {"12 of 16 bits": 12, "8 of 16 bits": 8, "16 bits": 16}.get(name)
    if bits is not None:
        return Image.fromarray(np.rint(page * (2**bits - 1)).astype(np.uint16))
    return Image.fromarray(np.rint(page * 255).astype(np.uint8))


def ink_box(page: Page, dark: bool = True) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of dark or light ink."""
    ink = page < page.max() * 0.7 if dark else page > page.max() * 0.3
    rows, columns = (ink.any(axis).nonzero()[0] for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _draw(page: Page, level: float, draw: Callable[[ImageDraw.ImageDraw], None]) -> Page:
    """Darken the page to `level` where `draw` draws."""
    mask = Image.new("L", page.shape[::-1], 0)
    draw(ImageDraw.Draw(mask))
    cover = np.asarray(mask, np.float64) / 255
    return np.minimum(page, page * (1 - cover) + level * cover)


def black_margin(page: Page, random: Random) -> Page:
    """Lie on a scanner that is larger than the paper."""
    height, width = page.shape
    margins = [int(max(height, width) * random.uniform(0.02, 0.15)) for _ in range(4)]
    sides = ((margins[0], margins[1]), (margins[2], margins[3]))
    return np.pad(page, sides, constant_values=random.uniform(0, 0.1))


def table(page: Page, random: Random) -> Page:
    """Show a table at two edges, with its grain, not quite parallel to them."""
    height, width = page.shape
    level, slant = random.uniform(0.1, 0.5), random.uniform(-0.05, 0.05)
    wide, high = (int(side * random.uniform(0.08, 0.25)) for side in (width, height))
    whole = np.pad(page, ((high, 0), (wide, 0)), mode="edge")
    rows, columns = np.mgrid[: height + high, : width + wide]
    wood = level * (1 + 0.15 * np.sin(rows / 5 + columns / 90))
    on_table = (columns < wide * 0.9 + slant * (rows - height)) | (
        rows < high * 0.9 - slant * (columns - width)
    )
    return np.where(on_table, wood, whole)


def blot(page: Page, random: Random) -> Page:
    """Drop ink next to the digit."""
    left, top, right, bottom = ink_box(page)
    side = bottom - top
    radius = side * random.uniform(0.02, 0.09)
    for _ in range(1000):
        x, y = random.uniform(0, page.shape[1]), random.uniform(0, page.shape[0])
        apart = np.hypot(max(left - x, x - right, 0), max(top - y, y - bottom, 0))
        if apart > radius * 1.3:
            break
    box = (x - radius, y - radius * 0.8, x + radius, y + radius * 0.8)
    return _draw(page, random.uniform(0, 0.3), lambda draw: draw.ellipse(box, fill=255))


def printed_box(page: Page, random: Random) -> Page:
    """Write into the box of a form."""
    left, top, right, bottom = ink_box(page)
    side = max(right - left, bottom - top)
    gaps = [side * random.uniform(0.06, 0.3) for _ in range(4)]
    shift = int(side * 0.4)
    page = np.pad(page, shift, constant_values=page.max())
    box = (left - gaps[0], top - gaps[1], right + gaps[2], bottom + gaps[3])
    moved = tuple(float(edge + shift) for edge in box)
    thick = max(1, round(side * random.uniform(0.008, 0.025)))
    level = random.uniform(0, 0.5)
    return _draw(page, level, lambda draw: draw.rectangle(moved, outline=255, width=thick))


def ruled(page: Page, random: Random, across: bool = False) -> Page:
    """Write on ruled paper."""
    left, top, right, bottom = ink_box(page)
    side = max(right - left, bottom - top)
    spacing, thickness = random.uniform(0.25, 0.9) * side, random.uniform(0.006, 0.02) * side
    thick = max(1, round(thickness))
    first, slope = random.uniform(0, spacing), random.uniform(-0.015, 0.015)
    height, width = page.shape

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        for y in np.arange(first - height * 0.1, height * 1.1, spacing):
            canvas.line((0, y, width, y + slope * width), fill=255, width=thick)
        for x in np.arange(first, width, spacing) if across else ():
            canvas.line((x, 0, x - slope * height, height), fill=255, width=thick)

    return _draw(page, page.max() * random.uniform(0.3, 0.75), draw)


def dim_light(page: Page, random: Random) -> Page:
    """Light the page from one side, the other gets 40 %."""
    height, width = page.shape
    rows, columns = np.mgrid[:height, :width]
    angle = random.uniform(0, 2 * np.pi)
    far = np.cos(angle) * (columns / width - 0.5) + np.sin(angle) * (rows / height - 0.5)
    far = (far - far.min()) / (far.max() - far.min())
    dimmed: Page = page * (1 - 0.6 * far)
    return dimmed


def vignette(page: Page, random: Random) -> Page:
    """Darken the corners to 40 %."""
    height, width = page.shape
    rows, columns = np.mgrid[:height, :width]
    far = (columns / width - 0.5) ** 2 + (rows / height - 0.5) ** 2
    dimmed: Page = page * (1 - 1.2 * far)
    return dimmed


def hard_shadow(page: Page, random: Random) -> Page:
    """Let a hand's shadow fall across the page."""
    height, width = page.shape
    rows, columns = np.mgrid[:height, :width]
    edge = columns - width * random.uniform(0.3, 0.7)
    edge += (rows - height / 2) * random.uniform(-1, 1)
    dimmed: Page = page * (1 - 0.4 / (1 + np.exp(-edge / random.uniform(3, 20))))
    return dimmed


def paper_on_table(page: Page, random: Random) -> Page:
    """Show the table at all edges."""
    height, width = page.shape
    wide = int(max(height, width) * 0.3)
    whole = np.pad(page, wide, constant_values=-1)
    rows, columns = np.mgrid[: whole.shape[0], : whole.shape[1]]
    wood = random.uniform(0.15, 0.5) * (1 + 0.15 * np.sin(rows / 7 + columns / 90))
    turn = random.uniform(-8, 8)
    image = Image.fromarray(whole.astype(np.float32)).rotate(turn, fillcolor=-1)
    turned = np.asarray(image, np.float64)
    return np.where(turned < 0, wood, turned)


def cropped(page: Page, random: Random) -> Page:
    """Cut the picture out close to the digit."""
    left, top, right, bottom = ink_box(page)
    gap = int((bottom - top) * random.uniform(0.02, 0.08))
    return page[max(0, top - gap) : bottom + gap, max(0, left - gap) : right + gap]


def small_canvas(page: Page, random: Random) -> Page:
    """Draw on a canvas of 28x28 to 48x48 pixels."""
    image = Image.fromarray(page.astype(np.float32))
    image.thumbnail((int(random.integers(28, 49)),) * 2, Image.Resampling.BOX)
    return np.asarray(image, np.float64)


def thick_pen(page: Page, random: Random) -> Page:
    """Draw with strokes up to twice as wide."""
    image = Image.fromarray(np.rint(255 * page).astype(np.uint8)).reduce(8)
    image = image.filter(ImageFilter.MinFilter(3))
    return np.asarray(image.resize(page.shape[::-1], Image.Resampling.BICUBIC), np.float64) / 255


def inverted(condition: Condition) -> Condition:
    return lambda page, random: 1 - condition(page, random)


def both(first: Condition, second: Condition) -> Condition:
    return lambda page, random: second(first(page, random), random)


def plain(page: Page, random: Random) -> Page:
    return page


CONDITIONS: dict[str, Condition] = {
    "plain paper": plain,
    "scanner's black margin": black_margin,
    "table at two edges": table,
    "blot": blot,
    "printed box": printed_box,
    "ruled lines": ruled,
    "light falling off to 40 %": dim_light,
    "16 bits": plain,
    "12 of 16 bits": plain,
    "8 of 16 bits": plain,
    "cropped": cropped,
    "white on black, cropped": inverted(cropped),
    "small canvas": small_canvas,
    "squared paper": lambda page, random: ruled(page, random, across=True),
    "dark corners": vignette,
    "hard shadow": hard_shadow,
    "paper on a table": paper_on_table,
    "thick pen": thick_pen,
    "white on black": inverted(plain),
    "white on black, thick": inverted(thick_pen),
    "white on black, blot": inverted(blot),
    "white on black, ruled": inverted(ruled),
    "white on black, box": inverted(printed_box),
    "ruled and dim": both(ruled, dim_light),
    "box and margin": both(printed_box, black_margin),
    "blot, table and dim": both(both(blot, table), dim_light),
}


def main() -> None:
    """Print how many of `--count` are right under each condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="run directory or checkpoint")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    model, test = load_model(chosen.model), load(find_data(chosen.data, None)).test
    for name in CONDITIONS:
        with tempfile.TemporaryDirectory() as temporary:
            pictures = Path(temporary) / "pictures"
            labels = write_photographs(test, range(chosen.count), pictures, name, chosen.seed)
            files = sorted(pictures.iterdir())
            found = predict(model, files)
        right = sum(one.digit == label for one, label in zip(found, labels, strict=True))
        print(f"{name:28} {right:4} of {chosen.count}", flush=True)


if __name__ == "__main__":
    main()
