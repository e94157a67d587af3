"""Find the number of threads that currently takes steps fastest."""

import itertools
import time
from collections.abc import Generator, Iterator

import torch

_TRIAL_STEPS = 8
_FIRST_PAUSE = 20  # steps until the first trial, and until the next after a change


class ThreadTuner:
    """Occasionally tries whether more or fewer of torch's threads take steps faster.

    More threads help only while exchanging data between cores costs less than it saves. On a
    virtual machine that changes while a job runs: the host moves its cores, and where they share
    no cache, two threads can take longer than one. The tuner goes by the clock, so the results
    must not depend on the number of threads.
    """

    def __init__(self, most: int, steps_between_trials: int = 2000) -> None:
        """Start with `most` threads, and never use more."""
        self._between = steps_between_trials
        self.counts = sorted({1, *(1 << n for n in range(most.bit_length())), most})
        """The numbers to choose from: powers of two, and the most."""
        self._trials = self._schedule()

    def start_step(self) -> None:
        """Set torch's threads for the step about to start."""
        torch.set_num_threads(next(self._trials))

    def _schedule(self) -> Iterator[int]:
        """Yield the number of threads for one step after the other."""
        now, turn, pause = self.counts[-1], 0, _FIRST_PAUSE
        while True:
            yield from itertools.repeat(now, pause)
            position = self.counts.index(now)
            neighbours = self.counts[max(0, position - 1) : position + 2]
            neighbours.remove(now)
            before = now
            if neighbours:
                now = yield from self._faster(now, neighbours[turn % len(neighbours)])
            if now == before:  # confirmed; next time try the other side
                turn, pause = turn + 1, self._between
            else:
                pause = _FIRST_PAUSE

    def _faster(self, now: int, other: int) -> Generator[int, None, int]:
        """Return which of two numbers of threads is faster; each is tried twice."""
        seconds: dict[int, list[float]] = {now: [], other: []}
        for threads in 2 * (now, other):
            yield threads  # the first step after a change is slower
            started = time.perf_counter()
            yield from itertools.repeat(threads, _TRIAL_STEPS)
            seconds[threads].append(time.perf_counter() - started)
        return min(seconds, key=lambda threads: min(seconds[threads]))
