"""The program that started this process: what it says of our place, and that nobody outlives it.

The only module that reads the launcher's environment variables. Imported before torch, whose import
takes seconds in which the launcher may die already.
"""

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_dist.errors import UserError

_PERIOD_S = 0.5
# Ports below Linux' ephemeral range (32768 and up), so that no outgoing connection holds them.
_FIRST_PORT, _PORTS = 15_000, 17_000
_parent = os.getppid()


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def leave_with_launcher(rank: int) -> None:
    """From now on, end this process within a second of its launcher's end, even by `kill -9`.

    Otherwise it would go on for ever, holding its GPU and the run. It is a thread, so it also works
    while the process waits for a collective; a checkpoint being written is abandoned, unharmed.
    """

    def watch() -> None:
        while os.getppid() == _parent and not _was_orphaned():
            time.sleep(_PERIOD_S)
        try:
            print(f"mnist-dist: rank {rank}: the launcher is gone, leaving", file=sys.stderr)
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _was_orphaned() -> bool:
    """Whether the launcher died before this module was imported, which left us to process 1.

    In a container process 1 may be the launcher itself: then it is a Python program too.
    """
    if _parent != 1:
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:  # not on Linux, where this cannot be told
        return False


@dataclass(frozen=True)
class Launch:
    """This process's place in the job, as its launcher tells it."""

    launcher: Literal["torchrun", "srun", "alone"]
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    hosts_store: bool = False
    """Whether this process must host the ranks' store itself."""
    cpus_per_task: int | None = None
    """CPUs that Slurm gave to this process; None if nobody says."""
    job_id: str | None = None
    """Names the job, the same after a torchrun restart or a Slurm requeue; None if nothing does."""

    @property
    def spans_hosts(self) -> bool:
        """Whether some ranks are on other hosts than this one, as far as can be told."""
        return self.local_world_size < self.world_size and not re.match(
            r"localhost$|127\.|::1$", self.master_addr or ""
        )

    @property
    def program(self) -> str:
        """What starts as many processes here again, typed before the script; "" if only Slurm, or
        somebody on several hosts, can."""
        if self.launcher == "alone":
            return "python"
        several_hosts = self.local_world_size < self.world_size
        if self.launcher == "srun" or several_hosts:
            return ""
        return f"torchrun --nproc_per_node={self.world_size}"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables: torchrun's, else those of an srun step, else alone.

    Raises:
        UserError: the launcher set some of its variables but not all, or not to numbers.
    """
    try:
        if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")):
            return _read_torchrun(environment)
        # SLURM_NTASKS is also set in a batch script, where nobody starts the other tasks; only
        # srun sets the step's own count.
        if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
            return _read_srun(environment)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete ({error}); start with torchrun, srun or "
            "plain python"
        ) from error
    return Launch(launcher="alone", job_id=_slurm_job_id(environment))


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
        master_addr=environment["MASTER_ADDR"],
        master_port=int(environment["MASTER_PORT"]),
        hosts_store=environment["RANK"] == "0"
        and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        cpus_per_task=max(1, cpus // local_world_size) if cpus else None,
        job_id=_slurm_job_id(environment) or _torchrun_job_id(environment),
    )


def _read_srun(environment: Mapping[str, str]) -> Launch:
    world_size = int(environment["SLURM_STEP_NUM_TASKS"])
    node_rank = int(environment["SLURM_NODEID"])
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # The job's number, and the step's, keep two jobs on one host from asking for one port.
    unique = int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    return Launch(
        launcher="srun",
        rank=int(environment["SLURM_PROCID"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        world_size=world_size,
        local_world_size=tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node_rank],
        node_rank=node_rank,
        master_addr=environment.get("MASTER_ADDR") or first_host(hosts),
        master_port=int(environment.get("MASTER_PORT") or _FIRST_PORT + unique % _PORTS),
        hosts_store=environment["SLURM_PROCID"] == "0",
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", "0")) or None,
        job_id=_slurm_job_id(environment),
    )


def _slurm_job_id(environment: Mapping[str, str]) -> str | None:
    if "SLURM_ARRAY_JOB_ID" in environment:
        array, task = environment["SLURM_ARRAY_JOB_ID"], environment["SLURM_ARRAY_TASK_ID"]
        return f"slurm-{array}-{task}"
    return f"slurm-{environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else None


def _torchrun_job_id(environment: Mapping[str, str]) -> str | None:
    """Torchrun's run id, one per launch and kept over its restarts, unless the user left it out.

    Rendezvous backends without an id call every launch "none", which names nothing.
    """
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if run_id == "none":
        return None
    with contextlib.suppress(ValueError):  # torchrun made it up: the start is enough
        run_id = uuid.UUID(run_id).hex[:8]
    return "torchrun-" + re.sub(r"[^\w.-]", "-", run_id)


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `gpu[03-07,9]-ib,x1` gives `gpu03-ib`."""
    depth, end = 0, len(nodelist)
    for position, character in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist[:end])


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's SLURM_STEP_TASKS_PER_NODE, written out: `2(x3),1` gives [2, 2, 2, 1]."""
    expanded: list[int] = []
    for part in counts.split(","):
        count, _, repeat = part.partition("(x")
        expanded += [int(count)] * int(repeat.rstrip(")") or "1")
    return expanded
