"""A run's metrics: metrics.jsonl and TensorBoard, under the same tags."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnist_dist.dimensions import IMAGE_PIXELS, IMAGE_SIDE
from mnist_dist.errors import counted
from mnist_dist.files import read_regular, sync_directory, write_atomically
from mnist_dist.run.logfile import LogFile

if TYPE_CHECKING:
    from mnist_dist.run.tensorboard import RunSummaryWriter

# Columns of TensorBoard's HParams table, next to the hyperparameters.
_HPARAMS_METRICS = ["test/accuracy", "test/loss", "val/accuracy", "val/loss", "train/loss"]
_HPARAMS_METRICS += ["perf/samples_per_second"]
# Charts of TensorBoard's Custom Scalars page.
_CHARTS = {
    "loss": ["Multiline", ["train/loss", "val/loss", "test/loss"]],
    "accuracy": ["Multiline", ["val/accuracy", "test/accuracy"]],
    "speed: samples per second": ["Multiline", ["perf/samples_per_second"]],
}
_BINS = 40
_LARGEST_FILE = 1 << 28  # bytes of metrics.jsonl; a million epochs


@dataclass(frozen=True)
class EpochPlots:
    """What to draw of a model on one split."""

    split: str
    """Group of the images' tags, such as "val"."""
    confusion: Sequence[Sequence[int]]
    """Samples by label (row) and prediction (column)."""
    errors: Sequence[tuple[Tensor, str]] = ()
    """Misclassified digits, (784,) uint8 on the CPU, and their captions of up to two lines."""
    model: nn.Module | None = None
    """Model with the weights to draw, if any."""


def should_log_plots(epoch: int, epochs: int) -> bool:
    """Return whether epoch `epoch` (from 1) gets plots: epochs 1, 2, 4, 8 ... and the last do.

    `python -m benchmarks.records` measures what they cost.
    """
    return epoch == epochs or epoch & (epoch - 1) == 0


class MetricsWriter:
    """Write metrics to metrics.jsonl and TensorBoard.

    All ranks may have one. It does nothing before `open`, which only rank 0 calls. A disk that
    fails later is a warning: what it did not take is written as soon as it does.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        """Name the run's directory and what prints a warning; touch nothing."""
        self._path = directory / "metrics.jsonl"
        self._warn = warn
        self._lines: LogFile | None = None
        self._writer: RunSummaryWriter | None = None
        self._failing: set[str] = set()
        self._step = 0
        self._shown: set[str] = set()
        """Tags that TensorBoard has at `_step`, the step that this start continues from."""
        self._recorded: set[str] = set()
        """The same of metrics.jsonl."""
        self._pending: dict[str, float] = {}
        self.records: list[dict[str, Any]] = []
        """The objects of metrics.jsonl, in order."""

    def open(
        self,
        epoch: int,
        step: int,
        texts: Mapping[str, Mapping[str, Any]],
        hparams: Mapping[str, Any],
    ) -> None:
        """Open both files after optimizer step `step`, dropping what they hold of later epochs.

        Args:
            epoch: epochs finished.
            step: optimizer steps since the start of the run.
            texts: tables of names and values by title, for TensorBoard's Text page.
            hparams: for TensorBoard's HParams page, which compares runs.

        Raises:
            OSError: the directory cannot be written.
        """
        # Takes 0.2 s, which only rank 0 has to spend.
        from mnist_dist.run.tensorboard import RunSummaryWriter, tags_at

        content = read_regular(self._path, _LARGEST_FILE) if self._path.exists() else b""
        self.records, unsound = _read_until(content, epoch, step)
        if unsound:
            self._warn(
                f"{self._path} was damaged or edited: dropped {counted(unsound, 'invalid line')}"
            )
        # Also an empty one: replacing it makes its name survive power loss.
        write_atomically(self._path, "".join(map(_json_line, self.records)).encode())
        self._lines = LogFile(self._path)
        last = max((record["step"] for record in self.records), default=0)
        self._step = step
        # A kill may have come between a record of TensorBoard and that of metrics.jsonl.
        self._recorded = {tag for r in self.records if r["step"] == step for tag in r}
        self._shown = tags_at(self._path.parent, step) if last == step else set()
        self._writer = RunSummaryWriter(str(self._path.parent), purge_step=last + 1)
        for title, cells in texts.items():
            self._writer.add_table(title, cells, step)
        self._writer.start_session(hparams, _HPARAMS_METRICS, step)
        self._writer.add_custom_scalars({"train and validation": _CHARTS})
        self._writer.flush()
        sync_directory(self._path.parent)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to TensorBoard, and to the line that the next `commit` writes.

        What an earlier start of the run wrote is skipped: after a kill between the last checkpoint
        and the end of the run, the test's metrics come again.
        """
        if self._writer is None:
            return
        if step != self._step or tag not in self._shown:
            self._writer.add_scalar(tag, value, step)
        if step != self._step or tag not in self._recorded:
            self._pending[tag] = value

    def add_plots(self, plots: EpochPlots, step: int) -> None:
        """Draw `plots` for TensorBoard, with histograms of the weights of their model."""
        is_shown = step == self._step and f"{plots.split}/confusion" in self._shown
        if self._writer is not None and not is_shown:
            _add_plots(self._writer, plots, step)

    def commit(
        self, epoch: int, step: int, details: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Write the scalars since the last commit as one line of metrics.jsonl; flush TensorBoard.

        Both files have then reached the operating system: a kill of the process loses nothing.
        `details`, lists by tag, are for metrics.jsonl only.
        """
        if self._writer is None or self._lines is None:
            return
        line = b""
        if self._pending:
            facts = {"epoch": epoch, "step": step, "time": time.time()}
            self.records.append({**facts, **self._pending, **(details or {})})
            line = _json_line(self.records[-1]).encode()
        self._pending = {}
        failing_before, self._failing = self._failing, set()
        for write in (self._writer.flush, partial(self._lines.write, line)):
            try:
                write()
            except OSError as error:
                self._failing.add(error.filename)
                if error.filename not in failing_before:
                    self._warn(
                        f"{error.filename} cannot be written yet ({error.strerror}); "
                        "training continues"
                    )

    def sync(self) -> None:
        """Return once what was committed survives power loss.

        Raises:
            OSError: the disk is full or failed; nothing is lost while this process lives.
        """
        if self._writer is not None and self._lines is not None:
            self._writer.file_writer.file.sync()
            self._lines.sync()

    def close(self, step: int, texts: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark the run as complete in TensorBoard, add tables to its texts, and close its file.

        Raises:
            OSError: something that was committed could not be written.
        """
        if self._writer is None or self._lines is None:
            return
        for title, cells in texts.items():
            self._writer.add_table(title, cells, step)
        self._writer.end_session(step)
        self._writer.flush()
        self.sync()
        self._writer.close()
        self._lines.close()
        self._writer = self._lines = None


def _add_plots(writer: "RunSummaryWriter", plots: EpochPlots, step: int) -> None:
    from mnist_dist.run.plots import captioned_digits, confusion_matrix, weight_tiles

    writer.add_drawing(f"{plots.split}/confusion", confusion_matrix(plots.confusion), step)
    if plots.errors:
        digits = [
            (image.view(IMAGE_SIDE, IMAGE_SIDE).numpy(), caption) for image, caption in plots.errors
        ]
        writer.add_drawing(f"{plots.split}/most_confident_errors", captioned_digits(digits), step)
    if plots.model is None:
        return
    weights = {name: p.detach().float().cpu() for name, p in plots.model.named_parameters()}
    if (tiles := _as_tiles(next(iter(weights.values())))) is not None:
        writer.add_drawing("weights/first_layer", weight_tiles(tiles.numpy()), step)
    for name, weight in weights.items():
        _add_histogram(writer, f"weights/{name}", weight, step)


def _as_tiles(weight: Tensor) -> Tensor | None:
    """Return a first layer's weights as (n, height, width); None if they are no images."""
    if weight.ndim == 2 and weight.shape[1] == IMAGE_PIXELS:
        return weight.view(-1, IMAGE_SIDE, IMAGE_SIDE)
    return weight[:, 0] if weight.ndim == 4 and weight.shape[1] == 1 else None


def _add_histogram(writer: "RunSummaryWriter", tag: str, values: Tensor, step: int) -> None:
    """Add a histogram of equal bins, in a tenth of the time of SummaryWriter.add_histogram."""
    low, high = float(values.min()), float(values.max())
    writer.add_histogram_raw(
        tag,
        low,
        high,
        values.numel(),
        float(values.sum()),
        float(values.square().sum()),
        torch.linspace(low, high, _BINS + 1, dtype=torch.float64)[1:].tolist(),
        torch.histc(values, _BINS, low, high).tolist(),
        step,
    )


def _read_until(content: bytes, epoch: int, step: int) -> tuple[list[dict[str, Any]], int]:
    """Return the sound records up to an epoch and step, and the number of lines that hold none.

    A last line that a kill left unfinished does not count, nor does a copy of an earlier record.
    """
    *lines, _ = content.split(b"\n")
    found = [_parse(line) for line in lines if line.strip()]
    kept: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for record in filter(None, found):
        if record["epoch"] <= epoch and record["step"] <= step:
            kept.setdefault((record["epoch"], record["step"], "val/loss" in record), record)
    return list(kept.values()), found.count(None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(map(_is_plain, record.values())):
        return None
    counts = [record.get("epoch"), record.get("step")]
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    # None stands for a number that is not finite.
    metrics = {tag: math.nan if v is None else v for tag, v in record.items() if "/" in tag}
    used = [metrics.get(tag, 0.0) for tag in ("val/loss", "val/accuracy")]
    return record | metrics if all(isinstance(value, int | float) for value in used) else None


def _is_plain(value: Any) -> bool:
    """Return whether `value` is no container, or a list of such values."""
    items = value if isinstance(value, list) else [value]
    return not any(isinstance(item, list | dict) for item in items)


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record)) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
