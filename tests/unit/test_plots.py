"""What TensorBoard's images show."""

import numpy as np
import pytest
from PIL import Image

from mnist_dist.run.plots import captioned_digits, confusion_matrix, weight_tiles


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_a_confusion_matrix_is_darkest_where_most_samples_are() -> None:
    table = np.zeros((10, 10), int)
    np.fill_diagonal(table, 900)
    table[4, 9], table[7, 2] = 60, 6
    image = rgb(confusion_matrix(table.tolist()))
    height, width = image.shape[:2]
    cell = 44

    def brightness(row: int, column: int) -> float:
        """Of a cell's upper left corner, where no number is."""
        top, left = height - (10 - row) * cell, width - (10 - column) * cell
        return float(image[top + 2 : top + 6, left + 2 : left + 6].mean())

    cells = {(row, column): brightness(row, column) for row in range(10) for column in range(10)}
    assert cells[4, 9] < cells[7, 2] < cells[0, 1]
    assert max(cells[digit, digit] for digit in range(10)) < cells[4, 9]
    assert len({cells[pair] for pair in cells if not table[pair]}) == 1


@pytest.mark.parametrize("count", [1, 38, 1049])
def test_a_count_is_written_in_large_digits_inside_its_cell(count: int) -> None:
    table = np.zeros((10, 10), int)
    table[0, 0], table[0, 9] = 10**8, 1  # so that no shade changes with the count
    empty = rgb(confusion_matrix(table.tolist()))
    table[0, 3] = count
    changed = np.abs(empty - rgb(confusion_matrix(table.tolist()))).sum(2)
    top, left = empty.shape[0] - 10 * 44, empty.shape[1] - 7 * 44
    rows = (changed > 300).any(1).nonzero()[0]
    assert 12 <= rows.max() - rows.min() < 20
    assert changed[top : top + 44, left : left + 44].sum() == changed.sum()


def test_a_confusion_matrix_without_samples_can_be_drawn() -> None:
    assert rgb(confusion_matrix([[0] * 10] * 10)).mean() > 200


def test_errors_stand_in_a_grid_as_ink_on_paper_above_their_captions() -> None:
    digit = np.zeros((28, 28), np.uint8)
    digit[10:20, 5:9] = 255
    many = rgb(captioned_digits([(digit, "4 predicted as 9\n100%")] * 5))
    once = rgb(captioned_digits([(digit, "4 predicted as 9\n100%")]))
    bare = rgb(captioned_digits([(digit, "")]))
    assert many.shape[0] == 2 * once.shape[0], "five digits take two rows of four"
    ink = (once.sum(2) < 300).sum()
    assert (many.sum(2) < 300).sum() == 5 * ink
    assert (bare.sum(2) < 300).sum() >= 9 * 40 - 60, "three times enlarged"
    assert ink > (bare.sum(2) < 300).sum() + 300, "and its caption"


def test_weights_are_red_below_zero_and_blue_above() -> None:
    tiles = np.zeros((3, 4, 4))
    tiles[0], tiles[2] = -0.5, 0.5
    image = rgb(weight_tiles(tiles))
    red, blue = image[3, 3], image[3, -4]
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert image[3, image.shape[1] // 2].min() > 230


def test_weights_that_are_all_zero_can_be_drawn() -> None:
    assert rgb(weight_tiles(np.zeros((20, 28, 28)))).min() > 230
