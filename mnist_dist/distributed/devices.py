"""Choose each process's device, backend, precision and number of threads."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from mnist_dist.distributed.launcher import Launch
from mnist_dist.errors import NodeError, UserError, counted
from mnist_dist.flags import check_device

Backend = Literal["gloo", "nccl"]
Precision = Literal["fp32", "tf32", "bf16"]

# Rows of a matrix product that get a thread of their own. At few rows a second thread gains little
# on idle cores, and on busy ones it makes a step many times as long, since OpenMP's threads spin at
# every barrier until the other one is scheduled. Compare OMP_NUM_THREADS=1 and 2.
_ROWS_PER_THREAD = 256


def pick_device(
    launch: Launch, device: str, warn: Callable[[str], None] = lambda line: None
) -> torch.device:
    """Return the CPU, or this process's GPU; every process of a node decides for the same kind.

    Args:
        launch: this process's rank and world size.
        device: as --device: "cuda" is a GPU for each process of a node, "cuda:N" GPU N for all,
            "auto" is "cuda" where there are enough GPUs, and else "cpu".
        warn: called with a line if "auto" leaves GPUs unused.

    Raises:
        UserError: the GPUs that `device` names are not there.
    """
    check_device(device)
    if device == "cpu":
        return torch.device("cpu")
    gpus, fault = _usable_gpus()
    processes, index = launch.local_world_size, _gpu_index(launch, device, gpus)
    flag = f"{'--ntasks-per-node' if launch.launcher == 'srun' else '--nproc_per_node'}={gpus}"
    if index is not None and index < gpus and fault is None:
        try:
            return _use_gpu(index)
        except RuntimeError as error:  # in exclusive mode, without memory, broken
            gpus, fault = 0, str(error).splitlines()[0]
    if not gpus:
        shortage = f"torch finds no usable GPU here{f' ({fault})' if fault else ''}"
        remedy = "use --device cpu"
    elif index is not None:
        shortage, remedy = (
            f"this node has {counted(gpus, 'GPU')}",
            "use cuda:0" + (f" to cuda:{gpus - 1}" if gpus > 1 else ""),
        )
    else:
        shortage = f"{processes} processes on a node with {counted(gpus, 'GPU')}"
        remedy = (
            f"start {gpus} or fewer ({flag}), share one GPU with --device cuda:0, "
            "or use --device cpu"
        )
    if device != "auto":
        raise NodeError(f"--device {device}: {shortage}; {remedy}")
    if fault or gpus:
        use = f"; {flag} uses the GPU{'s' * (gpus > 1)}" if gpus else ""
        warn(f"--device auto: {shortage}: training on the CPU{use}")
    return torch.device("cpu")


def _usable_gpus() -> tuple[int, str | None]:
    """Return the number of GPUs that torch can use, and why it can use none of those it sees.

    torch.cuda.device_count asks the driver's management library, which also counts GPUs that the
    CUDA runtime cannot use, such as those of a driver too old for this torch.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                torch.cuda.init()
                return torch.cuda.device_count(), None
        except RuntimeError as error:
            return 0, str(error).splitlines()[0]
    return 0, str(caught[0].message).splitlines()[0] if caught else None


def _gpu_index(launch: Launch, device: str, gpus: int) -> int | None:
    """Return the number of this process's GPU; None if there are fewer GPUs than processes."""
    if device.startswith("cuda:"):
        return int(device.removeprefix("cuda:"))
    # With one GPU bound to each srun task, every task sees its own as number 0.
    if launch.launcher == "srun" and gpus == 1:
        return 0
    return launch.local_rank if launch.local_world_size <= gpus else None


def _use_gpu(index: int) -> torch.device:
    """Make a GPU, and a stream of it, current for this thread."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # All work goes to one stream, and none to the default stream, where no graph can be captured.
    torch.cuda.set_stream(torch.cuda.Stream(device))
    return device


def pick_backend(launch: Launch, device: torch.device, wanted: str, backend: str) -> Backend:
    """Return NCCL where each process has a GPU of its own, else gloo, unless the user chose.

    `wanted` and `backend` are the values of --device and --backend.

    Raises:
        UserError: NCCL without GPUs, or for processes that share one.
    """
    shared = launch.world_size > 1 and wanted.startswith("cuda:")
    if backend == "nccl" and device.type != "cuda":
        raise UserError("--backend nccl: no GPU is used here; use --backend gloo")
    if backend == "nccl" and shared:
        raise UserError(f"--backend nccl: processes share {wanted}, which needs --backend gloo")
    return "nccl" if device.type == "cuda" and not shared and backend != "gloo" else "gloo"


def set_precision(precision: Precision, device: torch.device) -> None:
    """Set what a GPU computes float32 matrix products and convolutions in.

    Both have defaults that depend on the environment or the kind of product, so both are set.
    cuDNN's algorithms are restricted to those that give the same bits each time.

    Raises:
        UserError: `device` has no TF32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32: needs a GPU; use fp32, or bf16")
    # "highest" also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as in NVIDIA's containers.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic = True


def set_threads(launch: Launch, local_batch_size: int | None = None) -> None:
    """Set torch's threads once, by a rule, since autograd's bits depend on their number.

    The node's CPUs are shared out among its ranks; a training step of few rows takes fewer. A user
    who sets OMP_NUM_THREADS decides; torchrun sets it to 1 on its own, so 1 means nothing there.

    `local_batch_size` is the number of rows of this rank's matrix products in training, if known.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is not None and not (chosen == "1" and launch.launcher == "torchrun"):
        return
    threads = threads_per_process(launch.local_world_size, launch.cpus_per_task)
    if local_batch_size is not None:
        threads = min(threads, max(1, local_batch_size // _ROWS_PER_THREAD))
    torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_for(rows: int, launch: Launch) -> Iterator[None]:
    """Use the threads that matrix products of `rows` rows are worth, and then as many as before."""
    before = torch.get_num_threads()
    set_threads(launch, rows)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_per_process(local_world_size: int, cpus_per_task: int | None) -> int:
    """Return the threads for one of `local_world_size` processes that share this node's CPUs.

    `cpus_per_task` is what Slurm gave to this process alone, if known.
    """
    return max(1, min(cpus_per_task or cpus_allowed() // local_world_size, cpus_allowed()))


def ranks_outnumber_cpus(local_world_size: int, cpus_per_task: int | None) -> bool:
    """Return whether ranks of this node have to take turns; arguments as `threads_per_process`."""
    return not cpus_per_task and cpus_allowed() < local_world_size


def cpus_allowed() -> int:
    """Return how many CPUs this process may use at once, by affinity and by its cgroup's quota."""
    allowed, quota = len(cpu_affinity()), cgroup_quota()
    return max(1, min(allowed, int(quota)) if quota else allowed)


def cpu_affinity() -> list[int]:
    """Return the numbers of the CPUs that this process may run on."""
    with contextlib.suppress(AttributeError):  # not on Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup_quota(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Return the lowest CPU quota of this process's cgroup and all its parents, in CPUs.

    None if none of them has a quota. Reads cgroups of version 1 and 2.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    quotas = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In version 1, or with both at once, each hierarchy has a mount of its own.
        for top in (mount / (controllers or "unified"), mount / "cpu", mount):
            # In a container, the path may be the host's: what exists of it is read.
            group = top / path.strip("/")
            parents = [parent for parent in group.parents if parent.is_relative_to(top)]
            quotas += [quota for each in (group, *parents) if (quota := _quota_of(each))]
    return min(quotas, default=None)


def _quota_of(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        share, period = (group / "cpu.max").read_text().split()
        return float(share) / float(period)  # "max 100000" where there is none
    with contextlib.suppress(OSError, ValueError):
        share, period = ((group / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
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
