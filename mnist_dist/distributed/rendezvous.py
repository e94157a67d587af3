"""Connect the processes of one generation of the job, and no others.

Torchrun keeps one store alive over its restarts and hands it to every generation of workers. What
a dead generation wrote there, such as gloo's addresses, is found by the next one, which then tries
to connect to the dead: most restarts fail so (measured with torch 2.13). Here rank 0 opens a new
part of the store for each generation, its generation store, and confirms the processes in it.
"""

import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from mnist_dist.distributed.failures import format_ranks
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.network import require_free, wait_until_reachable
from mnist_dist.distributed.store import StoreMailbox
from mnist_dist.errors import RendezvousError

_POLL_S = 0.02


def rendezvous(
    launch: Launch,
    timeout: float,
    notify: Callable[[str], None] = lambda line: None,
    flag: str = "--setup-timeout",
) -> Store:
    """Return a store that exactly the processes of this generation share.

    Args:
        launch: this process's rank, the world size, and where the shared store is.
        timeout: seconds until this gives up.
        notify: called once, with the reason, if the store stays unreachable for a while.
        flag: the user's name for `timeout`.

    Raises:
        RendezvousError: the store is unreachable, or the ranks it names did not arrive in time.
    """
    deadline = time.monotonic() + timeout
    address, port = launch.master_addr or "", launch.master_port or 0
    if launch.is_store_host:
        require_free(address, port)
    else:
        wait_until_reachable(address, port, deadline, notify)
    shared = _open(address, port, launch.is_store_host, deadline)
    where = f"{address}:{port}"
    if launch.rank == 0:
        return _host(shared, launch.world_size, where, deadline, flag)
    return _join(shared, launch.rank, where, deadline, flag)


def _open(address: str, port: int, is_store_host: bool, deadline: float) -> Store:
    """Open the store that all generations share, as its host or as a client."""
    opened: list[Store | RuntimeError] = []

    def open_store() -> None:
        try:
            store = TCPStore(
                # The host of the store may resolve its own name to another address.
                "localhost" if is_store_host else address,
                port,
                is_master=is_store_host,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            )
            opened.append(store)
        except RuntimeError as error:
            opened.append(error)

    # A thread, because a client waits forever for the answer of a program that gives none.
    opening = threading.Thread(target=open_store, daemon=True)
    opening.start()
    opening.join(max(1.0, deadline - time.monotonic()) + 1)
    if not opened:
        raise RendezvousError(
            f"the rendezvous endpoint {address}:{port} accepts connections but does not respond: "
            "another program is listening there; choose another port"
        )
    if isinstance(opened[0], RuntimeError):
        reason = str(opened[0]).splitlines()[0]
        raise RendezvousError(
            f"cannot open the rendezvous endpoint {address}:{port}: {reason}"
        ) from opened[0]
    return opened[0]


def _host(shared: Store, world_size: int, where: str, deadline: float, flag: str) -> Store:
    """Open a generation as rank 0, wait for every rank's token, and confirm the tokens."""
    generation = uuid.uuid4().hex
    generation_store = PrefixStore(generation, shared)
    mailbox = StoreMailbox(generation_store, "rendezvous")
    mailbox.publish("token/0", generation)
    _current(shared).publish("generation", generation)
    tokens = mailbox.collect([f"token/{rank}" for rank in range(world_size)], deadline)
    if missing := [rank for rank, token in enumerate(tokens) if token is None]:
        raise RendezvousError(
            f"{format_ranks(missing)} of {world_size} did not reach the rendezvous endpoint "
            f"{where} in time; see their output, or raise {flag}"
        )
    mailbox.publish("confirmed", tokens)
    return generation_store


def _join(shared: Store, rank: int, where: str, deadline: float, flag: str) -> Store:
    """Leave a token in the current generation as another rank, until rank 0 confirms it.

    For a moment the current generation may be a dead one: what was confirmed there is another
    process's token.
    """
    token, joined = uuid.uuid4().hex, None
    while time.monotonic() < deadline:
        if generation := _current(shared).read("generation"):
            generation_store = PrefixStore(generation, shared)
            mailbox = StoreMailbox(generation_store, "rendezvous")
            confirmed = mailbox.read("confirmed")
            if confirmed is None and generation != joined:
                mailbox.publish(f"token/{rank}", token)
                joined = generation
            elif confirmed is not None and confirmed[rank : rank + 1] == [token]:
                return generation_store
        time.sleep(_POLL_S)
    raise RendezvousError(
        f"rank {rank}: rank 0 did not open the rendezvous at {where} in time; see its output, "
        f"or raise {flag}"
    )


def _current(shared: Store) -> StoreMailbox:
    return StoreMailbox(shared, "mnist-dist")
