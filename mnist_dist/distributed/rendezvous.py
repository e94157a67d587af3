"""Meet the other processes of this start of the job, and only them.

Torchrun keeps one store alive over its restarts and hands it to every generation of workers. What
a dead generation wrote there, such as gloo's addresses, is found by the next one, which then tries
to connect to the dead: most restarts fail so (measured with torch 2.13). Here rank 0 opens a fresh
corner of the store for each generation, and nobody is let in by an old one's notes.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from mnist_dist.distributed.network import require_free, wait_until_reachable
from mnist_dist.errors import MeetingError

_CURRENT = "mnist-dist/generation"
_POLL_S = 0.02


def meet(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    hosts_store: bool,
    timeout: float,
    notify: Callable[[str], None] = lambda line: None,
    flag: str = "--setup-timeout",
) -> Store:
    """A store that exactly the `world_size` processes of this generation share.

    Args:
        rank: of this process.
        world_size: how many are expected.
        address: host of the store.
        port: its TCP port.
        hosts_store: this process is to host the store; otherwise somebody else does.
        timeout: seconds until this gives up.
        notify: is told, once, why the store cannot be reached yet.
        flag: the user's name for `timeout`.

    Raises:
        MeetingError: the store cannot be reached, or the ranks it names did not come in time.
    """
    deadline = time.monotonic() + timeout
    if hosts_store:
        require_free(address, port)
    else:
        wait_until_reachable(address, port, deadline, notify)
    shared = _open(address, port, hosts_store, deadline)
    where = f"{address}:{port}"
    advice = f"or raise {flag}"
    if rank == 0:
        return _convene(shared, world_size, where, deadline, advice)
    return _attend(shared, rank, where, deadline, advice)


def _open(address: str, port: int, hosts_store: bool, deadline: float) -> Store:
    """The store that all generations share, at its host or as its client."""
    opened: list[Store | RuntimeError] = []

    def open_it() -> None:
        try:
            store = TCPStore(
                # The host of the store may know itself by its name as something else.
                "localhost" if hosts_store else address,
                port,
                is_master=hosts_store,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            )
            opened.append(store)
        except RuntimeError as error:
            opened.append(error)

    # A thread, because a client waits for ever for the answer of a program that gives none.
    opening = threading.Thread(target=open_it, daemon=True)
    opening.start()
    opening.join(max(1.0, deadline - time.monotonic()) + 1)
    if not opened:
        raise MeetingError(
            f"the meeting point {address}:{port} is open but silent: another program listens "
            "there; choose another port"
        )
    if isinstance(opened[0], RuntimeError):
        reason = str(opened[0]).splitlines()[0]
        raise MeetingError(f"cannot open the meeting point {address}:{port}: {reason}") from opened[
            0
        ]
    return opened[0]


def _convene(shared: Store, world_size: int, where: str, deadline: float, advice: str) -> Store:
    """Rank 0: open a generation, wait for everybody's mark, confirm the marks."""
    generation = uuid.uuid4().hex
    corner = PrefixStore(generation, shared)
    corner.set("present/0", generation)
    shared.set(_CURRENT, generation)
    keys = [f"present/{rank}" for rank in range(world_size)]
    while not corner.check(keys):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not corner.check([key])]
            raise MeetingError(
                f"rank(s) {', '.join(map(str, missing))} of {world_size} did not come to the "
                f"meeting point {where} in time; see what they say, {advice}"
            )
        time.sleep(_POLL_S)
    corner.set("go", json.dumps([corner.get(key).decode() for key in keys]))
    return corner


def _attend(shared: Store, rank: int, where: str, deadline: float, advice: str) -> Store:
    """Other ranks: leave a mark in the current generation until it is confirmed.

    The current generation may be a dead one's for a moment: its confirmation has other marks.
    """
    mark = uuid.uuid4().hex
    marked = None
    while time.monotonic() < deadline:
        if shared.check([_CURRENT]):
            generation = shared.get(_CURRENT).decode()
            corner = PrefixStore(generation, shared)
            if generation != marked and not corner.check(["go"]):
                corner.set(f"present/{rank}", mark)
                marked = generation
            if generation == marked and corner.check(["go"]):
                marks = json.loads(corner.get("go"))
                if marks[rank : rank + 1] == [mark]:
                    return corner
        time.sleep(_POLL_S)
    raise MeetingError(
        f"rank {rank}: rank 0 did not open the meeting at {where} in time; see what rank 0 says, "
        f"{advice}"
    )
