"""All-reduce between the processes of one node through shared memory instead of the network stack.

The memory is a memfd and the barrier is made of eventfds and unnamed sockets: none has a name in a
file system, so nothing is left behind however the processes end.
"""

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.distributed.devices import ranks_outnumber_cpus
from mnist_dist.distributed.world import World

T = TypeVar("T")
# Polls of the barrier before a rank sleeps: ranks in step arrive within so many.
_POLLS = 100
_FLOATS_PER_CACHE_LINE = 16

_Views = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


class SharedMemoryAllReduce:
    """Sums a vector over all ranks in rank order, bitwise equal on each.

    Each rank has a slot in the shared memory for its input. Two ranks wait for each other once and
    add the other's slot to their own vector; each has two slots that alternate, so that no rank
    overwrites data its peer is still reading. More ranks each sum one share of the vector and wait
    a second time, after which no slot is read. Between nodes, the first rank of each all-reduces
    the node sums over the backend.
    """

    input_buffer: Tensor
    """(size,) float32: an input computed in here needs the least copying."""

    def __init__(self, world: World, size: int, timeout: float) -> None:
        """Connect the ranks; every rank of `world` must call this.

        Args:
            world: at least two ranks on each node.
            size: elements of the longest vector.
            timeout: seconds to wait for a rank that does not respond.

        Raises:
            OSError: on every rank, if some cannot share memory with their peers on the node.
        """
        self.seconds = 0.0
        """Time this rank has spent in all-reduces, waiting for its peers included."""
        launch = world.launch
        self._rank, self._ranks = launch.local_rank, launch.local_world_size
        self._is_pair = world.world_size == 2
        self._turn = 0
        self._views: dict[tuple[int, int], _Views] = {}
        self._leaders = None
        self._barrier = HostBarrier(world, timeout)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._slots, self._result = self._share_memory(world, size)
            if self._ranks < world.world_size:
                firsts = world.gather(launch.local_rank == 0)
                self._leaders = dist.new_group(
                    [r for r, first in enumerate(firsts) if first], timedelta(seconds=timeout)
                )
            undo.pop_all()
        # Memory that another core has read is slow to write piece by piece, as matrix products do:
        # better to compute in private memory and copy once. Where ranks take turns on a core, what
        # counts is how little of its cache they need.
        in_place = not self._is_pair and ranks_outnumber_cpus(self._ranks, launch.cpus_per_task)
        self.input_buffer = self._slots[0, self._rank] if in_place else torch.empty(size)

    def _share_memory(self, world: World, size: int) -> tuple[Tensor, Tensor]:
        """Map the slots, (turns, ranks, size), and the place of the sum, (size,)."""
        turns = 2 if self._is_pair else 1
        # Padded so that no two ranks write to one cache line.
        padded = -(-size // _FLOATS_PER_CACHE_LINE) * _FLOATS_PER_CACHE_LINE
        length = (turns * self._ranks + 1) * padded * 4
        created = raise_on_any_rank(world, lambda: _memfd(length) if self._rank == 0 else None)
        fd = raise_on_any_rank(world, lambda: self._barrier.share_fd(created))
        try:
            memory = raise_on_any_rank(world, lambda: mmap.mmap(fd, length))
        finally:
            os.close(fd)
        rows = torch.frombuffer(memory, dtype=torch.float32).view(-1, padded)[:, :size]
        return rows[:-1].unflatten(0, (turns, self._ranks)), rows[-1]

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks of `values`, a float32 vector of at most `size` elements.

        Returns:
            A vector to be read only, and only until the next call; it may be `values`, summed.

        Raises:
            ConnectionError: a rank of this node is gone, or did not respond in time.
        """
        started = time.perf_counter()
        total = self._all_reduce(values)
        self.seconds += time.perf_counter() - started
        return total

    def _all_reduce(self, values: Tensor) -> Tensor:
        key = self._turn, len(values)
        if key not in self._views:
            self._views[key] = self._view(*key)
        slots, parts, share, result = self._views[key]
        if values.data_ptr() != slots[self._rank].data_ptr():
            slots[self._rank].copy_(values)
        self._barrier.wait()
        if self._is_pair:
            self._turn = 1 - self._turn
            return values.add_(slots[1 - self._rank])
        _sum(parts, share)
        self._barrier.wait()
        if self._leaders is not None:
            if self._rank == 0:
                dist.all_reduce(result, group=self._leaders)
            self._barrier.wait()
        return result

    def _view(self, turn: int, count: int) -> _Views:
        """Return all ranks' slots, this rank's share of each and of the sum, and the whole sum."""
        slots, result = list(self._slots[turn, :, :count].unbind()), self._result[:count]
        first, last = (count * n // self._ranks for n in (self._rank, self._rank + 1))
        return slots, [slot[first:last] for slot in slots], result[first:last], result

    def close(self) -> None:
        """Disconnect from the other ranks."""
        self._barrier.close()


def connect_shared_memory(
    world: World, size: int, timeout: float
) -> tuple[SharedMemoryAllReduce | None, str]:
    """Build a SharedMemoryAllReduce where the ranks can have one; every rank must call this.

    Returns:
        None where nothing can be shared, and a description for the user that gives the reason.
    """
    over_backend = f"gradients over {world.backend}"
    if world.device.type != "cpu":
        return None, over_backend
    if min(world.gather(world.launch.local_world_size)) == 1:
        return None, f"{over_backend}: a node has one process only"
    try:
        all_reduce = SharedMemoryAllReduce(world, size, timeout)
    except OSError as error:
        return None, f"{over_backend}: the processes of a node cannot share memory ({error})"
    one_node = world.launch.local_world_size == world.world_size
    between = "" if one_node else f", {world.backend} between nodes"
    return all_reduce, f"gradients over shared memory{between}"


def _memfd(length: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd")
    fd = os.memfd_create("mnist-dist-all-reduce", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return fd


def _sum(parts: list[Tensor], out: Tensor) -> None:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


class HostBarrier:
    """A barrier between the ranks of a node, cheap enough for every step.

    Each rank has an eventfd, to which its peers add when they arrive, and a socket to each peer,
    over which nothing is sent: a rank that dies closes it, which wakes its peers at once.
    """

    def __init__(self, world: World, timeout: float) -> None:
        """Connect the ranks, at least two on each node; every rank of `world` must call this.

        A wait for a rank ends after `timeout` seconds.

        Raises:
            OSError: on every rank, if some cannot connect to their peers on the node.
        """
        self._timeout = timeout
        self._peers: list[socket.socket] = []
        self._eventfds: list[int] = []
        self._awaited = 0
        rank, ranks = world.launch.local_rank, world.launch.local_world_size
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            token = world.once_per_host(lambda: uuid.uuid4().hex)
            listener = raise_on_any_rank(world, lambda: _listen(token, rank, ranks))
            with listener:
                self._peers = raise_on_any_rank(
                    world, lambda: _connect(listener, token, rank, ranks)
                )
            self._eventfds = raise_on_any_rank(world, self._exchange_eventfds)
            undo.pop_all()
        self._own, *self._others = self._eventfds
        self._poll = select.poll()
        for fd in (self._own, *(peer.fileno() for peer in self._peers)):
            self._poll.register(fd, select.POLLIN)

    def _exchange_eventfds(self) -> list[int]:
        own = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for peer in self._peers:
            socket.send_fds(peer, [b"c"], [own])
        return [own, *map(_receive_fd, self._peers)]

    def share_fd(self, fd: int | None) -> int:
        """Return local rank 0's `fd`, opened on every rank of its node.

        Raises:
            OSError: it was not received.
        """
        if fd is None:
            return _receive_fd(self._peers[0])
        for peer in self._peers:
            socket.send_fds(peer, [b"f"], [fd])
        return fd

    def wait(self) -> None:
        """Return when every rank of this node has called this as often as this one has.

        What a rank wrote to shared memory before, all see after: the kernel takes a lock to add to
        an eventfd and to read it.

        Raises:
            ConnectionError: a rank is gone, or did not respond in time.
        """
        for other in self._others:
            os.eventfd_write(other, 1)
        # A fast peer may have added twice before a slow one once. Its second can stand for the
        # slow one's first: it only went on because the slow one had arrived.
        self._awaited += len(self._others)
        for _ in range(_POLLS):  # polling returns sooner than sleeping
            if self._all_arrived():
                return
            os.sched_yield()  # to the rank that shares this core
        self._sleep()

    def _all_arrived(self) -> bool:
        with contextlib.suppress(BlockingIOError):  # nothing added since the last read
            self._awaited -= os.eventfd_read(self._own)
        return self._awaited <= 0

    def _sleep(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._all_arrived():
            left = max(0.0, deadline - time.monotonic())
            woken = [fd for fd, _ in self._poll.poll(1000 * left)]
            if self._own in woken:
                continue
            if woken and self._all_arrived():  # the peer is gone, but had arrived before
                return
            self.close()  # peers that wait for this rank fail at once, not after their timeout
            cause = "Connection closed by" if woken else "Timed out waiting for"
            raise ConnectionError(f"{cause} a rank of this node")

    def close(self) -> None:
        """Disconnect from the other ranks."""
        for peer in self._peers:
            peer.close()
        for fd in self._eventfds:
            os.close(fd)
        self._peers, self._eventfds = [], []


def raise_on_any_rank(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its value; an OSError on one is raised on all."""
    try:
        value, failure = action(), None
    except OSError as error:
        failure = str(error)
    failures = [text for text in world.gather(failure) if text is not None]
    if failures:
        raise OSError(failures[0])
    return value


def _listen(token: str, rank: int, ranks: int) -> socket.socket:
    """Listen for the ranks above this one."""
    if not hasattr(os, "eventfd"):
        raise OSError("this system has no eventfd")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0mnist-dist-{token}-{rank}")
    listener.listen(ranks)
    listener.settimeout(10)
    return listener


def _connect(listener: socket.socket, token: str, rank: int, ranks: int) -> list[socket.socket]:
    """Return a socket to each other rank of this node, in rank order."""
    peers: dict[int, socket.socket] = {}
    for below in range(rank):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(f"\0mnist-dist-{token}-{below}")
        peer.send(array.array("i", [rank]).tobytes())
        peers[below] = peer
    while len(peers) < ranks - 1:
        peer, _ = listener.accept()
        peer.setblocking(True)
        if _peer_uid(peer) != os.getuid():  # abstract names are open to every user of the host
            peer.close()
            continue
        peers[array.array("i", peer.recv(4, socket.MSG_WAITALL))[0]] = peer
    return [peers[other] for other in sorted(peers)]


def _peer_uid(peer: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _receive_fd(peer: socket.socket) -> int:
    _, fds, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise OSError("a rank of this node sent no file descriptor")
    return fds[0]
