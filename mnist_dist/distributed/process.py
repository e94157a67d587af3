"""One process of a job, from its launcher to its exit code."""

import atexit
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

# Before torch, whose import takes seconds: it notes the parent that we are to end with.
from mnist_dist.distributed.launcher import Launch, exit_with_parent, read_launch  # isort: skip

from torch.distributed.elastic.multiprocessing import errors as elastic_errors

from mnist_dist.distributed.failures import PeerLostError
from mnist_dist.distributed.world import exit_with_error, leave
from mnist_dist.errors import ReportedError


def attempt(work: Callable[[Launch], None]) -> int:
    """Do this process's part of a job; returns its exit code. A bug is raised.

    Args:
        work: given the launcher's word, parses flags, joins the world and does the work.
    """
    return _attempt(work) or 0  # None after --help


@elastic_errors.record
def _attempt(work: Callable[[Launch], None]) -> int:
    launch = Launch("none")
    try:
        launch = read_launch()
        if launch.launcher != "none":
            exit_with_parent(launch.rank)
        work(launch)
    except ReportedError as error:
        return exit_with_error(launch, error)
    except PeerLostError as error:
        # In one go: print ends a line by a second write, and other ranks say this at the same time.
        sys.stderr.write(f"mnist-dist: rank {launch.rank} ends: {error}\n")
        leave(1)
    except KeyboardInterrupt:  # while training runs, it listens itself, and saves
        leave(130)
    return 0


def run(main: Callable[[], int]) -> NoReturn:
    """`main` as a process of its own: a bug has its traceback, and the process really ends."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        leave(1)
    atexit._run_exitfuncs()
    leave(code)
