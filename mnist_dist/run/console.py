"""Print lines, progress, speed, and a summary at the end, on rank 0 only."""

import contextlib
import math
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mnist_dist.evaluation import Evaluation
from mnist_dist.optimizer import gradient_norm
from mnist_dist.sampling import Sharding

# How often a terminal's progress line is redrawn; elsewhere, the longest time without a line.
_DRAW_EVERY_S = 0.25
_LINE_EVERY_S = 10.0
_SHOWN_LOSSES = 100  # the mean over these steps is shown
_STYLES = {"faint": "2", "good": "32", "warning": "33"}


class Console:
    """Prints lines on rank 0, and nothing on other ranks."""

    def __init__(self, enabled: bool) -> None:
        """Print if `enabled`, which is true on rank 0."""
        self.enabled = enabled
        self._warned: set[str] = set()
        self.last_line = time.monotonic()
        """When the last line was printed, by time.monotonic."""

    def print(self, line: str) -> None:
        """Print one line above the progress bar."""
        self._write(line, sys.stdout)

    def print_field(self, label: str, text: str) -> None:
        """Print a labelled line."""
        self.print(f"{style(f'{label:6}', 'faint')} {text}")

    def warn(self, line: str) -> None:
        """Print a warning on stderr, each text once."""
        if line not in self._warned:
            self._warned.add(line)
            word = style("warning:", "warning", sys.stderr)
            self._write(f"mnist-dist: {word} {line}", sys.stderr)

    def _write(self, line: str, stream: TextIO | None) -> None:
        """Print to a stream; a closed pipe or a full disk behind `>` does not stop training."""
        if self.enabled and stream is not None:
            self.last_line = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(line, file=stream)
                stream.flush()


class Progress:
    """Shows progress as one line at the bottom of a terminal, elsewhere as a line now and then.

    Between two updates it costs one comparison per step, and never a collective. Shown until the
    end of its `with` block.
    """

    def __init__(
        self,
        console: Console,
        epochs: int,
        sharding: Sharding,
        done: int,
        wait_for_gpu: Callable[[], None] = lambda: None,
    ) -> None:
        """Start to show a run of `epochs`, after `done` steps that earlier starts have taken.

        `wait_for_gpu` is called before a loss is read.
        """
        self._wait_for_gpu = wait_for_gpu
        self._console = console
        self._epochs, self._sharding = epochs, sharding
        self._steps, self._done = epochs * sharding.steps_per_epoch, done
        self._started = time.monotonic()
        self._losses: deque[Tensor] = deque(maxlen=_SHOWN_LOSSES)
        self._bar: tqdm[object] | None = None
        self._next = float("inf")
        if console.enabled:
            interactive = _is_terminal(sys.stdout) and _is_terminal(sys.stderr)
            self._every = _DRAW_EVERY_S if interactive else _LINE_EVERY_S
            self._next = time.monotonic() + self._every
            if interactive:
                self._bar = tqdm(
                    total=self._steps,
                    initial=done,
                    leave=False,
                    dynamic_ncols=True,
                    bar_format="{desc} {percentage:3.0f}% {bar:20}",
                )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()

    def update(self, step: int, loss_sum: Tensor) -> None:
        """Record the run's optimizer steps up to `step`.

        `loss_sum` is this rank's summed loss of that step, () float32, or of several, (n,).
        """
        if self._next == float("inf"):
            return
        self._losses.append(loss_sum)
        now = time.monotonic()
        if now >= self._next:
            self._show(step, now)

    def _show(self, step: int, now: float) -> None:
        last_line = self._console.last_line
        if self._bar is None and now - last_line < self._every:
            self._next = last_line + self._every
            return
        self._next = now + self._every
        self._wait_for_gpu()
        losses = torch.hstack(list(self._losses))[-_SHOWN_LOSSES:]
        samples = self._local_samples(step) - self._local_samples(step - len(losses))
        loss = losses.sum().item() / max(1, samples)
        # Validation and checkpoints included.
        done = (step - self._done) * self._sharding.samples / self._sharding.steps_per_epoch
        text = (
            f"step {step:,}/{self._steps:,}  loss {loss:.4f}  "
            f"{done / self._seconds():,.0f} samples/s  {self._time_left(step)}"
        )
        name = self._name(min((step - 1) // self._sharding.steps_per_epoch + 1, self._epochs))
        if self._bar is None:
            self._console.print(f"  in {name}  {text}")
        else:
            with contextlib.suppress(OSError, ValueError):
                self._bar.n = step
                self._bar.set_description_str(f"{name}  {text}")

    def epoch(self, epoch: int, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Print a finished epoch's metrics, given by tag."""
        speed = metrics.get("perf/samples_per_second")
        shown = "" if speed is None else f"{speed:,.0f} samples/s  "
        validation = f"{metrics['val/loss']:.4f}, {metrics['val/accuracy']:6.2%}"
        self._console.print(
            f"{self._name(epoch)}  step {step:,}  train loss {metrics['train/loss']:.4f}  "
            f"val loss {style(validation, 'good') if best else validation}  "
            f"{shown}{self._time_left(step)}".rstrip()
        )

    def _local_samples(self, steps: int) -> int:
        """Return this rank's samples in the first `steps` steps of the run."""
        epochs, batch = divmod(steps, self._sharding.steps_per_epoch)
        in_epoch: int = self._sharding.local_slice(batch).start
        return epochs * self._sharding.local_samples + in_epoch

    def _name(self, epoch: int) -> str:
        return f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}"

    def _time_left(self, step: int) -> str:
        """Return the estimated time left after `step`, after the last step the total time.

        Empty before the first step of this start: a run may continue at the end of an epoch.
        """
        if step >= self._steps:
            return f"{tqdm.format_interval(self._seconds())} total"
        if step == self._done:
            return ""
        seconds = self._seconds() * (self._steps - step) / (step - self._done)
        return f"{tqdm.format_interval(seconds)} left"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)


def style(text: str, name: str, stream: TextIO | None = None) -> str:
    """Return `text` in a style of _STYLES, where colours are shown.

    That is on a terminal or with FORCE_COLOR set, unless NO_COLOR is (https://no-color.org).
    """
    stream = sys.stdout if stream is None else stream
    wanted = _is_terminal(stream) or bool(os.environ.get("FORCE_COLOR"))
    if not wanted or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


class EpochTimer:
    """Measures how fast one epoch is trained on this rank."""

    def __init__(
        self, sharding: Sharding, first_batch: int, all_reduce_seconds: Callable[[], float | None]
    ) -> None:
        """Start, before global batch `first_batch` of the epoch."""
        self._sharding = sharding
        self._first_batch = first_batch
        self._all_reduce_seconds = all_reduce_seconds
        self._all_reduced = all_reduce_seconds()
        self._started = time.perf_counter()

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the epoch's metrics by tag, once it is trained.

        Call this before any rank takes another step, which may overwrite the gradients. There are
        no metrics if this start took no step of the epoch: a stop may follow its last one.
        """
        seconds = time.perf_counter() - self._started
        steps = self._sharding.steps_per_epoch - self._first_batch
        if steps == 0:
            return {}
        metrics = {
            "perf/samples_per_second": self._sharding.samples_from(self._first_batch) / seconds,
            "perf/step_ms": 1e3 * seconds / steps,
        }
        before, now = self._all_reduced, self._all_reduce_seconds()
        if self._sharding.world_size > 1 and before is not None and now is not None:
            metrics["perf/communication_share"] = (now - before) / seconds
        if (norm := gradient_norm(model.parameters())) is not None:
            metrics["train/gradient_norm"] = norm
        return metrics


Field = tuple[str, str]
"""A label and a text, as `Console.print_field` takes them."""

_SHOWN_CONFUSIONS = 5


def summary_fields(
    records: Sequence[Mapping[str, Any]], best_epoch: int, result: Evaluation
) -> list[Field]:
    """Return the results of a finished run: `records` as in metrics.jsonl, `result` of best.pt."""
    accuracy = f"accuracy {result.accuracy:.2%} of {result.count:,} digits"
    test = f"loss {result.loss:.4f}, {accuracy} (best.pt: weights of epoch {best_epoch})"
    return [
        *_validation_fields(records, best_epoch),
        ("test", test),
        ("digits", _by_digit(result.accuracy_by_class)),
        ("errors", _confusions(result.confusions)),
    ]


def _validation_fields(records: Sequence[Mapping[str, Any]], best_epoch: int) -> list[Field]:
    shown = {record["epoch"]: record for record in records if "val/loss" in record}
    if not shown:
        return []
    final = max(shown)
    epochs = {"best": best_epoch} | ({"final": final} if final != best_epoch else {})
    return [
        (
            label,
            f"val loss {shown[epoch]['val/loss']:.4f}, accuracy "
            f"{shown[epoch]['val/accuracy']:.2%} in epoch {epoch}"
            + (", the last" if epoch == final else ""),
        )
        for label, epoch in epochs.items()
        if epoch in shown
    ]


def _by_digit(accuracies: Sequence[float]) -> str:
    known = enumerate(accuracies)
    return "  ".join(f"{digit}: {share:.1%}" for digit, share in known if not math.isnan(share))


def _confusions(worst: Sequence[tuple[int, int, int]]) -> str:
    """Describe (samples, label, predicted), the most frequent first, in one line."""
    errors = sum(count for count, _, _ in worst)
    if not errors:
        return "none"
    named = [f"{label} predicted as {predicted}: {count}" for count, label, predicted in worst]
    return f"{errors:,} total; {', '.join(named[:_SHOWN_CONFUSIONS])}"


def shell_word(text: str) -> str:
    """Quote a name for a command that bash reads, also if it is no text that can be printed."""
    if text.isprintable() and _has_encoding(text):
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    return "".join(
        ["$'", *(chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(text)), "'"]
    )


def _has_encoding(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")  # there may be no stdout
    except UnicodeEncodeError:
        return False
    return True


def tensorboard_command(run: str) -> str:
    """Return the command that shows the run in directory `run` next to its neighbours."""
    return f"tensorboard --logdir {shell_word(str(Path(run).parent))}"


def next_commands(run: str, train: str, longer: int | None) -> list[Field]:
    """Return the commands that show a run, evaluate it, and train it longer.

    Args:
        run: its directory.
        train: the command that trains, up to its flags; "" if only the user knows it.
        longer: a number of epochs to extend it to; None if it cannot be extended.
    """
    quoted = shell_word(run)
    ours = "mnist-dist" if shutil.which("mnist-dist") else "python -m mnist_dist"
    fields = [("view", tensorboard_command(run)), ("check", f"{ours} evaluate {quoted}")]
    if longer is not None:
        same = f"{train} --config {quoted}/config.json" if train else "the same command with"
        fields.append(("extend", f"{same} --run-dir {quoted} --epochs {longer}"))
    return fields
