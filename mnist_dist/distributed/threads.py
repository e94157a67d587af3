"""How many threads a process computes with, and which of its threads give way to those."""

import contextlib
import itertools
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

_STEPS_OF_A_TRIAL = 8
_SOON = 20  # steps until the first trial, and until the next where one has changed the number


class QuickestThreads:
    """As many of torch's threads as take steps quickest at the moment, found by trying.

    More threads are quicker only as long as what they pass to each other costs less than they save.
    On a virtual machine that changes while a job runs: its host moves the cores, and where they
    share no cache two threads can take longer than one. What is computed must not depend on the
    number of threads, since this goes by the clock.
    """

    def __init__(self, most: int, steps_between_trials: int = 2000) -> None:
        """Begin with `most` threads, and never take more."""
        self._between = steps_between_trials
        self.counts = sorted({1, *(1 << n for n in range(most.bit_length())), most})
        """The numbers that may be taken: powers of two, and the most."""
        self._trials = self._go_on()

    def begin_step(self) -> None:
        """Set torch's threads for the step that begins now."""
        torch.set_num_threads(next(self._trials))

    def _go_on(self) -> Iterator[int]:
        """The number of threads for one step after the other."""
        now, turn, pause = self.counts[-1], 0, _SOON
        while True:
            yield from itertools.repeat(now, pause)
            place = self.counts.index(now)
            beside = self.counts[max(0, place - 1) : place + 2]
            beside.remove(now)
            before = now
            if beside:
                now = yield from self._quicker(now, beside[turn % len(beside)])
            if now == before:  # as it should be; next time the other side has its turn
                turn, pause = turn + 1, self._between
            else:
                pause = _SOON

    def _quicker(self, now: int, other: int) -> Generator[int, None, int]:
        """Which of two numbers of threads takes steps in less time; each has its turn twice."""
        seconds: dict[int, list[float]] = {now: [], other: []}
        for threads in 2 * (now, other):
            yield threads  # the first one after a change is not like the others
            begun = time.perf_counter()
            yield from itertools.repeat(threads, _STEPS_OF_A_TRIAL)
            seconds[threads].append(time.perf_counter() - begun)
        return min(seconds, key=lambda threads: min(seconds[threads]))


def cpus_allowed() -> int:
    """CPUs that this process may use at once: by affinity, and by the quota of its cgroup."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(allowed, int(quota)) if quota else allowed)


def _cgroup_quota() -> float | None:
    """CPUs' worth of time that the container grants; None if it sets no bound."""
    with contextlib.suppress(OSError, ValueError):
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(share) / float(period)  # "max 100000" where there is none
    v1 = Path("/sys/fs/cgroup/cpu")
    with contextlib.suppress(OSError, ValueError):
        share = (v1 / "cpu.cfs_quota_us").read_text()
        period = (v1 / "cpu.cfs_period_us").read_text()
        return float(share) / float(period) if float(share) > 0 else None
    return None


def threads_for_one(processes_here: int, cpus_per_task: int | None) -> int:
    """Threads for one of the `processes_here` on this host that share its CPUs.

    Args:
        processes_here: of this job, on this host.
        cpus_per_task: what Slurm gave to this process alone, if it says.
    """
    return max(1, min(cpus_per_task or cpus_allowed() // processes_here, cpus_allowed()))


def ranks_outnumber_cpus(processes_here: int, cpus_per_task: int | None) -> bool:
    """Whether some of the `processes_here` have to take turns; arguments as `threads_for_one`'s."""
    return not cpus_per_task and cpus_allowed() < processes_here


def work_in_long_turns() -> None:
    """Let this process, where it shares its cores with others of its kind, finish what it is at.

    As ordinary processes, ranks that have just been woken by another's word take the core from one
    that still computes. As batch processes they wait their turn, which helps where ranks are more
    than cores. Needs no privileges; Linux only.
    """
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def let_gloo_give_way() -> None:
    """Give gloo's event loop the lowest priority.

    It polls without sleeping while a peer is not ready yet, and takes the time from the threads
    that would make it ready, where processes are as many as cores: an all-reduce between 2 or 4
    processes on 2 cores took twice as long. (SCHED_IDLE is a little better on a quiet machine, and
    far worse on a busy one.) Linux counts niceness per thread, and raising it needs no privileges.
    """
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().startswith("gloo_tcp_loop"):
                os.setpriority(os.PRIO_PROCESS, int(task.name), 19)
