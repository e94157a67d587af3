"""The processes of a run: device, process group, and the few collectives we use."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from mnist_dist.distributed.failures import (
    FailureStore,
    PeerLostError,
    brief,
    describe,
    is_comm_error,
    wait_until_printed,
)
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.memory import keep_freed_memory
from mnist_dist.distributed.network import interface_towards
from mnist_dist.distributed.rendezvous import rendezvous
from mnist_dist.distributed.threads import let_gloo_give_way, threads_for_one, work_in_long_turns
from mnist_dist.errors import RendezvousError, ReportedError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What an action gave on one rank: a value, or the error that all ranks are to raise."""

    value: T | None = None
    error: ReportedError | None = None


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(value=action())
    except ReportedError as error:
        return _Outcome(error=error.of_its_kind(str(error)))


@dataclass(frozen=True)
class World:
    """The processes of this run and the collectives they share.

    Every rank must make the same calls in the same order; a rank that leaves one out makes all
    others wait until the group's timeout. With one process each call returns at once.
    """

    launch: Launch
    device: torch.device
    backend: Literal["gloo", "nccl", "none"]

    @property
    def rank(self) -> int:
        """Global rank, 0 to world_size - 1."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Number of processes in the run."""
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and speaks."""
        return self.launch.rank == 0

    def facts(self) -> dict[str, Any]:
        """What a record of the run should say about its processes; every rank must ask."""
        return {
            "hosts": list(dict.fromkeys(self.gather(socket.gethostname()))),
            "launcher": self.launch.launcher,
            "world_size": self.world_size,
            "device": str(self.device),
            "backend": self.backend,
        }

    def description(self) -> str:
        """The same for a person, in one phrase."""
        talk = f", {self.backend}" if self.backend != "none" else ""
        return f"{self.launch.description}, {self.device.type}{talk}"

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place; returns it. Same shape and dtype on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return this rank's value.

        Without the exchange a rank whose input is bad would leave and the others would wait for it.

        Raises:
            ReportedError: on all ranks, if `action` raised one on any.
        """
        outcome = _attempt(action)
        self._values(self.gather(_Outcome[T](error=outcome.error)))  # values may be large
        return outcome.value  # type: ignore[return-value]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; every rank returns its (picklable) value.

        Raises:
            ReportedError: on all ranks, if `action` raised one.
        """
        outcome = [_attempt(action) if self.is_main else _Outcome[T]()]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        return self._values(outcome)[0]

    def once_per_host(self, action: Callable[[], T]) -> T:
        """Run `action` on local rank 0 of each host; the host's ranks return its (picklable) value.

        Raises:
            ReportedError: on all ranks, if `action` raised one on any host.
        """
        first_here = self.launch.local_rank == 0
        outcomes = self.gather(_attempt(action) if first_here else _Outcome[T]())
        firsts = self.gather(self.launch.node_rank if first_here else None)
        return self._values(outcomes)[firsts.index(self.launch.node_rank)]

    def _values(self, outcomes: "list[_Outcome[T]]") -> list[T]:
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                place = "" if rank == 0 else f"rank {rank}: "
                raise outcome.error.of_its_kind(f"{place}{outcome.error}")
        return [outcome.value for outcome in outcomes]  # type: ignore[misc]

    def require_same(self, values: Mapping[str, Any], remedy: str) -> None:
        """Check that each of `values` (plain, by name) is equal on all ranks.

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
        """The picklable `value` of rank `source`, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        """Each rank's `numbers` (as many on each), in rank order: quicker than `gather`."""
        if self.world_size == 1:
            return [numbers]
        return [as_numbers(theirs) for theirs in self.gather_tensors(as_bytes(numbers))]

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's `tensor`, of the same shape and dtype on each, in rank order, on the CPU."""
        if self.world_size == 1:
            return [tensor]
        mine = tensor.to(self.device)
        everybodys = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everybodys, mine)
        return list(torch.stack(everybodys).cpu())

    def begin_steps(self, timeout: float) -> None:
        """From now on a collective may take `timeout` seconds only.

        The barrier is needed: a rank that were still setting up would be given up on by the short
        timeout of one that is not.
        """
        if self.world_size > 1:
            dist.barrier()
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))


def as_bytes(numbers: Sequence[float]) -> Tensor:
    """The float64 of n numbers: (8 n,) uint8, to travel beside bytes of other kinds."""
    return torch.tensor(numbers, dtype=torch.float64).view(torch.uint8)


def as_numbers(content: Tensor) -> list[float]:
    """What `as_bytes` made bytes of."""
    numbers: list[float] = content.clone().view(torch.float64).tolist()  # cloned: aligned
    return numbers


@contextlib.contextmanager
def join(launch: Launch, device: str, backend: str, timeout: float = 600.0) -> Iterator[World]:
    """Pick this process's device and threads, join the process group, and leave it at the end.

    One process needs no group and makes none. If the body fails with anything but a ReportedError,
    this rank says why in one line, and the others hear of it.

    Args:
        launch: from `read_launch`.
        device: "auto", "cpu" or "cuda".
        backend: "auto", "gloo" or "nccl".
        timeout: seconds for the ranks to meet, and for each collective until `begin_steps`.

    Raises:
        UserError: the device is not there, or the backend does not fit it.
        RendezvousError: the ranks did not meet.
    """
    chosen = pick_device(launch, device)
    name = pick_backend(chosen, backend)
    choose_threads(launch)
    keep_freed_memory()
    if launch.world_size == 1:
        yield World(launch, chosen, "none")
        return
    work_in_long_turns()
    notify = _say if launch.local_rank == 0 else lambda line: None
    store = rendezvous(launch, timeout, notify)
    world = form_group(launch, chosen, name, store, timeout)
    failures = FailureStore(store, launch.rank, launch.world_size)
    try:
        yield world
    except ReportedError:
        raise
    except Exception as error:
        _explain(error, failures)
        raise
    # Only on the good path: after a failure the peers may be gone, and destroying would wait.
    # Rank 0 may host the store: the barrier keeps it there until nobody needs it.
    dist.barrier()
    dist.destroy_process_group()


def form_group(
    launch: Launch,
    device: torch.device,
    backend: Literal["gloo", "nccl"],
    store: Store,
    timeout: float,
) -> World:
    """Join the process group of the ranks that share `store`, each with its own `device`.

    Raises:
        RuntimeError: the backend could not connect the ranks within `timeout` seconds.
    """
    if launch.spans_nodes:
        _choose_interface(launch.master_addr or "")
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if backend == "nccl" else None,
    )
    let_gloo_give_way()
    return World(launch, device, backend)


def _say(line: str) -> None:
    print(f"mnist-dist: {line}", file=sys.stderr, flush=True)


def choose_threads(launch: Launch) -> None:
    """Share the CPUs of this host out among its ranks, unless OMP_NUM_THREADS says otherwise.

    Torchrun sets it to 1 by itself, so that value says nothing there.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (chosen == "1" and launch.launcher == "torchrun"):
        torch.set_num_threads(threads_for_one(launch.local_world_size, launch.cpus_per_task))


def _choose_interface(address: str) -> None:
    """Let gloo use the interface that leads to the first host, unless the user chose one.

    By itself it takes the one that this host's own name resolves to, which is often the loopback.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (found := interface_towards(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = found[0]


def _explain(error: Exception, failures: FailureStore) -> None:
    """Say what failed here, and post it for the others.

    Raises:
        PeerLostError: nothing did, but another rank is gone; its text names that and the cause.
    """
    if not is_comm_error(error):
        failures.publish(describe(error))
        line = f"mnist-dist: error: rank {failures.rank} failed: {describe(error)}"
        print(line, file=sys.stderr, flush=True)
        return
    raise PeerLostError(f"{failures.find_cause()} ({brief(error)})") from error


def pick_backend(device: torch.device, backend: str) -> Literal["gloo", "nccl"]:
    """NCCL between GPUs, gloo between CPUs, unless the user chose.

    Raises:
        UserError: NCCL without GPUs.
    """
    if backend == "nccl" and device.type != "cuda":
        raise UserError("--backend nccl: there is no GPU here; use --backend gloo")
    return "nccl" if device.type == "cuda" and backend != "gloo" else "gloo"


def pick_device(launch: Launch, device: str) -> torch.device:
    """The CPU, or the GPU of this process's local rank.

    Raises:
        UserError: --device cuda without a GPU, or more processes on the host than GPUs.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus == 0:
        if device == "cuda":
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
        return torch.device("cpu")
    # With one GPU bound to each srun task, every task sees its own as number 0.
    bound = launch.launcher == "srun" and gpus == 1
    index = 0 if bound else launch.local_rank
    if index >= gpus:
        raise UserError(
            f"--device {device}: {launch.local_world_size} processes on a host with {gpus} GPU(s); "
            f"start at most {gpus} there or use --device cpu"
        )
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def exit_with_error(launch: Launch, error: ReportedError) -> int:
    """Show the line once, from rank 0, and return its exit code on every rank.

    Torchrun and `srun -K` stop all ranks as soon as one ends: a rank that ends before rank 0 has
    spoken would silence it. Within a process group, where every rank has the error, the others wait
    for word in its store; before there is one, each found it by itself and waits to be stopped.
    """
    speaks = launch.rank == 0 or (isinstance(error, RendezvousError) and launch.local_rank == 0)
    if speaks:
        print(f"mnist-dist: {error.kind}: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        wait_until_printed(dist.distributed_c10d._get_default_store(), launch.rank)
        # Left to the interpreter's end, gloo's threads abort the process now and then.
        dist.destroy_process_group()
    elif not speaks and launch.launcher != "none":
        launcher, deadline = os.getppid(), time.monotonic() + 20
        while os.getppid() == launcher and time.monotonic() < deadline:
            time.sleep(0.05)
    return error.exit_code


def leave(code: int) -> NoReturn:
    """End this process at once, without the interpreter's own end.

    That would take down NCCL's and gloo's threads: they may wait for the dead for ever, and even
    after a good run abort the process now and then (seen with torch 2.13 on a busy machine).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, full, or none
            stream.flush()
    os._exit(code)
