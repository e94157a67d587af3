"""`mnist-dist predict`: which digit is in the picture?"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from tyro.conf import FlagCreatePairsOff, Positional, arg

from mnist_dist.commands.preprocessing import find_pictures, prepare
from mnist_dist.commands.trained_model import load_model
from mnist_dist.data.errors import one_line
from mnist_dist.errors import UserError
from mnist_dist.flags import parse_flags
from mnist_dist.model import pixels


@dataclass(frozen=True)
class PredictConfig:
    """Say which digit is in each picture, with the probability of every digit.

    Dark ink on light paper or light on dark, anywhere in the picture, at any size, one digit each.
    """

    model: Annotated[str, Positional, arg(metavar="RUN_OR_CHECKPOINT")]
    """A run's directory (its best.pt is meant), or a checkpoint."""

    images: Annotated[tuple[str, ...], Positional, arg(metavar="IMAGE...")]
    """PNG or JPEG files, or directories of them."""

    json: FlagCreatePairsOff[bool] = False
    """Print a JSON array with an object for each picture."""


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one picture."""

    file: str
    digit: int
    """The most probable one."""
    probabilities: tuple[float, ...]
    """Of the digits 0 to 9; they add up to 1."""


def predict(model: nn.Module | str | Path, images: Iterable[str | Path]) -> list[Prediction]:
    """Say which digit is in each picture.

    Args:
        model: from `load_model`, or a run's directory or checkpoint.
        images: PNG or JPEG files, or directories of them, which stand for the files in them.

    Raises:
        UserError: a file cannot be used; the text names it.
    """
    network = model if isinstance(model, nn.Module) else load_model(model)
    files = [file for image in images for file in find_pictures(image)]
    return [_predict(network, file) for file in files]


@torch.inference_mode()
def _predict(model: nn.Module, file: Path) -> Prediction:
    """One at a time: what is said of a picture must not depend on the others, not in a last bit."""
    probabilities = model(pixels(prepare(file))[None]).softmax(1)[0]
    return Prediction(str(file), int(probabilities.argmax()), tuple(probabilities.tolist()))


def run(flags: Sequence[str]) -> int:
    """The command. A picture that cannot be used is a line on stderr; the others are predicted."""
    config = parse_flags(PredictConfig, flags, "mnist-dist predict")
    if not config.images:
        raise UserError(
            "IMAGE... is missing; name a PNG, a JPEG or a directory of them after the model"
        )
    model = load_model(config.model)
    predictions, code = [], 0
    for image in config.images:
        try:
            files = find_pictures(image)
        except UserError as error:
            code = _say(error)
            continue
        for file in files:
            try:
                predictions.append(_predict(model, file))
            except UserError as error:
                code = _say(error)
    if config.json:
        print(json.dumps([asdict(prediction) for prediction in predictions]))
    else:
        _print_table(predictions)
    return code


def _say(error: UserError) -> int:
    print(f"mnist-dist: error: {error}", file=sys.stderr)
    return error.exit_code


def _print_table(predictions: Sequence[Prediction]) -> None:
    names = [one_line(prediction.file) for prediction in predictions]
    width = max(map(len, names), default=0)
    for name, prediction in zip(names, predictions, strict=True):
        shares = enumerate(prediction.probabilities)
        each = "  ".join(f"{digit}: {share:.1%}" for digit, share in shares)
        print(f"{name:{width}}  {prediction.digit}   {each}")
