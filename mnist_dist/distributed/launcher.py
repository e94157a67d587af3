"""Read this process's place in the job from its launcher, and exit when the launcher dies.

The only module that reads the launcher's environment variables. Imported before torch: that import
takes seconds in which the launcher may already die.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_dist.errors import UserError
from mnist_dist.lock import process_start_time

_PERIOD_S = 0.5
# Ports below Linux' ephemeral range (32768 and up), so that no outgoing connection holds them.
_FIRST_PORT, _PORTS = 15_000, 17_000
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# SLURM_INTERACTIVE_STEP of slurm.h: the step of salloc's shell.
_INTERACTIVE_STEP = str(0xFFFFFFFA)
SHELLS = re.compile(r"(ba|z|fi|k|tc|c|da)?sh")
_parent = os.getppid()


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def set_interrupts_fatal(fatal: bool) -> None:
    """Let Ctrl-C end this process at once and silently, or, as usual, raise KeyboardInterrupt.

    For the seconds in which torch is imported: its and NumPy's imports swallow exceptions, and may
    leave modules half imported. Another handler, or a signal that is ignored, stays.
    """
    handler = signal.getsignal(signal.SIGINT)
    if fatal and handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    elif not fatal and handler == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "").name == "train_ddp.py":
    set_interrupts_fatal(True)  # a program, not a library; until `run_rank`


def exit_with_parent(rank: int) -> None:
    """Exit within a second of the launcher's end from now on, even after its `kill -9`.

    Otherwise this process would keep its GPU and the run forever. A thread does it, so that it
    works while the process waits in a collective. A checkpoint that is being written is abandoned;
    those before it are intact.
    """

    def watch() -> None:
        while os.getppid() == _parent and not _was_orphaned():
            time.sleep(_PERIOD_S)
        try:
            print(f"mnist-dist: rank {rank}: the launcher is gone, exiting", file=sys.stderr)
        finally:
            os._exit(1)

    if not _is_detached():
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _was_orphaned() -> bool:
    """Return whether torchrun died before this module was imported.

    Process 1 is the parent then. In a container it may be torchrun itself; under any other
    launcher it may be the container's init or entry script, so only torchrun's end is recognised.
    """
    if _parent != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return not re.search(rb"python|torch", Path("/proc/1/cmdline").read_bytes())
    except OSError:  # not on Linux: unknown
        return False


def _is_detached() -> bool:
    """Return whether this rank was started by hand to outlive its shell, as by `nohup`."""
    by_launcher = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"))
    return not by_launcher and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@dataclass(frozen=True)
class Launch:
    """This process's place in the job, as set by its launcher."""

    launcher: Literal["torchrun", "srun", "mpirun", "none"]
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    is_store_host: bool = False
    """Whether this process hosts the ranks' store."""
    cpus_per_task: int | None = None
    """CPUs that Slurm allocated to this process; None without Slurm."""
    job_id: str | None = None
    """Identifies the job across torchrun restarts and Slurm requeues; None if nothing does."""
    by_hand: bool = False
    """Whether another program than torchrun set torchrun's variables."""

    @property
    def spans_nodes(self) -> bool:
        """Whether some ranks are on other nodes, as far as the launcher's variables show."""
        return self.local_world_size < self.world_size and not re.match(
            r"localhost$|127\.|::1$", self.master_addr or ""
        )

    @property
    def endpoint(self) -> str:
        """Where the ranks meet: `host:port`."""
        host = self.master_addr or ""
        return f"[{host}]:{self.master_port}" if ":" in host else f"{host}:{self.master_port}"

    @property
    def description(self) -> str:
        """The number of processes and what started them: `4 processes (torchrun)`."""
        if self.launcher == "none":
            return "1 process"
        return f"{self.world_size} process{'es' * (self.world_size > 1)} ({self.launcher})"

    @property
    def missing_ranks_hint(self) -> str:
        """What must start the ranks that do not come, and how to train without them."""
        if self.by_hand:
            variables = " ".join(_TORCHRUN)
            return f"start a process for each rank, or train alone after `unset {variables}`"
        if self.launcher == "srun":
            return (
                f"one `srun --ntasks={self.world_size} python` must start them all; in a shell of "
                "one task, train alone after `unset SLURM_STEP_NUM_TASKS`"
            )
        return f"torchrun must start them, on {'every node' if self.spans_nodes else 'this node'}"

    @property
    def program(self) -> str:
        """The command before the script that starts as many processes here again.

        Empty under Slurm and on several nodes, where no single command does.
        """
        if self.launcher == "none":
            return "python"
        if self.launcher == "srun" or self.local_world_size < self.world_size:
            return ""
        return f"torchrun --nproc_per_node={self.world_size}"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables: torchrun's, else an srun step's, else those of one process.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    size = environment.get("OMPI_COMM_WORLD_SIZE")
    if not any(name in environment for name in _TORCHRUN):
        # SLURM_NTASKS is also set in a batch script, where the other tasks are not started; only
        # srun sets the step's count. Below mpirun, srun's variables are those of MPI's daemons.
        in_step = "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment
        if in_step and not size:
            if _is_shell_step(environment):
                return Launch(launcher="none", job_id=_slurm_job_id(environment))
            return _checked(_read_srun, environment, ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
        return _read_mpirun(environment, size or environment.get("PMI_SIZE", ""))
    return _checked(_read_torchrun, environment, _TORCHRUN)


def _checked(
    read: Callable[[Mapping[str, str]], Launch],
    environment: Mapping[str, str],
    marks: Sequence[str],
) -> Launch:
    """Read a launch; `marks` are the variables to unset where that launcher is not in use."""
    given = [f"{name}={environment[name]}" for name in marks if name in environment]
    try:
        launch = read(environment)
        fits = 0 <= launch.rank < launch.world_size and launch.local_world_size <= launch.world_size
        if fits and 0 <= launch.local_rank < launch.local_world_size:
            return launch
        problem = "contradictory values"
    except KeyError as error:
        problem = f"set without {error.args[0]}"
    except (ValueError, IndexError) as error:
        problem = f"invalid ({error})"
    raise UserError(
        f"environment variables {' '.join(given)}: {problem}; if left over from another "
        f"program, unset {' '.join(name for name in marks if name in environment)}; otherwise "
        "start with torchrun, srun or plain python"
    )


def _is_shell_step(environment: Mapping[str, str]) -> bool:
    """Return whether this process was typed into the shell of a step (salloc, srun --pty bash).

    That shell is task 0 with the variables of the whole step; its other tasks have ended.
    """
    if environment.get("SLURM_STEP_ID") == _INTERACTIVE_STEP:
        return True
    task = environment.get("SLURM_TASK_PID", "")
    try:  # a login shell's name starts with a dash
        words = Path(f"/proc/{int(task)}/cmdline").read_text().rstrip("\0").lstrip("-").split("\0")
    except (OSError, ValueError):  # of a task in another container
        return False
    # A shell with other arguments runs a script, which may start a rank in each task.
    is_bare = all(word in ("-i", "-l", "--login") for word in words[1:])
    return is_bare and bool(SHELLS.fullmatch(Path(words[0]).name))


def _read_mpirun(environment: Mapping[str, str], size: str) -> Launch:
    """Return the launch of one process; that of mpirun, which is not supported, where it is used.

    Each of its processes would train alone. `refuse_mpirun` has the line.
    """
    if not size.isdecimal() or int(size) < 2:
        return Launch(launcher="none", job_id=_slurm_job_id(environment))
    rank = environment.get("OMPI_COMM_WORLD_RANK") or environment.get("PMI_RANK") or "0"
    return Launch(launcher="mpirun", rank=int(rank), world_size=int(size))


def refuse_mpirun(launch: Launch) -> None:
    """Raise UserError if mpirun started this process."""
    if launch.launcher == "mpirun":
        raise UserError(
            f"mpirun started {launch.world_size} processes, which would each train alone; start "
            "with torchrun or srun (README.md), or one process with plain python"
        )


def _read_torchrun(environment: Mapping[str, str]) -> Launch:
    local_world_size = int(environment["LOCAL_WORLD_SIZE"])
    # Where srun started the agent, the agent's CPUs are those of its processes.
    in_step = "SLURM_STEP_NUM_TASKS" in environment
    cpus = int(environment.get("SLURM_CPUS_PER_TASK", "0")) if in_step else 0
    return Launch(
        launcher="torchrun",
        rank=int(environment["RANK"]),
        local_rank=int(environment["LOCAL_RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_world_size=local_world_size,
        node_rank=int(environment.get("GROUP_RANK", "0")),
        master_addr=_without_brackets(environment["MASTER_ADDR"]),
        master_port=int(environment["MASTER_PORT"]),
        is_store_host=environment["RANK"] == "0"
        and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        cpus_per_task=max(1, cpus // local_world_size) if cpus else None,
        job_id=_slurm_job_id(environment) or _torchrun_job_id(environment),
        by_hand="TORCHELASTIC_RUN_ID" not in environment,
    )


def _read_srun(environment: Mapping[str, str]) -> Launch:
    world_size = int(environment["SLURM_STEP_NUM_TASKS"])
    node_rank = int(environment["SLURM_NODEID"])
    local_world_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node_rank]
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # The numbers of job and step keep two jobs on one node from using the same port.
    unique = int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    return Launch(
        launcher="srun",
        rank=int(environment["SLURM_PROCID"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        # The name of a single node need not resolve.
        master_addr=_without_brackets(environment.get("MASTER_ADDR"))
        or ("127.0.0.1" if local_world_size == world_size else first_host(hosts)),
        master_port=int(environment.get("MASTER_PORT") or _FIRST_PORT + unique % _PORTS),
        is_store_host=environment["SLURM_PROCID"] == "0",
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "0")) or None,
        job_id=_slurm_job_id(environment),
    )


def _without_brackets(address: str | None) -> str:
    """Return an address without the brackets of IPv6 addresses, which resolvers refuse."""
    return re.sub(r"^\[(.*)\]$", r"\1", address or "")


def _slurm_job_id(environment: Mapping[str, str]) -> str | None:
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"slurm-{array}-{task}"
    return f"slurm-{environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else None


def _torchrun_job_id(environment: Mapping[str, str]) -> str | None:
    """Return a job id from torchrun's run id, which is one per launch and kept over restarts.

    Without `--rdzv-id` most launches have the same one, "none": then torchrun's process, which is
    this one's parent, identifies the launch. None if the ranks were started by hand.
    """
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    if run_id == "none":
        run_id = f"{_parent}-{process_start_time(_parent)}"
    with contextlib.suppress(ValueError):  # generated by torchrun: the start is enough
        run_id = uuid.UUID(run_id).hex[:8]
    return "torchrun-" + re.sub(r"[^\w.-]", "-", run_id)


def first_host(nodelist: str) -> str:
    """Return the first name of a Slurm node list: `gpu[03-07,9]-ib,x1` gives `gpu03-ib`."""
    depth, end = 0, len(nodelist)
    for position, character in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist[:end])


def tasks_per_node(counts: str) -> list[int]:
    """Expand SLURM_STEP_TASKS_PER_NODE: `2(x3),1` gives [2, 2, 2, 1]."""
    expanded: list[int] = []
    for part in counts.split(","):
        count, _, repeat = part.partition("(x")
        expanded += [int(count)] * int(repeat.rstrip(")") or "1")
    return expanded
