"""Stop, checkpoint and NaN decisions that all ranks take at a common step."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from mnist_dist.distributed.launch_queue import LaunchQueue
from mnist_dist.distributed.world import World
from mnist_dist.errors import print_line

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Slurm signals every process and torchrun forwards its own copy: copies this close are one request.
_SAME_REQUEST_S = 2.0
# Seconds between two syncs, and so until a stop is noticed. A sync costs a few ms, none at W = 1.
_PERIOD_S = 1.0
_PERIOD_SINGLE_S = 0.1
# How long a rank that was asked to stop still waits for its GPU: launchers kill 30 s later.
_GRACE_S = 5.0
# How long one that was asked to stop still waits for its first step, to save it.
_START_GRACE_S = 15.0


class StopRequest:
    """A flag set by each of `_SIGNALS`. Nothing else happens in a handler."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal received, 0 if none."""
        self._since = 0.0
        self.is_starting = True
        """Whether no step was taken yet, so that leaving at once would lose nothing."""

    def listen(self) -> None:
        """Handle the signals from now on; a second request exits at once.

        Python runs a handler only between two instructions of the main thread, which may be
        waiting in a collective; the wake-up descriptor is written at once, and a thread reads it.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            # Inherited as ignored, by `nohup`: the job is to outlive its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
            timer = threading.Timer(_START_GRACE_S, self._leave_start)
            timer.daemon = True
            timer.start()
        elif now - self._since > _SAME_REQUEST_S:
            print_line("second stop request: exiting without saving")
            os._exit(128 + number)

    def _leave_start(self) -> None:
        if self.is_starting:
            name = signal.Signals(self.signal).name
            print_line(f"stopped: {name} before the first step")
            os._exit(128 + self.signal)


@dataclass(frozen=True)
class SyncResult:
    """What the ranks agreed on; the same on every rank."""

    stop: str | None
    """Name of the signal that requested a stop, None to continue."""
    save: bool
    """A checkpoint is due by the clock."""
    bad_loss: tuple[int, int] | None
    """Step and rank of the earliest loss that was not finite, None if all were."""
    lost_run: str | None
    """Why rank 0 may no longer write into the run's directory, None if it may."""
    payloads: list[Any]
    """Each rank's payload, in rank order."""


class RankSync:
    """Exchanges stop, checkpoint and NaN flags about once a second, at the same step on all ranks.

    A rank that acted on its own flag would leave, or save, while its peers wait for it in the next
    all-reduce. A sync costs about as much as a step's all-reduce, so most steps have none: after
    each sync all ranks compute from the same numbers how many steps to take until the next.
    """

    def __init__(
        self, world: World, save_every_seconds: float | None = None, step_timeout: float = 120.0
    ) -> None:
        """Handle stop signals from now on; wait at most `step_timeout` seconds for a GPU.

        Checkpoints are due every `save_every_seconds`; None for none by the clock.
        """
        self._world = world
        self.launches = LaunchQueue(world.device, step_timeout, self._check_wait)
        """To be waited for before anything is read from the GPU."""
        self._failed_peer: threading.Event | None = None
        self._stop = StopRequest()
        self._stop.listen()
        self._save_every_seconds = save_every_seconds
        self._saved = self._synced = time.monotonic()
        self._steps = 0
        self._steps_until_next = 1

    def count(self, steps: int) -> None:
        """Count steps that this rank has taken."""
        self._steps += steps

    @property
    def is_due(self) -> bool:
        """Whether the ranks are to exchange their flags now; the same on all of them."""
        return self._steps >= self._steps_until_next

    @property
    def steps_left(self) -> int:
        """Steps until `is_due`."""
        return max(1, self._steps_until_next - self._steps)

    def _check_wait(self, seconds: float) -> None:
        """End a wait for the GPU early if a peer has failed; a launcher would soon kill us."""
        if self._world.failures is None:
            return
        if self._failed_peer is None:
            self._failed_peer = self._world.failures.watch_for_causes()
        stopped = self._stop.signal and seconds > _GRACE_S
        if stopped or self._failed_peer.is_set():
            raise ConnectionError(f"Timed out after {seconds:.0f} s waiting for the GPU")

    def exchange(
        self, *, bad_step: int | None = None, payload: Any = None, lost_run: str | None = None
    ) -> SyncResult:
        """Exchange flags between all ranks; every rank must call this after the same step.

        Args:
            bad_step: the first step at which this rank's loss was not finite.
            payload: any picklable value, to travel with the flags.
            lost_run: why this rank may no longer write into the run's directory.
        """
        self._stop.is_starting = False
        now = time.monotonic()
        timer = self._save_every_seconds
        save_due = timer is not None and now - self._saved >= timer
        step_seconds = (now - self._synced) / max(1, self._steps)
        message = (self._stop.signal, step_seconds, save_due, bad_step, lost_run, payload)
        stops, seconds, saves, bad_steps, losts, payloads = zip(
            *self._world.gather(message), strict=True
        )
        period = _PERIOD_S if self._world.world_size > 1 else _PERIOD_SINGLE_S
        self._steps_until_next = max(1, min(round(period / max(*seconds, 1e-6)), 100_000))
        self._steps, self._synced = 0, now
        bad_losses = [(step, rank) for rank, step in enumerate(bad_steps) if step is not None]
        return SyncResult(
            stop=signal.Signals(max(stops)).name if any(stops) else None,
            save=any(saves),
            bad_loss=min(bad_losses, default=None),
            lost_run=next(filter(None, losts), None),
            payloads=list(payloads),
        )

    def mark_saved(self) -> None:
        """Restart the clock of `save_every_seconds`: a checkpoint was just made."""
        self._saved = time.monotonic()
