"""Form the process group of a run, with a device and a backend for each rank."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from mnist_dist.distributed.devices import (
    Backend,
    deprioritize_gloo,
    pick_backend,
    pick_device,
    set_threads,
    use_batch_scheduling,
)
from mnist_dist.distributed.failures import (
    FailureStore,
    brief,
    describe,
    format_ranks,
    is_comm_error,
)
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.network import gloo_interface, interface_remedy, interfaces
from mnist_dist.distributed.rendezvous import connect_ranks, rendezvous
from mnist_dist.distributed.store import StoreMailbox
from mnist_dist.distributed.world import World
from mnist_dist.errors import JobError, RendezvousError, ReportedError, UserError, print_line

# How long a rank that cannot take part waits for its peers, to let them end with the same cause.
_FAULT_S = 60.0
# The least time for the ranks to connect after a rendezvous that took almost all of the time.
_CONNECT_S = 5.0
# Keeps the groups that were left alive.
_LEFT: list[dist.ProcessGroup | None] = []


@contextlib.contextmanager
def init_distributed(
    launch: Launch, device: str, backend: str, timeout: float = 600.0
) -> Iterator[World]:
    """Set up this process's device, threads and process group, and tear the group down at the end.

    A single process forms no group. If the body raises anything but a ReportedError, this rank
    prints the cause in one line and shares it with its peers.

    Args:
        launch: from `read_launch`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "auto", "gloo" or "nccl".
        timeout: seconds for the rendezvous, and for each collective until `World.set_timeout`.

    Raises:
        UserError: the device is not available, or the backend does not support it.
        RendezvousError: the ranks did not all arrive.
    """
    deadline = time.monotonic() + timeout
    chosen, name, fault = _pick(launch, device, backend)
    set_threads(launch)
    if launch.world_size == 1:
        if fault:
            raise fault
        yield World(launch, chosen, "none")
        return
    use_batch_scheduling()
    notify = print_line if launch.local_rank == 0 or launch.by_hand else lambda line: None
    try:
        # Peers learn of a fault once they are here; if they do not come, it is printed without.
        store = rendezvous(launch, min(timeout, _FAULT_S) if fault else timeout, notify)
    except RendezvousError as error:
        raise fault or error from None
    _check_devices(launch, chosen, device, store, timeout, fault)
    left = max(_CONNECT_S, deadline - time.monotonic())
    world = init_process_group(launch, chosen, name, store, timeout, left, fault)
    try:
        yield world
    except ReportedError:
        raise
    except Exception as error:
        _explain(error, world)
        raise
    # On success only: after a failure the peers may be gone, and destroying would wait for them.
    # Rank 0 may host the store: the barrier keeps it alive until no rank needs it.
    world.barrier()
    leave_process_group()


def leave_process_group() -> None:
    """End this process's part in the group; its threads and sockets stay until the process exits.

    A DistributedDataParallel that outlives the group would destroy it while it holds the GIL: it
    would wait for gloo's threads, which may be waiting for the GIL to free a tensor
    (https://github.com/pytorch/pytorch/issues/56297).
    """
    _LEFT.append(dist.group.WORLD)
    dist.destroy_process_group()


def _pick(
    launch: Launch, device: str, backend: str
) -> tuple[torch.device, Backend, UserError | None]:
    """Return device and backend, and why they cannot be used, which peers must learn first."""

    def warn(line: str) -> None:
        if launch.rank == 0:
            print_line(f"warning: {line}")

    try:
        chosen = pick_device(launch, device, warn)
        return chosen, pick_backend(launch, chosen, device, backend), None
    except UserError as error:
        return torch.device("cpu"), "gloo", error


def _check_devices(
    launch: Launch,
    device: torch.device,
    wanted: str,
    store: Store,
    timeout: float,
    fault: UserError | None,
) -> None:
    """Check that all ranks use GPUs or all use CPUs: they could not form a group otherwise.

    Raises:
        UserError: on all ranks, if not.
    """
    mailbox = StoreMailbox(store, "devices")
    mailbox.publish(f"{launch.rank}", "none" if fault else device.type)
    keys = [f"{rank}" for rank in range(launch.world_size)]
    found = mailbox.collect(keys, time.monotonic() + timeout)
    on_gpus = [rank for rank, kind in enumerate(found) if kind == "cuda"]
    on_cpus = [rank for rank, kind in enumerate(found) if kind == "cpu"]
    if on_gpus and on_cpus:
        raise UserError(
            f"--device {wanted}: {format_ranks(on_gpus)} would train on GPUs and "
            f"{format_ranks(on_cpus)} on CPUs; start as many processes on each node as it has "
            "GPUs, or use --device cpu"
        )


def init_process_group(
    launch: Launch,
    device: torch.device,
    backend: Backend,
    store: Store,
    timeout: float,
    connect_timeout: float | None = None,
    fault: UserError | None = None,
) -> World:
    """Form the process group of the ranks that share `store`, each with its own `device`.

    Args:
        launch: this process's rank and world size.
        device: of this process.
        backend: for what is on `device`.
        store: from `rendezvous`.
        timeout: seconds for each collective, and for the group to form without `connect_timeout`.
        connect_timeout: seconds for the group to form.
        fault: why this rank cannot take part.

    Raises:
        UserError: a rank has a fault or a wrong GLOO_SOCKET_IFNAME, or two have the same GPU.
        RendezvousError: the backend could not connect the ranks in time.
    """
    _disable_nccl_watchdog(launch)

    def connect() -> None:
        if fault:
            raise fault
        interface = gloo_interface(launch.spans_nodes, launch.master_addr or "")
        if interface.error:
            remedy = interface_remedy(interfaces(), launch.spans_nodes)
            raise UserError(f"{interface.error}; {remedy}")
        if interface.name:
            os.environ["GLOO_SOCKET_IFNAME"] = interface.name
        # NCCL moves what is on GPUs only: flags, checksums and objects go over gloo, which notices
        # at once when a rank dies.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
            store=PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout),
        )

    connect_ranks(connect, launch, store, connect_timeout or timeout)
    deprioritize_gloo()
    failures = FailureStore(store, launch.rank, launch.world_size)
    world = World(launch, device, backend, failures)
    world.barrier()  # rank 0 may fail next, and with it goes the store that others still read
    if backend == "nccl":
        _connect_gpus(world)
    return world


def _disable_nccl_watchdog(launch: Launch) -> None:
    """Let no watchdog abort a rank without a cause: see LaunchQueue. Graphs need this, too.

    Torchrun sets 1 for its ranks on its own, so 1 means nothing there; other values are the user's.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if launch.launcher == "torchrun" and os.environ.get(name) == "1":
        del os.environ[name]
    os.environ.setdefault(name, "0")


def _connect_gpus(world: World) -> None:
    """Let NCCL connect the GPUs, so that a failure to connect occurs here.

    Raises:
        UserError: two ranks have the same GPU.
        JobError: NCCL could not.
    """
    gpu = socket.gethostname(), str(torch.cuda.get_device_properties(world.device).uuid)
    ranks = world.gather(gpu)
    if twice := next((gpu for gpu in ranks if ranks.count(gpu) > 1), None):
        same = [rank for rank, other in enumerate(ranks) if other == twice]
        raise UserError(
            f"--backend nccl: {format_ranks(same)} on {twice[0]} have the same GPU, which NCCL "
            "refuses; bind one to each task (srun --gpus-per-task=1), or use --backend gloo"
        )

    def connect() -> None:
        try:
            world.all_reduce_sum(torch.zeros(1, device=world.device)).cpu()
        except RuntimeError as error:
            raise JobError(
                f"NCCL could not connect the GPUs ({brief(error)}); NCCL_DEBUG=INFO shows why"
            ) from error

    world.run_on_all(connect)


def _explain(error: Exception, world: World) -> None:
    """Print what failed on this rank and share it with its peers.

    Raises:
        PeerLostError: the error only means that a peer is gone; the text names it and its cause.
    """
    failures = world.failures
    assert failures is not None
    if not is_comm_error(error):
        failures.publish(describe(error))
        print_line(f"error: rank {failures.rank} failed: {describe(error)}")
        return
    lost = failures.find_cause()
    raise type(lost)(f"{lost} ({brief(error)})") from error
