"""Test digits written out as people's pictures are: large, off-centre, dark on white."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from mnist_dist.data import Split


def write_pictures(split: Split, which: Iterable[int], directory: Path, seed: int = 0) -> list[int]:
    """Each digit 200 to 600 pixels high, somewhere on a larger white page, as `0007.png`.

    Returns:
        The labels, in the order of the files' names.
    """
    directory.mkdir()
    generator = np.random.default_rng(seed)
    labels = []
    for place, index in enumerate(which):
        digit = Image.fromarray(split.images[index].numpy().reshape(28, 28))
        side = int(generator.integers(200, 601))
        width, height = (int(side * generator.uniform(1.1, 2)) for _ in range(2))
        left, top = (int(generator.integers(0, page - side + 1)) for page in (width, height))
        page = Image.new("L", (width, height), 0)
        page.paste(digit.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        Image.eval(page, lambda level: 255 - level).save(directory / f"{place:04}.png")
        labels.append(int(split.labels[index]))
    return labels


def one_picture(split: Split, index: int = 0, side: int = 200) -> Image.Image:
    """One digit in black on white, in the lower right of its page."""
    digit = Image.fromarray(255 - split.images[index].numpy().reshape(28, 28))
    page = Image.new("L", (side * 2, side * 3 // 2), 255)
    page.paste(digit.resize((side, side), Image.Resampling.BICUBIC), (side * 9 // 10, side // 3))
    return page
