"""Where numbers go: metrics.jsonl and TensorBoard. Nothing on any rank but 0."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_dist.atomic import write_atomically

# What TensorBoard's table of runs shows beside the settings.
_COMPARED = ["test/accuracy", "test/loss", "val/accuracy", "val/loss", "train/loss"]
_COMPARED += ["perf/samples_per_second"]
# Curves that belong side by side, on the page for custom scalars.
_CHARTS = {
    "loss": ["train/loss", "val/loss", "test/loss"],
    "accuracy": ["val/accuracy", "test/accuracy"],
    "speed: samples per second": ["perf/samples_per_second"],
}
_BINS = 40


@dataclass(frozen=True)
class Look:
    """What to draw of a model on one split."""

    split: str
    """The group of the pictures' tags, such as "val"."""
    confusion: Sequence[Sequence[int]]
    """Samples by digit (row) and by what they were taken for (column)."""
    mistakes: Sequence[tuple[Tensor, str]] = ()
    """Digits that were taken for others, (784,) uint8, each with a caption."""
    model: nn.Module | None = None
    """Whose weights to draw, if any."""


def is_looked_at(epoch: int, epochs: int) -> bool:
    """Whether epoch `epoch` (1 is the first) of so many gets pictures: 1, 2, 4, 8 ... and the last.

    A set of them costs as much as a few steps: all of a run's stay far below a percent of it.
    """
    return epoch == epochs or epoch & (epoch - 1) == 0


class Tracker:
    """The record of one run: metrics.jsonl and TensorBoard events under the same tags.

    Every rank may have one; only rank 0 opens it, and what is not open records nothing.
    """

    def __init__(self, directory: Path) -> None:
        """Name the run's directory; nothing is touched before `open`."""
        self._path = directory / "metrics.jsonl"
        self._events: Any = None
        self._recorded: set[tuple[int, frozenset[str]]] = set()
        self.records: list[dict[str, Any]] = []
        """What metrics.jsonl holds, in order."""

    def open(
        self, step: int, texts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> None:
        """Open the record after optimizer step `step`.

        What an earlier start recorded of later steps is cut off: those steps will be done again.

        Args:
            step: optimizer steps since the start of the run.
            texts: tables of names and values by title, for TensorBoard's texts.
            settings: by which TensorBoard's table of runs is to tell this one from others.
        """
        # Imported here: only rank 0 needs it.
        from mnist_dist.run import event_file

        self.records = _keep_until(self._path, step)
        self._recorded = {_key(record["step"], record) for record in self.records}
        self._events = event_file.EventFile(self._path.parent, purge_step=step + 1)
        tables = [event_file.table(title, cells) for title, cells in texts.items()]
        about = event_file.hparams(settings, _COMPARED)
        self._events.add(step, [*tables, *about, event_file.layout(_CHARTS)])

    def record(
        self,
        epoch: int,
        step: int,
        figures: Mapping[str, float],
        details: Mapping[str, Sequence[float]] | None = None,
        look: Look | None = None,
    ) -> None:
        """Append one line to metrics.jsonl and the same figures to TensorBoard.

        Args:
            epoch: epochs finished.
            step: optimizer steps since the start of the run.
            figures: numbers by tag.
            details: lists by tag, for metrics.jsonl only.
            look: what to draw, for TensorBoard only.
        """
        # The test figures, recorded after the last checkpoint, come again if we died after them.
        if self._events is None or _key(step, figures) in self._recorded:
            return
        from mnist_dist.run import event_file

        now = time.time()
        line = {"epoch": epoch, "step": step, "time": now, **figures, **(details or {})}
        self.records.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(_without_nan(line)) + "\n")
        values = [event_file.scalar(tag, number) for tag, number in figures.items()]
        self._events.add(step, values + (_drawn(look) if look else []), now)

    def close(self, step: int, texts: Mapping[str, Mapping[str, Any]]) -> None:
        """Say that the run is complete, with more tables for TensorBoard, and close."""
        if self._events is None:
            return
        from mnist_dist.run import event_file

        tables = [event_file.table(title, cells) for title, cells in texts.items()]
        self._events.add(step, [*tables, event_file.hparams_end()])
        self._events.close()


def _drawn(look: Look) -> list[Any]:
    """Pictures and histograms as TensorBoard's values."""
    from mnist_dist.run import event_file
    from mnist_dist.run import plots as pictures

    drawn = {f"{look.split}/confusion": pictures.confusion_matrix(look.confusion)}
    if look.mistakes:
        digits = [(image.view(28, 28).numpy(), caption) for image, caption in look.mistakes]
        drawn[f"{look.split}/surest_mistakes"] = pictures.captioned_digits(digits)
    values = []
    if look.model is not None:
        weights = {name: p.detach().cpu() for name, p in look.model.named_parameters()}
        first = next(iter(weights.values()))
        if (tiles := _as_tiles(first)) is not None:
            drawn["weights/first_layer"] = pictures.weights(tiles.numpy())
        for name, weight in weights.items():
            low, high = float(weight.min()), float(weight.max())
            counts = torch.histc(weight.float(), _BINS, low, high).double().numpy()
            values.append(event_file.histogram(f"weights/{name}", counts, low, high))
    for tag, picture in drawn.items():
        values.append(event_file.image(tag, picture.png(), *picture.pixels.shape))
    return values


def _as_tiles(weight: Tensor) -> Tensor | None:
    """A first layer's weights as (n, height, width); None if they are no pictures."""
    if weight.ndim == 2 and weight.shape[1] == 28 * 28:
        return weight.view(-1, 28, 28)
    return weight[:, 0] if weight.ndim == 4 and weight.shape[1] == 1 else None


def _key(step: int, figures: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """What makes a record one of a kind: its step, and the groups (train, val, test) it is of."""
    return step, frozenset(tag.partition("/")[0] for tag in figures if "/" in tag)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop records of steps after `step`, and a last line that a dying writer left unfinished.

    Returns:
        The records that were kept.
    """
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
            if line.endswith("\n") and record["step"] <= step:
                kept.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    if path.exists():
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null stands for a number that does not exist."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
