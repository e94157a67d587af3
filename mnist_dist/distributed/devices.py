"""What each process computes with: its device, its backend, its precision and its threads."""

import contextlib
import os
from pathlib import Path
from typing import Literal

import torch

from mnist_dist.distributed.launcher import Launch
from mnist_dist.errors import UserError

Backend = Literal["gloo", "nccl"]
Precision = Literal["fp32", "tf32", "bf16"]

# Rows of a matrix product that get a thread of their own: a choice, not a measured optimum.
_ROWS_PER_THREAD = 32


def pick_device(launch: Launch, device: str) -> torch.device:
    """Return the CPU, or the GPU of this process's local rank.

    Args:
        launch: this process's place among the others.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: --device cuda without a GPU, or more processes on the node than GPUs.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus == 0:
        if device == "cuda":
            raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
        return torch.device("cpu")
    # With one GPU bound to each srun task, every task sees its own as number 0.
    bound = launch.launcher == "srun" and gpus == 1
    index = 0 if bound else launch.local_rank
    if index >= gpus:
        raise UserError(
            f"--device {device}: {launch.local_world_size} processes on a node with {gpus} GPU(s); "
            f"start at most {gpus} there or use --device cpu"
        )
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def pick_backend(device: torch.device, backend: str) -> Backend:
    """Return NCCL for GPUs and gloo for CPUs, unless the user chose.

    Raises:
        UserError: NCCL without GPUs.
    """
    if backend == "nccl" and device.type != "cuda":
        raise UserError("--backend nccl: there is no GPU here; use --backend gloo")
    return "nccl" if device.type == "cuda" and backend != "gloo" else "gloo"


def set_precision(precision: Precision, device: torch.device) -> None:
    """Allow TF32 in the float32 matrix products of a GPU if `precision` asks for it.

    Raises:
        UserError: `device` has no TF32.
    """
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError("--precision tf32: needs a GPU; use fp32, or bf16")
        torch.set_float32_matmul_precision("high")


def set_threads(launch: Launch, local_batch_size: int | None = None) -> None:
    """Set torch's threads once, by a rule, since autograd's bits depend on their number.

    The node's CPUs are shared out among its ranks; a training step of few rows takes fewer. A user
    who sets OMP_NUM_THREADS decides; torchrun sets it to 1 on its own, so 1 means nothing there.

    Args:
        launch: this process's place among the others.
        local_batch_size: rows of this rank's matrix products in training; None where that is not
            known.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is not None and not (chosen == "1" and launch.launcher == "torchrun"):
        return
    threads = threads_per_process(launch.local_world_size, launch.cpus_per_task)
    if local_batch_size is not None:
        threads = min(threads, max(1, local_batch_size // _ROWS_PER_THREAD))
    torch.set_num_threads(threads)


def threads_per_process(local_world_size: int, cpus_per_task: int | None) -> int:
    """Return the threads for one of `local_world_size` processes that share this node's CPUs.

    Args:
        local_world_size: processes of this job on this node.
        cpus_per_task: what Slurm gave to this process alone, if known.
    """
    return max(1, min(cpus_per_task or cpus_allowed() // local_world_size, cpus_allowed()))


def ranks_outnumber_cpus(local_world_size: int, cpus_per_task: int | None) -> bool:
    """Return whether ranks of this node have to take turns; arguments as `threads_per_process`."""
    return not cpus_per_task and cpus_allowed() < local_world_size


def cpus_allowed() -> int:
    """Return how many CPUs this process may use at once, by affinity and by its cgroup's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(allowed, int(quota)) if quota else allowed)


def _cgroup_quota() -> float | None:
    """Return the container's CPU quota in CPUs, None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(share) / float(period)  # "max 100000" where there is none
    v1 = Path("/sys/fs/cgroup/cpu")
    with contextlib.suppress(OSError, ValueError):
        share = (v1 / "cpu.cfs_quota_us").read_text()
        period = (v1 / "cpu.cfs_period_us").read_text()
        return float(share) / float(period) if float(share) > 0 else None
    return None


def use_batch_scheduling() -> None:
    """Let this process finish its time slice where ranks share cores (SCHED_BATCH).

    As ordinary processes, ranks woken by a peer's message preempt one that still computes. Needs no
    privileges; Linux only (https://man7.org/linux/man-pages/man7/sched.7.html).
    """
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def deprioritize_gloo() -> None:
    """Give gloo's event loop the lowest priority.

    While a peer is not ready it polls without sleeping, and takes the core from the threads that
    would make it ready: an all-reduce between 2 or 4 processes on 2 cores took twice as long.
    SCHED_IDLE is slightly better on a quiet machine and far worse on a busy one. Linux counts
    niceness per thread, and raising it needs no privileges.
    """
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().startswith("gloo_tcp_loop"):
                os.setpriority(os.PRIO_PROCESS, int(task.name), 19)
