"""Compare what a completed run left with an undisturbed one: see benchmarks/crash_states.py."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EPOCHS, _STEPS_PER_EPOCH = 5, 3
RUN = "runs/x"
FLAGS = ["--data=bundled", "--train-samples=192", "--keep-checkpoints=2", f"--run-dir={RUN}"]
FLAGS += ["--lr=0.5", "--momentum=0.9", "--tensorboard=minimal"]  # the best epoch is not the last
_LAST = EPOCHS * _STEPS_PER_EPOCH


@dataclass(frozen=True)
class Outcome:
    """What is compared of a completed run."""

    records: Mapping[tuple[int, bool], Mapping[str, Any]]
    """Of metrics.jsonl by epoch and whether it is the test's, without what differs in time."""
    weights: Mapping[str, str]
    """Digest of the model by checkpoint."""


def read_outcome(run: Path) -> tuple[Outcome, list[str]]:
    """Return what a completed run left, and what contradicts itself in it."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    records = {(r["epoch"], "test/loss" in r): _without_time(r) for r in found}
    bad = ["an epoch twice"] * (len(records) < len(found))
    bad += ["epochs in disorder"] * (list(records) != sorted(records))
    bad += _tensorboard_differs(run, found)
    status = json.loads((run / "status.json").read_text())
    if (status["status"], status["step"], status["saved_step"]) != ("completed", _LAST, _LAST):
        bad.append(f"status.json: {status['status']}, saved_step {status['saved_step']}")
    names = ("best.pt", f"step_{_LAST:08d}.pt")
    return Outcome(records, {n: _weights(run / "checkpoints" / n) for n in names}), bad


def _without_time(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != "time" and not k.startswith("perf/")}


def _weights(path: Path) -> str:
    model = torch.load(path, weights_only=True)["model"]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.values())).hexdigest()


def _tensorboard_differs(run: Path, records: list[dict[str, Any]]) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown = [(t, p.step, p.value) for t in events.Tags()["scalars"] for p in events.Scalars(t)]
    expected = [
        (tag, record["step"], value)
        for record in records
        for tag, value in record.items()
        if (tag == "lr" or "/" in tag) and not isinstance(value, list)
    ]
    pairs = zip(sorted(shown), sorted(expected), strict=False)
    same = all(
        a[:2] == b[:2] and math.isclose(a[2], b[2], rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs
    )
    images = [(tag, i.step) for tag in events.Tags()["images"] for i in events.Images(tag)]
    twice = ["TensorBoard: an image twice"] * (len(images) > len(set(images)))
    if same and len(shown) == len(expected):
        return twice
    steps = sorted(step for tag, step, _ in shown if tag == "val/loss")
    return [*twice, f"TensorBoard: other points than metrics.jsonl, val/loss at {steps}"]


def faults_in(directory: Path, code: int, reference: Outcome, safe_step: int = 0) -> list[str]:
    """Return what is wrong with a job that was to complete; nothing if all is as it should be."""
    log = directory.with_suffix(".log").read_text(errors="replace")
    last = log.rpartition("\n=== last start\n")[2]
    if "Traceback" in log:
        return [f"traceback: {log.strip().splitlines()[-1]}"]
    if code != 0:
        return [f"exit code {code}: {last.strip().splitlines()[-1] if last.strip() else ''}"]
    try:
        outcome, faults = read_outcome(directory / RUN)
    except (OSError, ValueError, KeyError) as error:
        return [f"{type(error).__name__}: {error}"]
    missing = reference.records.keys() - outcome.records.keys()
    faults += [f"missing in metrics.jsonl: {sorted(missing)}"] * bool(missing)
    faults += ["other metrics"] * (not missing and outcome.records != reference.records)
    names = [n for n, digest in reference.weights.items() if outcome.weights[n] != digest]
    faults += [f"other weights in {name}" for name in names]
    found = re.search(r"resume at step (\d+)", last)
    resumed = _LAST if "already complete" in last else int(found[1]) if found else 0
    return faults + [f"from step {resumed}, but {safe_step} was safe"] * (resumed < safe_step)
