"""Why did we end? A board in the ranks' store, on which each says what became of it.

When one process dies, all others see the same thing: a connection that closed, or no answer. On
the board those that are left find the cause, if its rank could still post one, or who is missing.
"""

import contextlib
import re
import threading
import time
from dataclasses import dataclass

import torch
from torch.distributed import DistError, PrefixStore, Store

# Gloo's and NCCL's failures arrive as plain RuntimeErrors, out of backward() too.
_LOST_CONTACT = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Timed out|timed out|Broken pipe|recvValue|socket",
    re.IGNORECASE,
)
# How long a survivor waits for the others' notes: they find out within moments of each other.
_NOTES_S = 3.0
# Longer than the watch of `leave_with_launcher` sleeps.
_LAUNCHER_S = 0.6
_NO_STORE = "the other ranks, and the host of their meeting point, cannot be reached from here"


class LostContactError(Exception):
    """Another process is gone. The cause has been said; what is left is to end, at once."""


def lost_contact(error: BaseException) -> bool:
    """Whether `error` only says that another process did not answer."""
    if isinstance(error, (DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONTACT.search(str(error)))


def describe(error: BaseException) -> str:
    """What failed, in one line, with the remedy where there is a usual one."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if isinstance(error, torch.OutOfMemoryError):
        text += " Lower --global-batch-size, or start more processes on more GPUs."
    return text


def brief(error: BaseException) -> str:
    """What a backend's error says, without the source position before and the advice behind it."""
    text = re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", str(error).splitlines()[0])
    return text.partition(". This is")[0]


@dataclass(frozen=True)
class Board:
    """The notes of one generation of ranks."""

    store: Store
    rank: int
    world_size: int

    def post(self, cause: str) -> None:
        """Say why this rank ends, before it does. Does nothing if the store is gone too."""
        self._note("cause", cause)

    def find_cause(self) -> str:
        """Why this rank lost contact, in one line: another rank's own words, or who is missing."""
        # A thread, because the store's client waits for an answer for ever: its host may be gone.
        found: list[str] = []
        search = threading.Thread(target=lambda: found.append(self._search()), daemon=True)
        search.start()
        search.join(_LAUNCHER_S + 2 * _NOTES_S)
        return found[0] if found else _NO_STORE

    def _search(self) -> str:
        # If it is the launcher that is gone, its store is too, and the watch ends us meanwhile.
        time.sleep(_LAUNCHER_S)
        self._note("lost", "")
        deadline = time.monotonic() + _NOTES_S
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while time.monotonic() < deadline:
            causes = {rank: cause for rank in others if (cause := self._read("cause", rank))}
            if causes:
                return "; ".join(f"rank {rank} failed: {cause}" for rank, cause in causes.items())
            if all(self._read("lost", rank) is not None for rank in others):
                return "all ranks lost contact with each other: the network between them is cut"
            time.sleep(0.05)
        missing = [rank for rank in others if self._read("lost", rank) is None]
        names = ", ".join(map(str, missing))
        return f"rank(s) {names} gave no sign: killed, stopped, or their host cannot be reached"

    def _corner(self, kind: str) -> Store:
        return PrefixStore(f"failures/{kind}", self.store)

    def _note(self, kind: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._corner(kind).set(str(self.rank), text)

    def _read(self, kind: str, rank: int) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._corner(kind).check([str(rank)]):
                return self._corner(kind).get(str(rank)).decode()
        return None
