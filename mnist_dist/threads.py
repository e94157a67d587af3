"""How many threads a process computes with, and which of its threads give way to those."""

import contextlib
import os
from pathlib import Path


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
