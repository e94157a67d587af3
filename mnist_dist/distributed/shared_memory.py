"""Sums between the processes of one host through memory they share, not through its network stack.

The memory is a memfd, which has no name in a file system: nothing is left behind however they end.
"""

import contextlib
import mmap
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.distributed.host_barrier import HostBarrier, all_or_none
from mnist_dist.distributed.threads import ranks_outnumber_cpus
from mnist_dist.distributed.world import World

_Views = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


class HostSum:
    """Sums of a vector over all ranks, equal to the last bit on each, in the order of ranks.

    Each rank has a slot in the shared memory for what it adds. Two ranks wait for each other once
    and add the other's vector to their own; they have two slots each, which take turns: what one
    still reads of one sum, the other does not overwrite with the next. More ranks share the
    additions out and wait once more, for the whole sum; after that nobody reads a slot.
    """

    own: Tensor
    """(size,) float32: a vector made in here is added up with the least copying."""

    def __init__(self, world: World, size: int, timeout: float) -> None:
        """Connect the ranks; every rank of `world` must take part.

        Args:
            world: at least two ranks on each host.
            size: elements of the longest vector to add up.
            timeout: seconds that a rank may make the others wait.

        Raises:
            OSError: on every rank, if some could not share memory with the others of their host.
        """
        launch = world.launch
        self._rank, self._ranks = launch.local_rank, launch.local_world_size
        self._are_two = world.world_size == 2
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
        # Memory that another core has read is slow to write piece by piece, as products are made:
        # better in private, and copied at once. On a core that ranks take turns at, what counts is
        # how little of its cache they need.
        in_place = not self._are_two and ranks_outnumber_cpus(self._ranks, launch.cpus_per_task)
        self.own = self._slots[0, self._rank] if in_place else torch.empty(size)

    def _share_memory(self, world: World, size: int) -> tuple[Tensor, Tensor]:
        """The slots, (turns, ranks, size), and the place of the sum, (size,)."""
        turns = 2 if self._are_two else 1
        padded = -(-size // 16) * 16  # no two ranks write to one cache line
        length = (turns * self._ranks + 1) * padded * 4
        made = all_or_none(world, lambda: _memory(length) if self._rank == 0 else None)
        file = all_or_none(world, lambda: self._barrier.hand_out(made))
        try:
            memory = all_or_none(world, lambda: mmap.mmap(file, length))
        finally:
            os.close(file)
        rows = torch.frombuffer(memory, dtype=torch.float32).view(-1, padded)[:, :size]
        return rows[:-1].unflatten(0, (turns, self._ranks)), rows[-1]

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
        if values.data_ptr() != slots[self._rank].data_ptr():
            slots[self._rank].copy_(values)
        self._barrier.wait()
        if self._are_two:
            self._turn = 1 - self._turn
            return values.add_(slots[1 - self._rank])
        _add_up(parts, share)
        self._barrier.wait()
        if self._leaders is not None:
            if self._rank == 0:
                dist.all_reduce(result, group=self._leaders)
            self._barrier.wait()
        return result

    def _view(self, turn: int, count: int) -> _Views:
        """All ranks' slots; what this rank adds up of them, and where; where the sum will be."""
        slots, result = list(self._slots[turn, :, :count].unbind()), self._result[:count]
        first, last = (count * n // self._ranks for n in (self._rank, self._rank + 1))
        return slots, [slot[first:last] for slot in slots], result[first:last], result

    def close(self) -> None:
        """Let go of the other ranks."""
        self._barrier.close()


def _memory(length: int) -> int:
    """An open file of `length` bytes that lies in memory only."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd")
    file = os.memfd_create("mnist-dist-sum", os.MFD_CLOEXEC)
    os.ftruncate(file, length)
    return file


def _add_up(parts: list[Tensor], out: Tensor) -> None:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
