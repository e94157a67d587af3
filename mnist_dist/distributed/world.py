"""This process's place among the ranks of a run, and the few collectives they use."""

import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.distributed.failures import FailureStore
from mnist_dist.distributed.launcher import Launch
from mnist_dist.errors import ReportedError, UserError
from mnist_dist.torch_internals import set_group_timeout

T = TypeVar("T")

# What ranks exchange in training, random states of 5 kB included, fits.
_MESSAGE_BYTES = 8192


@dataclass(frozen=True)
class World:
    """This process's place in the run, and the collectives.

    Every rank must make the same calls in the same order: a rank that skips one leaves its peers
    waiting until the group's timeout. With one process each call returns at once.
    """

    launch: Launch
    device: torch.device
    backend: Literal["gloo", "nccl", "none"]
    """Backend for GPU tensors; CPU tensors always go over gloo."""
    failures: FailureStore | None = None
    """Store of the peers' failure causes; None without peers."""

    @property
    def rank(self) -> int:
        """Global rank, 0 to world_size - 1."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Number of processes in the run."""
        return self.launch.world_size

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, the only one that prints and writes files."""
        return self.launch.rank == 0

    def facts(self) -> dict[str, Any]:
        """Describe the processes for environment.json; every rank must call this."""
        return {
            "hosts": list(dict.fromkeys(self.gather(socket.gethostname()))),
            "launcher": self.launch.launcher,
            "world_size": self.world_size,
            "device": str(self.device),
            "backend": self.backend,
        }

    def description(self) -> str:
        """Describe the processes in one phrase for the console."""
        talk = f", {self.backend}" if self.backend != "none" else ""
        return f"{self.launch.description}, {self.device.type}{talk}"

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum `values`, of equal shape, dtype and device on every rank, in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every rank, in rank order, on every rank.

        What is small takes one collective, where dist.all_gather_object takes two: training steps
        wait for it.
        """
        if self.world_size == 1:
            return [value]
        content = pickle.dumps(value)
        message, size = len(content).to_bytes(8, "little") + content, _MESSAGE_BYTES
        while True:
            local = torch.frombuffer(bytearray(message[:size].ljust(size)), dtype=torch.uint8)
            gathered = [torch.empty_like(local) for _ in range(self.world_size)]
            dist.all_gather(gathered, local)
            messages = [tensor.numpy().tobytes() for tensor in gathered]
            needed = 8 + max(int.from_bytes(each[:8], "little") for each in messages)
            if needed <= size:
                return [pickle.loads(each[8:]) for each in messages]
            size = needed

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # in CPU memory: dist.barrier takes NCCL where it can

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return this rank's value.

        Without the exchange, a rank with bad input would exit while its peers wait for it.

        Raises:
            ReportedError: on all ranks, if `action` raised one on any.
        """
        outcome = _try(action)
        failed = isinstance(outcome, ReportedError)
        _raise_first(self.gather(outcome if failed else None))  # values may be large
        return outcome

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only and return its picklable value on every rank.

        Raises:
            ReportedError: on all ranks, if `action` raised one.
        """
        outcome = self.broadcast(_try(action) if self.is_main_process else None, 0)
        _raise_first([outcome])
        return outcome  # type: ignore[return-value]

    def once_per_host(self, action: Callable[[], T]) -> T:
        """Run `action` on local rank 0 of each host; its ranks return the picklable value.

        Raises:
            ReportedError: on all ranks, if `action` raised one on any host.
        """
        first_here = self.launch.local_rank == 0
        outcomes = self.gather(_try(action) if first_here else None)
        _raise_first(outcomes)
        firsts = self.gather(self.launch.node_rank if first_here else None)
        return outcomes[firsts.index(self.launch.node_rank)]  # type: ignore[return-value]

    def check_equal(self, values: Mapping[str, Any], remedy: str) -> None:
        """Check that each of `values`, plain values by name, is equal on all ranks.

        Raises:
            UserError: on all ranks, naming the first value and the first rank that differ.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, start=1):
            for name in first:
                if other.get(name) != first[name]:
                    raise UserError(
                        f"{name} differs: rank {rank} has {other.get(name)}, rank 0 has "
                        f"{first[name]}; {remedy}"
                    )

    def broadcast(self, value: T, source: int) -> T:
        """Return the picklable `value` of rank `source` on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def set_timeout(self, seconds: float) -> None:
        """Let collectives take at most `seconds` from now on.

        Without the barrier, a rank already on the short timeout could time out one that is still
        setting up.
        """
        if self.world_size > 1:
            self.barrier()
            set_group_timeout(seconds)


def _try(action: Callable[[], T]) -> T:
    """Return the action's value, or in its place the error that every rank must raise."""
    try:
        return action()
    except ReportedError as error:
        return error.with_message(str(error))  # type: ignore[return-value]


def _raise_first(outcomes: Sequence[Any]) -> None:
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, ReportedError):
            place = "" if rank == 0 else f"rank {rank}: "
            raise outcome.with_message(f"{place}{outcome}")
