"""What a person sees while it runs: lines, and how far it is. Silent on every rank but 0."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

# A terminal's line is drawn anew this often; elsewhere a line is added when none was for so long.
_DRAW_EVERY_S = 0.25
_LINE_EVERY_S = 10.0
_STYLES = {"faint": "2", "good": "32", "warning": "33"}


class Console:
    """Lines for a person, from rank 0 only."""

    def __init__(self, speaks: bool) -> None:
        """Speak if `speaks`, which is true on rank 0."""
        self._speaks = speaks
        self._warned: set[str] = set()
        self.last_line = time.monotonic()
        """When the last line was said."""

    def say(self, line: str) -> None:
        """Print one line, clear of the progress."""
        self._write(line, sys.stdout)

    def fact(self, label: str, text: str) -> None:
        """Print one line of a list: what it is about, and what there is to say about it."""
        self.say(f"{paint(f'{label:6}', 'faint')} {text}")

    def warn(self, line: str) -> None:
        """Print one line of warning on stderr; the same one only once."""
        if line not in self._warned:
            self._warned.add(line)
            word = paint("warning:", "warning", sys.stderr)
            self._write(f"mnist-dist: {word} {line}", sys.stderr)

    def _write(self, line: str, stream: TextIO | None) -> None:
        """A reader that has gone, or a full disk behind `>`, is no reason to stop training."""
        if self._speaks and stream is not None:
            self.last_line = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(line, file=stream)
                stream.flush()

    @contextlib.contextmanager
    def progress(self, course: "Course") -> Iterator["Progress"]:
        """Show how far the run is, until the end of the block."""
        progress = Progress(self, course, self._speaks)
        try:
            yield progress
        finally:
            progress.close()


class Course:
    """How long a run is, and how quickly it has gone since it was started here."""

    def __init__(
        self, epochs: int, steps_per_epoch: int, samples_per_epoch: int, ranks: int, done: int
    ) -> None:
        """A run of so many epochs on `ranks` processes, `done` steps of which were taken before."""
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.steps = epochs * steps_per_epoch
        self.done = done
        self._samples_per_step = samples_per_epoch / steps_per_epoch
        self.own_samples_per_step = self._samples_per_step / ranks
        self._started = time.monotonic()

    def name(self, epoch: int) -> str:
        """Epoch `epoch`, 1 is the first, of how many."""
        return f"epoch {epoch:{len(str(self.epochs))}}/{self.epochs}"

    def speed(self, step: int) -> float:
        """Samples a second from the start until `step`, validation and saving included."""
        return (step - self.done) * self._samples_per_step / self._seconds()

    def left(self, step: int) -> str:
        """How long the rest after `step` will take, at the speed so far; in the end: all."""
        if step >= self.steps:
            return f"{tqdm.format_interval(self._seconds())} in all"
        seconds = self._seconds() * (self.steps - step) / max(1, step - self.done)
        return f"{tqdm.format_interval(seconds)} left"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)


class Progress:
    """How far the run is: one line that stays at the bottom of a terminal, or lines now and then.

    Between two looks it costs a comparison a step; nothing is computed for it, and no other rank
    is asked.
    """

    def __init__(self, console: Console, course: Course, speaks: bool) -> None:
        self._console = console
        self._course = course
        self._losses: deque[Tensor] = deque(maxlen=100)
        self._bar: tqdm[object] | None = None
        self._next = float("inf")
        if speaks:
            interactive = _is_terminal(sys.stdout) and _is_terminal(sys.stderr)
            self._every = _DRAW_EVERY_S if interactive else _LINE_EVERY_S
            self._next = time.monotonic() + self._every
            if interactive:
                self._bar = _bar(course)

    def step(self, step: int, loss_sum: Tensor) -> None:
        """Note optimizer step `step` of the run; `loss_sum` as `train_epoch` yields it."""
        if self._next == float("inf"):
            return
        self._losses.append(loss_sum)
        now = time.monotonic()
        if now >= self._next:
            self._show(step, now)

    def _show(self, step: int, now: float) -> None:
        quiet_since = self._console.last_line
        if self._bar is None and now - quiet_since < self._every:
            self._next = quiet_since + self._every
            return
        self._next = now + self._every
        course = self._course
        samples = len(self._losses) * course.own_samples_per_step
        loss = float(torch.stack(list(self._losses)).sum()) / samples
        text = (
            f"step {step:,}/{course.steps:,}  loss {loss:.4f}  "
            f"{course.speed(step):,.0f} samples/s  {course.left(step)}"
        )
        name = course.name(min((step - 1) // course.steps_per_epoch + 1, course.epochs))
        if self._bar is None:
            self._console.say(f"  in {name}  {text}")
        else:
            with contextlib.suppress(OSError, ValueError):
                self._bar.n = step
                self._bar.set_description_str(f"{name}  {text}")

    def epoch(self, epoch: int, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Say a finished epoch's figures, by their tags."""
        speed = figures.get("perf/samples_per_second")
        shown = "" if speed is None else f"{speed:,.0f} samples/s  "
        validation = f"{figures['val/loss']:.4f}, {figures['val/accuracy']:6.2%}"
        self._console.say(
            f"{self._course.name(epoch)}  step {step:,}  train loss {figures['train/loss']:.4f}  "
            f"val loss {paint(validation, 'good') if best else validation}  "
            f"{shown}{self._course.left(step)}"
        )

    def close(self) -> None:
        """Leave a terminal as if there had been no progress."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


def _bar(course: Course) -> "tqdm[object]":
    return tqdm(
        total=course.steps,
        initial=course.done,
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% {bar:20}",
    )


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in a style of _STYLES, where its reader sees colours.

    That is on a terminal or where FORCE_COLOR is set, unless NO_COLOR (https://no-color.org) is.
    """
    stream = sys.stdout if stream is None else stream
    wanted = _is_terminal(stream) or bool(os.environ.get("FORCE_COLOR"))
    if not wanted or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False
