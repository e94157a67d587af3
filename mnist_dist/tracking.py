"""Where numbers go: the console, metrics.jsonl and TensorBoard. Silent on every rank but 0."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from mnist_dist.atomic import write_atomically

T = TypeVar("T")


class Console:
    """Lines for a person, from rank 0 only."""

    def __init__(self, speaks: bool) -> None:
        """Speak if `speaks`, which is true on rank 0."""
        self._speaks = speaks

    def say(self, line: str) -> None:
        """Print one line, clear of a progress bar."""
        self._write(line, sys.stdout)

    def warn(self, line: str) -> None:
        """Print one line of warning on stderr."""
        self._write(f"mnist-dist: warning: {line}", sys.stderr)

    def _write(self, line: str, stream: TextIO | None) -> None:
        """A reader that has gone, or a full disk behind `>`, is no reason to stop training."""
        if self._speaks and stream is not None:
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(line, file=stream)
                stream.flush()

    def progress(self, steps: Iterable[T], total: int, done: int, name: str) -> Iterator[T]:
        """`steps` itself, with a bar on a terminal; nothing in a pipe or a log file."""
        if not (self._speaks and sys.stderr is not None and sys.stderr.isatty()):
            return iter(steps)
        return iter(tqdm(steps, name, total, initial=done, leave=False, unit="step"))

    def epoch(self, name: str, record: Mapping[str, float], seconds: float) -> None:
        """Say an epoch's figures, by their tags, and how long its training took."""
        self.say(
            f"{name}  train loss {record['train/loss']:.4f}  val loss {record['val/loss']:.4f}  "
            f"val accuracy {record['val/accuracy']:7.2%}  {seconds:6.2f} s  "
            f"{record['perf/samples_per_second']:9,.0f} samples/s"
        )


class Tracker:
    """The record of one run: metrics.jsonl and TensorBoard events under the same tags.

    Every rank may have one; only rank 0 opens it, and what is not open records nothing.
    """

    def __init__(self, directory: Path) -> None:
        """Name the run's directory; nothing is touched before `open`."""
        self._path = directory / "metrics.jsonl"
        self._events: Any = None
        self._recorded: set[tuple[int, frozenset[str]]] = set()

    def open(self, step: int, texts: Mapping[str, Mapping[str, Any]]) -> None:
        """Open the record after optimizer step `step`, with tables of names and values by title.

        What an earlier start recorded of later steps is cut off: those steps will be done again.
        """
        # Imported here: only rank 0 needs it, and it takes about a second.
        from torch.utils.tensorboard import SummaryWriter

        self._recorded = {_key(record["step"], record) for record in _keep_until(self._path, step)}
        self._events = SummaryWriter(str(self._path.parent), purge_step=step + 1)
        for title, values in texts.items():
            rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
            self._events.add_text(title, f"| name | value |\n|---|---|\n{rows}", step)

    def record(
        self,
        epoch: int,
        step: int,
        figures: Mapping[str, float],
        details: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Append one line to metrics.jsonl and the same figures to TensorBoard.

        Args:
            epoch: epochs finished.
            step: optimizer steps since the start of the run.
            figures: numbers by tag.
            details: lists by tag, for metrics.jsonl only.
        """
        # The test figures, recorded after the last checkpoint, come again if we died after them.
        if self._events is None or _key(step, figures) in self._recorded:
            return
        now = time.time()
        for tag, value in figures.items():
            self._events.add_scalar(tag, value, step, now)
        self._events.flush()
        line = {"epoch": epoch, "step": step, "time": now, **figures, **(details or {})}
        with self._path.open("a") as file:
            file.write(json.dumps(_without_nan(line)) + "\n")

    def close(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Put the run into TensorBoard's hparams table, and close.

        SummaryWriter.add_hparams would make a second directory, that is a second run, for it.
        """
        if self._events is None:
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings.items()}
        for summary in hparams(shown, dict(results)):
            self._events.file_writer.add_summary(summary)
        self._events.close()


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
