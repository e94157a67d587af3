"""`mnist-dist predict`: the digits in image files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from mnist_dist.commands.loading import load_model
from mnist_dist.commands.preprocessing import find_images, read_digit
from mnist_dist.errors import UserError, print_line, print_result, printable
from mnist_dist.flags import argument, flag, parse_flags
from mnist_dist.model import pixels


@dataclass(frozen=True)
class PredictConfig:
    """Classify images of digits, with the probability of every digit.

    Images contain one digit each, at any size and position, dark on light or
    light on dark.
    """

    model: str = argument(
        metavar="RUN_OR_CHECKPOINT", help="run directory (its best.pt is used) or checkpoint"
    )
    images: tuple[str, ...] = argument(
        metavar="IMAGE", help="PNG or JPEG files, or directories of them"
    )
    json: bool = flag(False, help="print a JSON array with one object per image")


@dataclass(frozen=True)
class Prediction:
    """The classification of one image."""

    file: str
    digit: int
    """The most probable digit."""
    probabilities: tuple[float, ...]
    """Of the digits 0 to 9, with a sum of 1."""
    notes: tuple[str, ...] = ()
    """Why the digit may be misread: several digits in the image, or one that is cut off."""


def predict(
    model: nn.Module | str | Path, images: str | Path | Iterable[str | Path]
) -> list[Prediction]:
    """Classify images of digits.

    Args:
        model: from `load_model`, on any device, or a run directory or checkpoint.
        images: PNG or JPEG files, or directories of them; one or several.

    Raises:
        UserError: a file cannot be used.
    """
    network = model if isinstance(model, nn.Module) else load_model(model)
    images = [images] if isinstance(images, str | Path) else images
    files = [file for image in images for file in find_images(image)]
    return [_predict(network, file) for file in files]


@torch.inference_mode()
def _predict(model: nn.Module, file: Path) -> Prediction:
    """One at a time: in a batch, the last bits would depend on the other images."""
    image, notes = read_digit(file)
    device = next(model.parameters()).device
    probabilities = model(pixels(image.to(device))[None]).softmax(1)[0]
    return Prediction(str(file), int(probabilities.argmax()), tuple(probabilities.tolist()), notes)


def run(flags: Sequence[str]) -> int:
    """Run the command. Images that cannot be used are listed on stderr, the rest are classified."""
    config = parse_flags(PredictConfig, flags, "mnist-dist predict")
    model = load_model(config.model)
    predictions, code = [], 0
    for image in config.images:
        try:
            files = find_images(image)
        except UserError as error:
            code = _print_error(error)
            continue
        for file in files:
            try:
                predictions.append(_predict(model, file))
            except UserError as error:
                code = _print_error(error)
    if config.json:
        print_result(json.dumps([asdict(prediction) for prediction in predictions]))
    else:
        _print_table(predictions)
    return code


def _print_error(error: UserError) -> int:
    print_line(f"error: {error}")
    return error.exit_code


def _print_table(predictions: Sequence[Prediction]) -> None:
    names = [printable(prediction.file) for prediction in predictions]
    width = max(map(len, names), default=0)
    for name, prediction in zip(names, predictions, strict=True):
        probabilities = enumerate(prediction.probabilities)
        columns = "  ".join(f"{digit}: {value:.1%}" for digit, value in probabilities)
        notes = "".join(f"  ({note})" for note in prediction.notes)
        print_result(f"{name:{width}}  {prediction.digit}   {columns}{notes}")
