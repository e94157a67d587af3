"""What a finished run says in the end: how good it is, where it errs, how to go on with it."""

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Fact = tuple[str, str]
"""A label, and what there is to say."""

_CONFUSIONS = 5


def validation(epochs: Sequence[Mapping[str, Any]], best_epoch: int) -> list[Fact]:
    """The best and the final epoch.

    Args:
        epochs: what was recorded of each, in order.
        best_epoch: the number of the one whose weights are in best.pt.
    """
    shown = {record["epoch"]: record for record in epochs if "val/loss" in record}
    if not shown:
        return []
    final = max(shown)
    names = ["best", "final"] if best_epoch != final else ["best"]
    numbers = [best_epoch, final] if best_epoch != final else [final]
    return [
        (
            name,
            f"val loss {shown[number]['val/loss']:.4f}, accuracy "
            f"{shown[number]['val/accuracy']:.2%} in epoch {number}"
            + (", the last" if number == final else ""),
        )
        for name, number in zip(names, numbers, strict=True)
        if number in shown
    ]


def digits(accuracy_by_digit: Sequence[float]) -> str:
    """The share of each digit that is right, in one line."""
    known = enumerate(accuracy_by_digit)
    return "  ".join(f"{digit}: {share:.1%}" for digit, share in known if not math.isnan(share))


def confusions(worst: Sequence[tuple[int, int, int]]) -> str:
    """Format the most frequent confusions as one line.

    Args:
        worst: (samples, label, predicted), the most frequent first.
    """
    errors = sum(count for count, _, _ in worst)
    if not errors:
        return "none"
    named = [f"{label} predicted as {found}: {count} times" for count, label, found in worst]
    once = [name.replace(": 1 times", ": once") for name in named[:_CONFUSIONS]]
    return f"{errors:,} in all; {', '.join(once)}"


def view(run: str) -> str:
    """The command that shows the run in directory `run` beside its neighbours."""
    return f"tensorboard --logdir {shlex.quote(str(Path(run).parent))}"


def next_commands(run: str, train: str, longer: int | None) -> list[Fact]:
    """What to type to look at a run, to evaluate it, and to train on.

    Args:
        run: its directory.
        train: the command that trains, up to its flags; "" if only who typed it knows it.
        longer: a number of epochs to go on to; None if the run cannot be extended.
    """
    quoted = shlex.quote(run)
    ours = "mnist-dist" if shutil.which("mnist-dist") else "python -m mnist_dist"
    facts = [("view", view(run)), ("check", f"{ours} evaluate {quoted}")]
    if longer is not None:
        same = f"{train} --config {quoted}/config.json" if train else "the same command with"
        facts.append(("extend", f"{same} --run-dir {quoted} --epochs {longer}"))
    return facts
