"""Sums between the processes of one host through memory they share, not through its network stack.

The memory is a memfd and the ranks wait for each other on Unix sockets with abstract names. None of
it has a name in a file system, so nothing is left behind however they end; a rank that dies closes
its sockets, which wakes the others at once; and a system call on both sides of each wait orders the
memory before it against the memory after it on every kind of CPU.
"""

import array
import contextlib
import mmap
import os
import socket
import struct
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.world import World

T = TypeVar("T")
_Views = tuple[list[Tensor], list[Tensor], Tensor, Tensor]
# About 0.2 ms of asking, as long as ranks in step wait for each other.
_POLLS = 100


class HostSum:
    """Sums of a vector over all ranks, equal to the last bit on each, in the order of ranks.

    Each rank has a slot in the shared memory for what it adds, and there is one for the sum. There
    are two of each, which take turns: what some still read of one sum, others do not overwrite with
    the next. Two ranks each add the other's vector to their own; more of them share the additions
    out, and wait for each other once more.

    Vectors are made elsewhere and copied into the slots, in one go: memory that another core has
    read is slow to write, above all piece by piece.
    """

    def __init__(self, world: World, size: int, timeout: float) -> None:
        """Connect the ranks; every rank of `world` must take part.

        Args:
            world: at least two ranks on each host.
            size: elements of the longest vector to add up.
            timeout: seconds that a rank may make the others wait.

        Raises:
            OSError: on every rank, if some could not share memory with the others of their host.
        """
        self._turn = 0
        self._rank = world.launch.local_rank
        self._ranks = world.launch.local_world_size
        self._peers: list[socket.socket] = []
        self._leaders = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            token = world.once_per_host(lambda: uuid.uuid4().hex)
            listener = _together(world, lambda: _listen(token, self._rank, self._ranks))
            undo.callback(listener.close)
            self._peers = _together(
                world, lambda: _connect(listener, token, self._rank, self._ranks)
            )
            for peer in self._peers:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _interval(timeout))
            rows = 2 * (self._ranks + 1)
            padded = -(-size // 16) * 16  # no two ranks write to one cache line
            memory = _together(world, lambda: self._share_memory(rows * padded * 4))
            everything = torch.frombuffer(memory, dtype=torch.float32).view(2, rows // 2, padded)
            self._halves = everything[:, :, :size]
            listener.close()
            if self._ranks < world.world_size:
                firsts = world.gather(world.launch.local_rank == 0)
                self._leaders = dist.new_group(
                    [r for r, first in enumerate(firsts) if first], timedelta(seconds=timeout)
                )
            undo.pop_all()
        self._are_two = world.world_size == 2
        self._views: dict[tuple[int, int], _Views] = {}

    def _share_memory(self, length: int) -> mmap.mmap:
        """Local rank 0 makes the memory and hands it to the others."""
        if self._rank == 0:
            file = os.memfd_create("mnist-dist-sum", os.MFD_CLOEXEC)
            os.ftruncate(file, length)
            for peer in self._peers:
                socket.send_fds(peer, [b"m"], [file])
        else:
            _, files, _, _ = socket.recv_fds(self._peers[0], 1, 1)
            if not files:
                raise OSError("local rank 0 gave no memory")
            file = files[0]
        try:
            return mmap.mmap(file, length)
        finally:
            os.close(file)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks of `values`, a float32 vector of at most `size` elements.

        Returns:
            A vector to be read only, and only until the next call; it may be `values`, summed.

        Raises:
            ConnectionError: a rank of this host is gone, or made the others wait for too long.
        """
        key = self._turn, len(values)
        if key not in self._views:
            self._views[key] = self._view(*key)
        slots, parts, share, result = self._views[key]
        self._turn = 1 - self._turn
        slots[self._rank].copy_(values)
        self._wait_for_all()
        if self._are_two:
            return values.add_(slots[1 - self._rank])
        _add_up(parts, share)
        self._wait_for_all()
        if self._leaders is not None:
            if self._rank == 0:
                dist.all_reduce(result, group=self._leaders)
            self._wait_for_all()
        return result

    def _view(self, turn: int, count: int) -> _Views:
        """All ranks' slots; what this rank adds up of them, and where; where the sum will be."""
        *slots, result = self._halves[turn, :, :count].unbind()
        first, last = (count * n // self._ranks for n in (self._rank, self._rank + 1))
        return slots, [slot[first:last] for slot in slots], result[first:last], result

    def _wait_for_all(self) -> None:
        try:
            for peer in self._peers:
                peer.send(b"x")
            for peer in self._peers:
                if not _receive(peer):
                    raise ConnectionResetError
        except BlockingIOError as error:
            raise ConnectionError("Timed out waiting for a rank of this host") from error
        except ConnectionError as error:
            self.close()  # whoever waits for this rank, which comes no more, hears so at once
            raise ConnectionError("Connection closed by a rank of this host") from error

    def close(self) -> None:
        """Let go of the other ranks."""
        for peer in self._peers:
            peer.close()
        self._peers = []


def _receive(peer: socket.socket) -> bytes:
    """A byte from `peer`: at first by asking again and again, which is woken sooner than sleep.

    In between, whoever else is to run on this core does.
    """
    for _ in range(_POLLS):
        try:
            return peer.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            os.sched_yield()
    return peer.recv(1)


def _add_up(parts: list[Tensor], out: Tensor) -> Tensor:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
    return out


def _together(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if one fails, all do."""
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
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd")
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


def _interval(seconds: float) -> bytes:
    """A struct timeval."""
    whole, rest = divmod(seconds, 1)
    return struct.pack("ll", int(whole), int(rest * 1e6))


def _owner(peer: socket.socket) -> int:
    """User id of the process at the other end."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
