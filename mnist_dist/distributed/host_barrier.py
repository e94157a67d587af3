"""A barrier between the processes of one host, cheap enough for every step.

Each rank has a counter in the kernel, an eventfd, to which the others add when they come, and a
socket to each of them, on which nothing is said: a rank that dies closes it, which wakes the others
at once. Neither has a name in a file system, so nothing is left behind however they end.
"""

import array
import contextlib
import os
import select
import socket
import struct
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from mnist_dist.distributed.world import World

T = TypeVar("T")
# Ranks in step come within so many; who is waited for longer is slept for.
_POLLS = 100


class HostBarrier:
    """Where the ranks of a host wait until all have come."""

    def __init__(self, world: World, timeout: float) -> None:
        """Connect the ranks; every rank of `world` must take part.

        Args:
            world: at least two ranks on each host.
            timeout: seconds that a rank may make the others wait.

        Raises:
            OSError: on every rank, if some could not connect to the others of their host.
        """
        self._timeout = timeout
        self._peers: list[socket.socket] = []
        self._files: list[int] = []
        self._awaited = 0
        rank, ranks = world.launch.local_rank, world.launch.local_world_size
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            token = world.once_per_host(lambda: uuid.uuid4().hex)
            listener = all_or_none(world, lambda: _listen(token, rank, ranks))
            with listener:
                self._peers = all_or_none(world, lambda: _connect(listener, token, rank, ranks))
            self._files = all_or_none(world, self._exchange_counters)
            undo.pop_all()
        self._own, *self._others = self._files
        self._sleepers = select.poll()
        for file in (self._own, *(peer.fileno() for peer in self._peers)):
            self._sleepers.register(file, select.POLLIN)

    def _exchange_counters(self) -> list[int]:
        """This rank's counter and one of each other rank, as open files."""
        own = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for peer in self._peers:
            socket.send_fds(peer, [b"c"], [own])
        return [own, *map(_receive_file, self._peers)]

    def hand_out(self, file: int | None) -> int:
        """The open file of local rank 0, opened on every rank of its host.

        Raises:
            OSError: it did not come.
        """
        if file is None:
            return _receive_file(self._peers[0])
        for peer in self._peers:
            socket.send_fds(peer, [b"f"], [file])
        return file

    def wait(self) -> None:
        """Return when every rank of this host has called this as often as this one has.

        What each wrote to shared memory before, all see after: in the kernel a lock guards a
        counter while it is added to and while it is read.

        Raises:
            ConnectionError: a rank is gone, or made the others wait for too long.
        """
        for other in self._others:
            os.eventfd_write(other, 1)
        # One that is ahead may have added twice before a slower one once. Its second may stand for
        # the other's first: it only went on because the other had come.
        self._awaited += len(self._others)
        for _ in range(_POLLS):  # asking is woken sooner than sleep
            if self._all_came():
                return
            os.sched_yield()  # to whoever else is to run on this core
        self._sleep()

    def _all_came(self) -> bool:
        with contextlib.suppress(BlockingIOError):  # nobody since it was last read
            self._awaited -= os.eventfd_read(self._own)
        return self._awaited <= 0

    def _sleep(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._all_came():
            left = max(0.0, deadline - time.monotonic())
            woken = [file for file, _ in self._sleepers.poll(1000 * left)]
            if self._own in woken:
                continue
            if woken and self._all_came():  # it went, but came here before
                return
            self.close()  # whoever waits for this rank, which comes no more, hears so at once
            cause = "Connection closed by" if woken else "Timed out waiting for"
            raise ConnectionError(f"{cause} a rank of this host")

    def close(self) -> None:
        """Let go of the other ranks."""
        for peer in self._peers:
            peer.close()
        for file in self._files:
            os.close(file)
        self._peers, self._files = [], []


def all_or_none(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank; an OSError on one is an OSError on all."""
    try:
        value, failure = action(), None
    except OSError as error:
        failure = str(error)
    failures = [text for text in world.gather(failure) if text is not None]
    if failures:
        raise OSError(failures[0])
    return value


def _listen(token: str, rank: int, ranks: int) -> socket.socket:
    """Offer this rank to those above it."""
    if not hasattr(os, "eventfd"):
        raise OSError("this system has no eventfd")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0mnist-dist-{token}-{rank}")
    listener.listen(ranks)
    listener.settimeout(10)
    return listener


def _connect(listener: socket.socket, token: str, rank: int, ranks: int) -> list[socket.socket]:
    """A socket to each other rank of this host, in the order of ranks."""
    peers: dict[int, socket.socket] = {}
    for below in range(rank):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(f"\0mnist-dist-{token}-{below}")
        peer.send(array.array("i", [rank]).tobytes())
        peers[below] = peer
    while len(peers) < ranks - 1:
        peer, _ = listener.accept()
        peer.setblocking(True)
        if _owner(peer) != os.getuid():  # abstract names are open to everybody on the host
            peer.close()
            continue
        peers[array.array("i", peer.recv(4, socket.MSG_WAITALL))[0]] = peer
    return [peers[other] for other in sorted(peers)]


def _owner(peer: socket.socket) -> int:
    """User id of the process at the other end."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _receive_file(peer: socket.socket) -> int:
    _, files, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise OSError("a rank of this host handed no file over")
    return files[0]
