"""One process of a job, from its launcher to its exit code."""

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

# Before torch, which takes seconds to import: records the parent process to exit with.
from mnist_dist.distributed.launcher import (  # isort: skip
    Launch,
    exit_with_parent,
    read_launch,
    refuse_mpirun,
    set_interrupts_fatal,
)

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import errors as elastic_errors

from mnist_dist.distributed.failures import PeerLostError, wait_until_printed
from mnist_dist.distributed.process_group import leave_process_group
from mnist_dist.errors import (
    NodeError,
    RendezvousError,
    ReportedError,
    prepare_streams,
    print_line,
)
from mnist_dist.torch_internals import default_store

# How long a rank with an error of its own waits for rank 0 to print it.
_PATIENCE_S = 20.0


def run_rank(work: Callable[[Launch], int | None]) -> int:
    """Run this process's part of a job and return its exit code. Bugs are raised.

    Args:
        work: given the launcher's environment, parses flags, joins the process group and works;
            returns the exit code if it is not 0.
    """
    return _run_rank(work) or 0  # None after --help


@elastic_errors.record
def _run_rank(work: Callable[[Launch], int | None]) -> int:
    launch = Launch("none")
    set_interrupts_fatal(False)  # torch is imported now
    try:
        launch = read_launch()
        refuse_mpirun(launch)
        if launch.launcher != "none":
            exit_with_parent(launch.rank)
        return work(launch) or 0
    except ReportedError as error:
        return exit_with_error(launch, error)
    except PeerLostError as error:
        print_line(f"rank {launch.rank} ends: {error}")
        hard_exit(1)
    except KeyboardInterrupt:  # before training, which handles the signal itself and saves
        hard_exit(130)


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run `main` as a process of its own: a bug prints its traceback, and the process exits."""
    prepare_streams()
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        hard_exit(1)
    atexit._run_exitfuncs()
    hard_exit(code)


def exit_with_error(launch: Launch, error: ReportedError) -> int:
    """Print the error once, from rank 0, and return its exit code on every rank.

    Torchrun and `srun -K` stop all ranks as soon as one exits, so a rank that exits before rank 0
    has printed would silence it. Within a process group, where every rank has the error, they wait
    for a note in its store, as after an error that reached all of them through another store;
    otherwise each rank found the error alone and waits to be stopped.
    """
    is_of_node = isinstance(error, (RendezvousError, NodeError)) and error.store is None
    prints = launch.rank == 0 or (is_of_node and launch.local_rank == 0)
    if prints:
        print_line(f"{error.kind}: {error}")
    if error.store is not None:
        wait_until_printed(error.store, launch.rank, launch.world_size)
    elif dist.is_initialized() and not is_of_node:
        wait_until_printed(default_store(), launch.rank, launch.world_size)
        leave_process_group()
    elif not prints and launch.launcher != "none":
        launcher, deadline = os.getppid(), time.monotonic() + _PATIENCE_S
        while os.getppid() == launcher and time.monotonic() < deadline:
            time.sleep(0.05)
    return error.exit_code


def hard_exit(code: int) -> NoReturn:
    """Exit at once, without the interpreter's shutdown.

    Shutdown would stop NCCL's and gloo's threads, which may wait for dead peers forever, and which
    occasionally abort the process even after a good run (seen with torch 2.13 on a busy machine).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, full, or None
            stream.flush()
    os._exit(code)
