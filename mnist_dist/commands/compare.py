"""`mnist-dist compare`: how far the losses of runs differ. Does not import torch."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mnist_dist.commands.runs import (
    RunSummary,
    finite_number,
    list_runs,
    read_records,
)
from mnist_dist.errors import UserError, counted, print_result, printable
from mnist_dist.files import read_json_object
from mnist_dist.flags import argument, flag, parse_flags

LOSSES = {"train/loss": "train", "val/loss": "validation"}

# TrainConfig.hyperparameters, and the data: other values give another curve.
HYPERPARAMETERS = (
    *("data", "train_samples", "random_shift", "global_batch_size", "lr", "momentum"),
    *("weight_decay", "schedule", "seed", "precision", "grad_compression"),
)
# Other values may change the rounding, or what the code does.
_IMPLEMENTATION = (
    *("step", "compile", "cuda_graphs", "shared_memory", "device", "gpu", "platform"),
    *("mnist_dist", "torch", "cuda", "numpy", "python", "git_commit", "code"),
)
# Other values change the rounding at most.
_WORLD = ("world_size", "hosts", "launcher", "backend", "threads")
_MOST_EPOCHS = 10**6  # that --epochs takes
# Where data is cached does not matter, and `data` is compared by its content.
_LEFT_OUT = ("cache_dir", "data")


@dataclass(frozen=True)
class CompareConfig:
    """Compare the losses of runs, epoch by epoch, and list what differs between the runs.

    Exit code 0: every pair of runs agrees within --rtol. Exit code 1: a pair
    does not. Exit code 2: invalid input.
    """

    runs: tuple[str, ...] = argument(metavar="RUN", help="run directories, two or more")
    rtol: float = flag(1e-5, help="largest accepted relative difference between two losses")
    json: bool = flag(False, help="print one JSON object")


@dataclass(frozen=True)
class _Run:
    """What a run's files hold; None or nothing for what cannot be read."""

    summary: RunSummary
    losses: dict[int, dict[str, float | None]]
    """By epoch and tag; None for a loss that is not finite."""
    unreadable_lines: int
    """Lines of metrics.jsonl that are no JSON objects."""
    config: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return printable(self.summary.path)

    @property
    def notes(self) -> list[str]:
        """What limits the comparison."""
        last, epochs, notes = max(self.losses), self.summary.epochs, []
        if self.summary.status != "completed":
            of = f" of {epochs}" if epochs else ""
            notes.append(f"{self.summary.status}, {last}{of} epochs")
        if self.unreadable_lines:
            notes.append(f"unreadable lines in metrics.jsonl: {self.unreadable_lines}")
        if missing := sorted(set(range(1, last + 1)) - set(self.losses)):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            notes.append(f"no losses of epoch {missing[0]}{more}")
        for file, content in {"config": self.config, "environment": self.environment}.items():
            if not content:
                notes.append(f"no readable {file}.json")
        return notes


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one loss between two runs."""

    value: float
    """|a - b| / max(|a|, |b|); infinite (in JSON null) if only one is a finite number."""
    epoch: int


@dataclass(frozen=True)
class Comparison:
    """Two runs, compared over the epochs that both have."""

    names: tuple[str, str]
    epochs: list[int]
    largest: dict[str, Difference]
    """By tag."""
    first_beyond: int | None
    """The first epoch with a difference beyond the tolerance."""
    differing: dict[str, tuple[Any, Any]]
    """Settings and facts that differ, by name; None where a run does not have it."""
    causes: list[str]
    """Names of those that explain other losses."""
    possible_causes: list[str]
    """Names of those that may, if nothing explains them."""


def run(flags: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    config = parse_flags(CompareConfig, flags, "mnist-dist compare")
    if not 0 <= config.rtol < math.inf:
        raise UserError(f"--rtol {config.rtol:g}: must be 0 or more, such as 1e-5")
    if len(config.runs) < 2:
        raise UserError("RUN: two or more run directories are required; --help lists every flag")
    paths = [os.path.realpath(name) for name in config.runs]  # unlike resolve, also of a link loop
    for name, path in zip(config.runs, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{printable(name)}: given twice; list each run once")
    runs = [_load(Path(name)) for name in config.runs]
    pairs = [_compare(a, b, config.rtol) for a, b in combinations(runs, 2)]
    if config.json:
        print_result(json.dumps(_as_json(runs, pairs, config.rtol)))
    else:
        _print(runs, pairs, config.rtol)
    return 1 if any(pair.first_beyond is not None for pair in pairs) else 0


def _load(path: Path) -> _Run:
    """Read a run's files. Raises UserError if there are no losses to compare."""
    found = list_runs(path) if path.is_dir() else []
    summaries = [each for each in found if each.path == str(path)]
    if not summaries:
        fault = "not a run directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {fault}; use the directories of runs, such as those in runs/")
    file = path / "metrics.jsonl"
    losses: dict[int, dict[str, float | None]] = {}
    records = list(read_records(file))
    for record in records:
        epoch = record.get("epoch")
        if type(epoch) is int and 1 <= epoch <= _MOST_EPOCHS and LOSSES.keys() & record.keys():
            losses[epoch] = {tag: finite_number(record, tag) for tag in LOSSES}
    if not losses:
        status = summaries[0].status
        raise UserError(f"{file}: no finished epoch in it (the run is {status}); use another run")
    with file.open(errors="replace") as stream:
        lines = sum(1 for line in stream if line.strip())
    config, environment = (read_json_object(path / f"{n}.json") for n in ("config", "environment"))
    return _Run(summaries[0], losses, lines - len(records), config, environment)


def _compare(a: _Run, b: _Run, rtol: float) -> Comparison:
    """Compare two runs. Raises UserError if they have no epoch in common."""
    epochs = sorted(a.losses.keys() & b.losses.keys())
    if not epochs:
        raise UserError(f"{a.name} and {b.name}: no epoch in common; use other runs")
    largest, beyond = {}, []
    for tag in LOSSES:
        found = [Difference(_difference(a.losses[e][tag], b.losses[e][tag]), e) for e in epochs]
        largest[tag] = max(found, key=lambda difference: difference.value)
        beyond += [difference.epoch for difference in found if difference.value > rtol]
    differing = _differing(a, b)
    deciding = set(HYPERPARAMETERS)
    if "onecycle" in (a.config.get("schedule"), b.config.get("schedule")):
        deciding.add("epochs")
    causes = [name for name in differing if name in deciding and beyond]
    possible = [name for name in differing if name in _IMPLEMENTATION and beyond and not causes]
    first_beyond = min(beyond, default=None)
    return Comparison((a.name, b.name), epochs, largest, first_beyond, differing, causes, possible)


def _difference(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _differing(a: _Run, b: _Run) -> dict[str, tuple[Any, Any]]:
    """Return what differs: what decides the curve first, then versions and code, then the rest."""
    of_a: dict[str, Any] = {}
    of_b: dict[str, Any] = {}
    if a.config and b.config:
        of_a, of_b = (
            {name: value for name, value in run.config.items() if name not in _LEFT_OUT}
            for run in (a, b)
        )
    if a.environment and b.environment:  # which has the device that `auto` stands for
        there_a, there_b = _recorded(a.environment), _recorded(b.environment)
        for name in there_a.keys() & there_b.keys():  # an earlier version recorded less
            of_a[name], of_b[name] = there_a[name], there_b[name]
    known = [*HYPERPARAMETERS, *_IMPLEMENTATION, *_WORLD]
    names = [*known, *(name for name in of_a | of_b if name not in known)]
    pairs = {name: (of_a.get(name), of_b.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _recorded(environment: Mapping[str, Any]) -> dict[str, Any]:
    names = (*_IMPLEMENTATION, *_WORLD)
    recorded = {name: environment[name] for name in names if name in environment}
    if fingerprint := environment.get("data_fingerprint"):
        recorded["data"] = f"{environment.get('data')} ({str(fingerprint)[:8]})"
    return recorded


def _print(runs: Sequence[_Run], pairs: Sequence[Comparison], rtol: float) -> None:
    for each in runs:
        if each.notes:
            print_result(f"note: {each.name}: {'; '.join(each.notes)}")
    for pair in pairs:
        count = counted(len(pair.epochs), "epoch")
        verdict = f"within {rtol:g} in {count}"
        if pair.first_beyond is not None:
            verdict = f"beyond {rtol:g} from epoch {pair.first_beyond} on, of {count}"
        print_result(f"{pair.names[0]} and {pair.names[1]}: {verdict}")
        losses = [f"{LOSSES[tag]} {_describe(found)}" for tag, found in pair.largest.items()]
        print_result(f"  losses  largest relative difference: {', '.join(losses)}")
        differing = [f"{name}: {_shown(a)}, {_shown(b)}" for name, (a, b) in pair.differing.items()]
        print_result(f"  differ  {'; '.join(differing) or 'no setting, version or world'}")
        if pair.first_beyond is not None:
            print_result(f"  cause   {_explain(pair)}")


def _describe(difference: Difference) -> str:
    if difference.value == 0:
        return "none"
    if math.isinf(difference.value):
        return f"not finite in one of them (epoch {difference.epoch})"
    return f"{difference.value:.1e} (epoch {difference.epoch})"


def _explain(pair: Comparison) -> str:
    if pair.causes:
        return ", ".join(pair.causes)
    if pair.possible_causes:
        return f"perhaps {', '.join(pair.possible_causes)}"
    return (
        "only rounding should differ: large steps amplify it (docs/correctness.md), or a machine "
        "computes wrongly (mnist-dist doctor --train)"
    )


def _shown(value: Any) -> str:
    """Format a value in short, safe to print on a terminal."""
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{40,}(-dirty)?", text):
        text = text[:8] + text[40:] * text.endswith("-dirty")
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def _as_json(runs: Sequence[_Run], pairs: Sequence[Comparison], rtol: float) -> dict[str, Any]:
    def described(difference: Difference) -> dict[str, Any]:
        value = difference.value
        return {"difference": value if math.isfinite(value) else None, "epoch": difference.epoch}

    return {
        "rtol": rtol,
        "within": all(pair.first_beyond is None for pair in pairs),
        "runs": [
            {
                "path": each.summary.path,
                "status": each.summary.status,
                "epochs": sorted(each.losses),
                "notes": each.notes,
            }
            for each in runs
        ],
        "pairs": [
            asdict(pair) | {"largest": {t: described(d) for t, d in pair.largest.items()}}
            for pair in pairs
        ],
    }
