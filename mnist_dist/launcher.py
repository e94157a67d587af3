"""The process that started this one: nobody outlives it.

Imported before torch, whose import takes seconds in which the launcher may die already.
"""

import os
import sys
import threading
import time
from pathlib import Path

_PERIOD_S = 0.5
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
