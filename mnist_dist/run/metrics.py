"""A run's metrics: metrics.jsonl and TensorBoard, under the same tags."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnist_dist.atomic import write_atomically
from mnist_dist.dimensions import IMAGE_PIXELS, IMAGE_SIDE

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
    """Model whose weights to draw, if any."""


def should_log_plots(epoch: int, epochs: int) -> bool:
    """Return whether epoch `epoch` (from 1) gets plots: epochs 1, 2, 4, 8 ... and the last do.

    `python -m benchmarks.records` measures what they cost.
    """
    return epoch == epochs or epoch & (epoch - 1) == 0


class MetricsWriter:
    """Write metrics to metrics.jsonl and TensorBoard.

    All ranks may have one. It does nothing before `open`, which only rank 0 calls. A disk that
    fails later is a warning, and training goes on.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        """Name the run's directory and what prints a warning; touch nothing."""
        self._path = directory / "metrics.jsonl"
        self._warn = warn
        self._is_open = False
        self._needs_rewrite = False
        self._writer: RunSummaryWriter | None = None
        self._earlier: set[tuple[str, int]] = set()
        self._pending: dict[str, float] = {}
        self.records: list[dict[str, Any]] = []
        """The objects of metrics.jsonl, in order."""

    def open(
        self, step: int, texts: Mapping[str, Mapping[str, Any]], hparams: Mapping[str, Any]
    ) -> None:
        """Open both files after optimizer step `step`, dropping what they hold of later steps.

        Args:
            step: optimizer steps since the start of the run.
            texts: tables of names and values by title, for TensorBoard's Text page.
            hparams: values by which TensorBoard's HParams page compares runs.

        Raises:
            OSError: the directory cannot be written.
        """
        # Takes 0.2 s, which only rank 0 has to spend.
        from mnist_dist.run.tensorboard import RunSummaryWriter

        self.records = _read_until(self._path, step)
        if self._path.exists():
            _rewrite(self._path, self.records)
        self._earlier = {(_group(tag), r["step"]) for r in self.records for tag in r}
        self._writer = RunSummaryWriter(str(self._path.parent), purge_step=step + 1)
        for title, cells in texts.items():
            self._writer.add_table(title, cells, step)
        self._writer.start_session(hparams, _HPARAMS_METRICS, step)
        self._writer.add_custom_scalars({"train and validation": _CHARTS})
        self._writer.flush()
        self._is_open = True

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to TensorBoard, and to the line that the next `commit` writes.

        What an earlier start of the run wrote is skipped: after a kill between the last checkpoint
        and the end of the run, the test's metrics come again.
        """
        if not self._is_open or (_group(tag), step) in self._earlier:
            return
        self._pending[tag] = value
        self._to_tensorboard(lambda writer: writer.add_scalar(tag, value, step))

    def add_plots(self, plots: EpochPlots, step: int) -> None:
        """Draw `plots` for TensorBoard, with histograms of the weights of their model."""
        if self._is_open and (plots.split, step) not in self._earlier:
            self._to_tensorboard(lambda writer: _add_plots(writer, plots, step))

    def commit(
        self, epoch: int, step: int, details: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Write the scalars since the last commit as one line of metrics.jsonl; flush TensorBoard.

        Both files have then reached the operating system: a kill of the process loses nothing.

        Args:
            epoch: epochs finished.
            step: optimizer steps since the start of the run.
            details: lists by tag, for metrics.jsonl only.
        """
        if not self._pending:
            return
        # TensorBoard first: an epoch of metrics.jsonl must not be missing there after a kill.
        self._to_tensorboard(lambda writer: writer.flush())
        line = {"epoch": epoch, "step": step, "time": time.time()}
        self.records.append({**line, **self._pending, **(details or {})})
        self._pending = {}
        try:
            if self._needs_rewrite:
                _rewrite(self._path, self.records)
            else:
                with self._path.open("a") as file:
                    file.write(_json_line(self.records[-1]))
            self._needs_rewrite = False
        except OSError as error:
            if not self._needs_rewrite:
                self._warn(
                    f"{self._path} cannot be written ({error.strerror or error}); training goes on"
                )
            self._needs_rewrite = True

    def close(self, step: int, texts: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark the run as complete in TensorBoard, add tables to its texts, and close its file."""

        def finish(writer: "RunSummaryWriter") -> None:
            for title, cells in texts.items():
                writer.add_table(title, cells, step)
            writer.end_session(step)
            writer.close()

        self._to_tensorboard(finish)
        self._writer, self._is_open = None, False

    def _to_tensorboard(self, write: Callable[["RunSummaryWriter"], None]) -> None:
        """Call `write`, and never again after a failure: readers stop at a half-written record."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._writer.file_writer.close()
            self._writer = None
            self._warn(
                f"TensorBoard's events in {self._path.parent} cannot be written "
                f"({error.strerror or error}); training goes on without them"
            )


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


def _group(tag: str) -> str:
    return tag.partition("/")[0]


def _read_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the records up to `step`, without a last line that a kill left unfinished."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
            if line.endswith("\n") and record["step"] <= step:
                kept.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(map(_json_line, records)).encode())


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record)) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
