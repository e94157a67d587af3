"""Please stop: signals set a flag, and all ranks agree at a step."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mnist_dist.distributed.world import World, as_bytes, as_numbers

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Slurm sends to every process, torchrun passes its own copy on: copies this close are one request.
_SAME_REQUEST_S = 2.0
# Seconds between two agreements: a stop is noticed this soon. One costs a few ms, alone nothing.
_PERIOD_S = 1.0
_PERIOD_ALONE_S = 0.1


class StopRequest:
    """The flag that SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set. Nothing else happens in a handler."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal that came; 0 while none has."""
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals from now on. A second request, later than copies of the first, ends.

        Python runs a handler only between two instructions of the main thread, which may be
        waiting in a collective; the wake-up descriptor is written at once, and a thread reads it.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def _read(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] in _SIGNALS:
                self._receive(received[0])

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self.signal == 0:
            self.signal, self._since = number, now
        elif now - self._since > _SAME_REQUEST_S:
            print("mnist-dist: a second request: leaving without saving", file=sys.stderr)
            os._exit(128 + number)


@dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on, at the same step."""

    stop: str | None
    """Name of the signal that asked for a stop; None to go on."""
    save: bool
    """A checkpoint is due by the clock."""
    bad_rank: int | None
    """Rank whose loss was not finite first; None if all are finite."""
    bad_step: int
    """The step it was at, if there is one."""


class Agreement:
    """Every second or so all ranks compare notes at the same step.

    A rank that acted on its own flag would leave, or save, while the others wait for it in the next
    all-reduce. An exchange costs about as much as a step's, so it is not made every step: after
    each, all ranks compute from the same numbers how many steps to take until the next.
    """

    def __init__(self, world: World, stop: StopRequest, save_every_s: float | None) -> None:
        """Compare `stop`, and with `save_every_s` when to save, over the ranks of `world`."""
        self._world = world
        self._stop = stop
        self._save_every_s = save_every_s
        self._saved = self._compared = time.monotonic()
        self._steps = 0
        self._steps_until_next = 1

    def due(self) -> bool:
        """Count one step; True when the ranks are to compare notes after it."""
        self._steps += 1
        return self._steps >= self._steps_until_next

    def compare(
        self, bad_step: int | None, beside: Tensor | None = None
    ) -> tuple[Verdict, list[Tensor]]:
        """Exchange notes; every rank must call this after the same step, and gets the same verdict.

        Args:
            bad_step: the first step at which this rank's loss was not finite, or None.
            beside: (n,) uint8 of the same length on every rank, which needs no exchange of its own
                then.

        Returns:
            The verdict, and each rank's `beside`.
        """
        now = time.monotonic()
        clock = self._save_every_s is not None and now - self._saved >= self._save_every_s
        seconds = (now - self._compared) / max(1, self._steps)
        bad = float("inf") if bad_step is None else float(bad_step)
        mine = as_bytes([float(self._stop.signal), seconds, float(clock), bad])
        length = len(mine)
        both = mine if beside is None else torch.cat([mine, beside])
        everybodys = self._world.gather_tensors(both)
        notes = [as_numbers(theirs[:length]) for theirs in everybodys]
        stop, slowest, save = (max(column) for column in list(zip(*notes, strict=True))[:3])
        bad_steps = [note[3] for note in notes]
        period = _PERIOD_S if self._world.world_size > 1 else _PERIOD_ALONE_S
        self._steps_until_next = max(1, min(round(period / max(slowest, 1e-6)), 100_000))
        self._steps, self._compared = 0, now
        first = min(bad_steps)
        verdict = Verdict(
            stop=signal.Signals(int(stop)).name if stop else None,
            save=bool(save),
            bad_rank=bad_steps.index(first) if first < float("inf") else None,
            bad_step=int(first) if first < float("inf") else 0,
        )
        return verdict, [theirs[length:] for theirs in everybodys]

    def saved(self) -> None:
        """A checkpoint was made: its clock starts anew."""
        self._saved = time.monotonic()
