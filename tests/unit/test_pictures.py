"""What TensorBoard's pictures show, read back from the PNG by a library."""

import io

import numpy as np
import torch
from PIL import Image

from mnist_dist.run import plots as pictures
from mnist_dist.run.metrics import is_looked_at


def decoded(picture: pictures.Picture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.png())) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_png_holds_every_pixel() -> None:
    generator = np.random.default_rng(0)
    indices = generator.integers(0, 256, (37, 53), dtype=np.uint8)
    palette = generator.integers(0, 256, (256, 3), dtype=np.uint8)
    assert np.array_equal(decoded(pictures.Picture(indices, palette)), palette[indices])


def test_a_confusion_matrix_is_darkest_where_most_samples_are() -> None:
    table = np.zeros((10, 10), int)
    np.fill_diagonal(table, 900)
    table[4, 9], table[7, 2] = 60, 6
    image = decoded(pictures.confusion_matrix(table.tolist()))
    height, width = image.shape[:2]
    cell_height, cell_width = 34, 52

    def shade(row: int, column: int) -> float:
        """Brightness of a cell's upper left corner, where no number is."""
        top, left = height - (10 - row) * cell_height, width - (10 - column) * cell_width
        return float(image[top + 2 : top + 6, left + 2 : left + 6].mean())

    cells = {(row, column): shade(row, column) for row in range(10) for column in range(10)}
    assert cells[4, 9] < cells[7, 2] < cells[0, 1]
    assert max(cells[digit, digit] for digit in range(10)) < cells[4, 9]
    assert len({cells[pair] for pair in cells if not table[pair]}) == 1


def test_a_confusion_matrix_without_samples_of_a_digit_can_be_drawn() -> None:
    assert decoded(pictures.confusion_matrix([[0] * 10] * 10)).mean() > 200


def test_mistaken_digits_stand_in_a_grid_as_ink_on_paper() -> None:
    digit = np.zeros((28, 28), np.uint8)
    digit[10:20, 5:9] = 255
    image = decoded(pictures.captioned_digits([(digit, "4>9 100%")] * 7))
    once = decoded(pictures.captioned_digits([(digit, "4>9 100%")]))
    assert image.shape[0] > 1.5 * once.shape[0], "seven digits take two rows of six"
    ink = (image.sum(2) == 0).sum()
    assert ink == 7 * (once.sum(2) == 0).sum()
    assert ink > 7 * 40 * 9, "each digit three times enlarged, and its caption"


def test_weights_are_red_below_zero_and_blue_above() -> None:
    tiles = torch.zeros(3, 4, 4)
    tiles[0], tiles[2] = -0.5, 0.5
    image = decoded(pictures.weights(tiles.numpy()))
    red, blue = image[3, 3], image[3, -4]
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert image[3, image.shape[1] // 2].min() > 230


def test_the_last_epoch_and_powers_of_two_get_pictures() -> None:
    assert [e for e in range(1, 26) if is_looked_at(e, 25)] == [1, 2, 4, 8, 16, 25]
    assert [e for e in range(1, 2) if is_looked_at(e, 1)] == [1]
