"""Share failure causes between ranks through the store.

When one process dies, all others see the same symptom: a closed connection, or no answer. The
store holds the cause, if the failed rank could still publish one, and shows which rank is missing.
"""

import contextlib
import re
import threading
import time
from collections.abc import Collection, Iterable

import torch
from torch.distributed import DistError, Store

from mnist_dist.distributed.store import StoreMailbox

# Gloo's and NCCL's failures arrive as plain RuntimeErrors, out of backward() too.
_COMM_ERROR = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Timed out|timed out|Broken pipe|recvValue|socket",
    re.IGNORECASE,
)
# How long a survivor waits for the other ranks: they notice within moments of each other.
_SEARCH_S = 3.0
# Longer than the poll interval of `exit_with_parent`.
_LAUNCHER_S = 0.6
_PRINTED_S = 20.0
_READ_S = 2.0
_NO_STORE = "the rendezvous endpoint did not respond: rank 0 or its node is down or unreachable"


class PeerLostError(Exception):
    """Another process is gone; the text names it and the cause. This process must exit at once."""


class PeerFailedError(PeerLostError):
    """Another process failed and published why: the same command would fail again."""


def is_comm_error(error: BaseException) -> bool:
    """Return whether `error` only means that another process did not respond."""
    if isinstance(error, (DistError, ConnectionError)):
        return True
    text = str(error)
    # "CUDA error: the launch timed out" is this rank's own.
    own = text.startswith("CUDA error")
    return isinstance(error, RuntimeError) and not own and bool(_COMM_ERROR.search(text))


def describe(error: BaseException) -> str:
    """Format `error` as one line, with the remedy where there is a usual one."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if isinstance(error, torch.OutOfMemoryError):
        text += " Lower --global-batch-size, or start more processes on more GPUs."
    return text


def brief(error: BaseException) -> str:
    """Return a backend's message without its source position and its generic advice."""
    text = re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", str(error).splitlines()[0])
    return text.partition(". This is")[0]


def format_ranks(ranks: Collection[int]) -> str:
    """Format rank numbers: `rank 1`, `ranks 0-3, 6`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {format_ranges(ranks)}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Format numbers in order, consecutive ones as a range: `0-3, 6`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


class FailureStore:
    """The failure causes of one generation of ranks."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Use the `store` of the `world_size` ranks, of which this process is `rank`."""
        self.rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._mailbox = StoreMailbox(store, "failures")

    def publish(self, cause: str) -> None:
        """Publish why this rank fails. Does nothing if the store is gone too."""
        with contextlib.suppress(RuntimeError):
            self._mailbox.publish(f"cause/{self.rank}", cause)

    def watch_for_causes(self) -> threading.Event:
        """Return an event that is set once another rank has published why it fails."""
        found = threading.Event()

        def watch() -> None:  # in a thread, since the store may not respond
            with contextlib.suppress(RuntimeError):
                while not self._read_from_others("cause"):
                    time.sleep(0.2)
                found.set()

        threading.Thread(target=watch, name="failures", daemon=True).start()
        return found

    def find_cause(self) -> PeerLostError:
        """Return the error with one line on why peers are gone: their causes, or who is missing."""
        # A thread, because the store's client blocks for as long as the host does not respond.
        found: list[PeerLostError] = []
        search = threading.Thread(target=lambda: found.append(self._search()), daemon=True)
        search.start()
        search.join(_LAUNCHER_S + 2 * _SEARCH_S)
        return found[0] if found else PeerLostError(_NO_STORE)

    def _search(self) -> PeerLostError:
        # If the launcher died, its store is gone, and `exit_with_parent` ends this process now.
        time.sleep(_LAUNCHER_S)
        deadline = time.monotonic() + _SEARCH_S
        missing = self._others
        try:
            self._mailbox.publish(f"lost/{self.rank}", True)
            while missing and time.monotonic() < deadline:
                if causes := self._read_from_others("cause"):
                    texts = [f"rank {rank} failed: {text}" for rank, text in causes.items()]
                    return PeerFailedError("; ".join(texts))
                lost = self._read_from_others("lost")
                missing = [rank for rank in self._others if rank not in lost]
                time.sleep(0.05)
        except RuntimeError:
            return PeerLostError(_NO_STORE)
        if not missing:
            return PeerLostError(
                "all ranks lost their connections: the network between their nodes failed"
            )
        it_was, its = ("it was", "its") if len(missing) == 1 else ("they were", "their")
        return PeerLostError(
            f"{format_ranks(missing)} did not respond: {it_was} killed or stopped, or {its} node "
            "is unreachable"
        )

    def _read_from_others(self, kind: str) -> dict[int, str]:
        payloads = {rank: self._mailbox.read(f"{kind}/{rank}") for rank in self._others}
        return {rank: payload for rank, payload in payloads.items() if payload is not None}


def wait_until_printed(store: Store, rank: int, world_size: int) -> None:
    """Wait until rank 0, which prints an error before it calls this, has called it too.

    Returns after 20 s at the latest. Rank 0, which may host the store, briefly waits for the others
    in return: a rank that loses the store prints forty lines of C++.
    """
    mailbox = StoreMailbox(store, "errors")
    with contextlib.suppress(RuntimeError):
        if rank == 0:
            mailbox.publish("printed", True)
            others = [f"read/{rank}" for rank in range(1, world_size)]
            mailbox.collect(others, time.monotonic() + _READ_S)
        else:
            mailbox.wait_for("printed", time.monotonic() + _PRINTED_S)
            mailbox.publish(f"read/{rank}", True)
