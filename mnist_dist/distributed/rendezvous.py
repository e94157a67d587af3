"""Connect the processes of one generation of the job, and no others.

Torchrun keeps one store alive over its restarts and hands it to every generation of workers. What
a dead generation wrote there, such as gloo's addresses, is found by the next one, which then tries
to connect to dead processes. Most restarts fail this way (measured with torch 2.13). Here rank 0
opens a new part of the store for each generation, its generation store, and confirms the processes
in it.
"""

import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from mnist_dist.distributed.failures import brief, format_ranks
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.network import refuse_digits, require_free, wait_until_reachable
from mnist_dist.distributed.store import StoreMailbox
from mnist_dist.errors import NodeError, RendezvousError, ReportedError, UserError

_POLL_S = 0.02
_LEAVE_S = 2.0
_NOTICE_S = 10.0


def rendezvous(
    launch: Launch,
    timeout: float,
    notify: Callable[[str], None] = lambda line: None,
    flag: str = "--setup-timeout",
) -> Store:
    """Return a store that exactly the processes of this generation share.

    Args:
        launch: this process's rank, the world size, and where the shared store is.
        timeout: in seconds; `flag` is the user's name for it.
        notify: called once, with the reason, if the store stays unreachable for a while.

    Raises:
        RendezvousError: the store is unreachable, or the ranks it names did not arrive in time.
    """
    deadline = time.monotonic() + timeout
    address, port = launch.master_addr or "", launch.master_port or 0
    if launch.spans_nodes:
        refuse_digits(address)
    if launch.is_store_host:
        require_free(address, port)
    else:
        hint = f"; {launch.missing_ranks_hint}" if launch.by_hand else ""
        wait_until_reachable(address, port, deadline, lambda line: notify(line + hint))
    shared = _open(address, port, launch.is_store_host, deadline)
    host_or_join = _host if launch.rank == 0 else _join
    try:
        return host_or_join(shared, launch, deadline, notify)
    except TimeoutError as error:
        raise RendezvousError(f"{error}, or raise {flag}") from error


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


def _host(shared: Store, launch: Launch, deadline: float, notify: Callable[[str], None]) -> Store:
    """Open a generation as rank 0, wait for every rank's token, and confirm the tokens."""
    generation, world_size = uuid.uuid4().hex, launch.world_size
    generation_store = PrefixStore(generation, shared)
    mailbox = StoreMailbox(generation_store, "rendezvous")
    mailbox.publish("token/0", generation)
    _current(shared).publish("generation", generation)
    keys = [f"token/{rank}" for rank in range(world_size)]
    for until in (min(deadline, time.monotonic() + _NOTICE_S), deadline):
        tokens = mailbox.collect(keys, until)
        ranks = [rank for rank, token in enumerate(tokens) if token is None]
        if ranks and until < deadline:
            notify(_waiting_for(ranks, launch))
    if ranks:
        raise TimeoutError(
            f"{format_ranks(ranks)} of {world_size} did not reach the rendezvous endpoint "
            f"{launch.endpoint} in time; see their output ({launch.missing_ranks_hint})"
        )
    mailbox.publish("confirmed", tokens)
    return generation_store


def _join(shared: Store, launch: Launch, deadline: float, notify: Callable[[str], None]) -> Store:
    """Leave a token in the current generation as another rank, until rank 0 confirms it.

    The current generation may briefly be a dead one, in which another process's token was
    confirmed.
    """
    rank, token, joined = launch.rank, uuid.uuid4().hex, None
    notice = time.monotonic() + _NOTICE_S
    while (now := time.monotonic()) < deadline:
        if generation := _current(shared).read("generation"):
            generation_store = PrefixStore(generation, shared)
            mailbox = StoreMailbox(generation_store, "rendezvous")
            confirmed = mailbox.read("confirmed")
            if confirmed is None and generation != joined:
                mailbox.publish(f"token/{rank}", token)
                joined = generation
            elif confirmed is not None and confirmed[rank : rank + 1] == [token]:
                return generation_store
        if joined is None and now > notice:  # else rank 0 knows who is missing
            notify(_waiting_for([0], launch))
            notice = deadline
        time.sleep(_POLL_S)
    raise TimeoutError(
        f"rank {rank}: rank 0 did not open the rendezvous at {launch.endpoint} in time; see its "
        "output"
    )


def _waiting_for(ranks: Collection[int], launch: Launch) -> str:
    return (
        f"rank {launch.rank} on {socket.gethostname()} is waiting for {format_ranks(ranks)} of "
        f"{launch.world_size}: {launch.missing_ranks_hint}"
    )


def _current(shared: Store) -> StoreMailbox:
    return StoreMailbox(shared, "mnist-dist")


def connect_ranks(
    connect: Callable[[], None], launch: Launch, store: Store, timeout: float
) -> None:
    """Run `connect`, by which the ranks form their process group, and end it on all if one fails.

    It runs in a thread, since a backend may wait far longer than it should for a peer that failed,
    or for addresses that lead nowhere.

    Raises:
        NodeError: on all ranks, if `connect` raised a UserError on one; the text names the rank.
        RendezvousError: on all ranks, if it raised another error or took too long.
    """
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            connect()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    threading.Thread(target=run, name="connect", daemon=True).start()
    # A connection of its own: while gloo waits for a peer, no other call of the same one returns.
    own: Store = store.clone()  # type: ignore[attr-defined]
    mailbox = StoreMailbox(own, "group")
    deadline = time.monotonic() + timeout
    keys, formed = [f"formed/{rank}" for rank in range(launch.world_size)], False
    try:
        while True:
            if failure := mailbox.read("failure"):
                code, text = failure
                _leave_together(mailbox, launch)
                kind = NodeError if code == NodeError.exit_code else RendezvousError
                shared: ReportedError = kind(text)
                shared.store = own
                raise shared
            if outcome and outcome[0] is None:
                if not formed:
                    mailbox.publish(keys[launch.rank], formed := True)
                if None not in mailbox.collect(keys, time.monotonic() + _POLL_S):
                    return
            elif outcome or time.monotonic() > deadline:
                mailbox.publish("failure", _describe_failure(launch, outcome, timeout))
            else:
                time.sleep(_POLL_S / 4)
    except RuntimeError as error:
        raise RendezvousError(
            f"rank {launch.rank} lost the rendezvous endpoint while the ranks connected "
            f"({brief(error)}); see rank 0's output"
        ) from error


def _leave_together(mailbox: StoreMailbox, launch: Launch) -> None:
    """Keep rank 0, which may host the store, until every rank has read the failure."""
    keys = [f"left/{rank}" for rank in range(launch.world_size)]
    mailbox.publish(keys[launch.rank], True)
    if launch.rank == 0:
        mailbox.collect(keys, time.monotonic() + _LEAVE_S)


def _describe_failure(
    launch: Launch, outcome: Sequence[Exception | None], timeout: float
) -> tuple[int, str]:
    """Return the exit code and the text for the ranks of a group that could not be formed."""
    error = outcome[0] if outcome else None
    place = f"rank {launch.rank} on {socket.gethostname()}"
    if isinstance(error, UserError):
        several = launch.local_world_size < launch.world_size
        return NodeError.exit_code, f"{place}: {error}" if several else str(error)
    reason = brief(error) if error else f"no connection within {timeout:g} s"
    return RendezvousError.exit_code, (
        f"the ranks could not connect to each other ({place}: {reason}); run `mnist-dist "
        "doctor` in place of the job to find which ranks, and select the interface with "
        "GLOO_SOCKET_IFNAME"
    )
