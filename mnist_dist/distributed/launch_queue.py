"""Bound how far the host runs ahead of its GPU, and how long it waits for it."""

import time
from collections import deque
from collections.abc import Callable

import torch

# Launches, of a step or of a graph, that may be in flight: enough that the GPU never waits.
_MOST_LAUNCHED = 32
_SPIN_S, _CHECK_EVERY_S = 0.001, 0.5


class LaunchQueue:
    """Bounds how far the host runs ahead of its GPU, and how long it waits for it.

    Nothing else ends a wait for a dead peer: NCCL waits forever, its watchdog (which would abort
    the process without a cause) is off, and does not see what is in a CUDA graph. On a CPU, this
    does nothing.
    """

    def __init__(
        self, device: torch.device, timeout: float, check: Callable[[float], None]
    ) -> None:
        """Watch the current stream, and wait at most `timeout` seconds for it.

        `check` is called now and then during a wait, with its seconds so far; it may raise.
        """
        self._on_gpu, self._timeout, self._check = device.type == "cuda", timeout, check
        self._events: deque[torch.cuda.Event] = deque()

    def add(self) -> None:
        """Record a launch, and wait if too many are in flight.

        Raises:
            ConnectionError: the GPU did not finish what was launched before in time.
        """
        if self._on_gpu:
            self._events.append(torch.cuda.Event())
            self._events[-1].record()
            if len(self._events) > _MOST_LAUNCHED:
                self._wait_for(self._events.popleft())

    def wait(self) -> None:
        """Wait until the GPU has done all that was launched, so that reading from it returns.

        Raises:
            ConnectionError: it did not finish in time.
        """
        self.add()
        while self._events:
            self._wait_for(self._events.popleft())

    def _wait_for(self, event: torch.cuda.Event) -> None:
        started = checked = time.monotonic()
        while not event.query():
            now = time.monotonic()
            if now - started > self._timeout:
                raise ConnectionError(f"Timed out after {self._timeout:g} s waiting for the GPU")
            if now - checked > _CHECK_EVERY_S:
                checked = now
                self._check(now - started)
            if now - started > _SPIN_S:  # until then, sleeping would cost more than it saves
                time.sleep(_SPIN_S)
