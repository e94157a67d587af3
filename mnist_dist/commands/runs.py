"""`mnist-dist runs`: a table of runs. Does not import torch, which takes seconds."""

import contextlib
import json
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnist_dist.errors import UserError, print_result, printable
from mnist_dist.files import read_json_object, read_regular
from mnist_dist.flags import argument, flag, parse_flags
from mnist_dist.lock import is_held

_LARGEST_FILE = 1 << 28  # bytes; a million epochs of metrics


@dataclass(frozen=True)
class RunsConfig:
    """List the runs in a directory with their status, data and metrics."""

    directory: str = argument(
        "runs", metavar="DIRECTORY", help="directory that contains runs, or a run directory"
    )
    json: bool = flag(False, help="print a JSON array with one object per run")


@dataclass(frozen=True)
class RunSummary:
    """A run's files in short; None for what they do not contain."""

    path: str
    status: str
    """running, completed, preempted or failed, from status.json; killed: status.json has running,
    but the process on this host is gone; unreadable: there is no readable status.json."""
    data: str | None
    """Short name of the training data."""
    world_size: int | None
    epoch: int | None
    """Finished epochs."""
    epochs: int | None
    """Requested epochs."""
    best_validation_loss: float | None
    test_accuracy: float | None
    """With the weights of the best epoch; None until the run is completed."""


def list_runs(directory: str | Path = "runs") -> list[RunSummary]:
    """Summarize the runs in `directory`, sorted by name, which by default is by age.

    Raises:
        UserError: the directory does not exist or cannot be read.
    """
    path = Path(directory)
    if _is_run(path):
        return [_summary(path)]
    try:
        return [_summary(child) for child in sorted(path.iterdir()) if _is_run(child)]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; use the directory that contains your runs"
        ) from error


def run(flags: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    config = parse_flags(RunsConfig, flags, "mnist-dist runs")
    runs = list_runs(config.directory)
    if config.json:
        print_result(json.dumps([asdict(summary) for summary in runs]))
    elif runs:
        _print_table(runs)
    else:
        print_result(f"no runs in {printable(config.directory)}")
    return 0


def _is_run(path: Path) -> bool:
    """Whether training created this directory, even if files are missing."""
    with contextlib.suppress(OSError):
        ours = ("status.json", "checkpoints", "metrics.jsonl")
        return path.is_dir() and any((path / name).exists() for name in ours)
    return False


def _summary(path: Path) -> RunSummary:
    status, config, environment = (
        read_json_object(path / name) for name in ("status.json", "config.json", "environment.json")
    )
    records = list(read_records(path / "metrics.jsonl"))
    losses, accuracies = (
        [value for record in records if (value := finite_number(record, tag)) is not None]
        for tag in ("val/loss", "test/accuracy")
    )
    written = short_text(status, "status") or "unreadable"
    # An extended run has test metrics for each time that it was completed.
    accuracy = accuracies[-1] if written == "completed" and accuracies else None
    return RunSummary(
        path=str(path),
        status="killed" if written == "running" and _is_gone(path, environment) else written,
        data=_data(config, environment),
        world_size=_count(environment, "world_size"),
        epoch=_count(status, "epoch"),
        epochs=_count(config, "epochs"),
        best_validation_loss=min(losses, default=None),
        test_accuracy=accuracy,
    )


def _is_gone(path: Path, environment: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this run is known to have died.

    It held a lock on the directory, which the kernel releases. Unknown on other hosts.
    """
    if environment.get("host") != socket.gethostname():
        return False
    return is_held(path / ".lock") is False


def _data(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str | None:
    """Return MNIST, bundled, or the name of the user's file."""
    given = short_text(config, "data")
    description = short_text(environment, "data")
    if description is None:
        name = given
    elif description.startswith(("MNIST,", "bundled ")):
        name = description.split(",")[0].split(" ")[0]
    else:
        name = Path(given).name if given else description
    samples = _count(config, "train_samples")
    return f"{name}, first {samples:,}" if name and samples else name


def read_records(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON objects in a file of lines; other lines are skipped."""
    with contextlib.suppress(OSError):
        for line in read_regular(file, _LARGEST_FILE).splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict):
                    yield content


def finite_number(values: Mapping[str, Any], name: str) -> float | None:
    """Return the number under `name`, None if there is no finite one."""
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            return float(value) if math.isfinite(value) else None
    return None


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = finite_number(values, name)
    return None if value is None else int(value)


def short_text(values: Mapping[str, Any], name: str) -> str | None:
    """Return text from a file, safe to print on a terminal."""
    value = values.get(name)
    return printable(value)[:60] if isinstance(value, str) and value else None


def _print_table(runs: Sequence[RunSummary]) -> None:
    rows = [["run", "status", "data", "processes", "epochs", "best val loss", "test accuracy"]]
    for it in runs:
        epochs = None if it.epoch is None else f"{it.epoch}/{it.epochs or '?'}"
        loss = None if it.best_validation_loss is None else f"{it.best_validation_loss:.4f}"
        accuracy = None if it.test_accuracy is None else f"{it.test_accuracy:.2%}"
        cells = (printable(it.path), it.status, it.data, it.world_size, epochs, loss, accuracy)
        rows.append(["-" if cell is None else str(cell) for cell in cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_result("  ".join(padded).rstrip())
