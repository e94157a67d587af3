"""Collect the facts of one rank: versions, device, network, CPUs, settings."""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_dist.commands.doctor.gpus import Gpu, GpuFacts, read_gpus, shorten, why_no_cuda
from mnist_dist.distributed.devices import (
    Backend,
    cpu_affinity,
    cpus_allowed,
    pick_backend,
    pick_device,
    set_threads,
)
from mnist_dist.distributed.launcher import SHELLS, Launch
from mnist_dist.distributed.network import gloo_interface, interfaces, own_name_problem
from mnist_dist.errors import UserError
from mnist_dist.flags import check_device
from mnist_dist.run.environment import code_digest, environment_facts

_SETTINGS = (
    "GLOO_",
    "NCCL_",
    "TORCH_NCCL_",
    "OMP_",
    "MKL_NUM",
    "CUDA_VISIBLE",
    "TP_",
    "TORCH_ALLOW_TF32",
    "NVIDIA_TF32",
)


@dataclass(frozen=True)
class Facts:
    """The facts of one rank, in plain types."""

    rank: int
    node_rank: int
    spans_nodes: bool
    host: str
    boot: str
    """Identifies the running kernel: equal for hosts that are containers on one machine."""
    pid: int
    environment: dict[str, Any]
    code: str
    """Digest of the package's sources."""
    code_directory: str
    device: str
    backend: Backend
    device_error: str | None
    device_warning: str | None
    """Why "auto" is the CPU where there are GPUs."""
    gpus: GpuFacts
    interfaces: dict[str, str]
    interface: str
    """The one that gloo uses; empty where gloo resolves the host's name instead."""
    address: str
    interface_error: str | None
    threads: int
    cpus: list[int]
    """Numbers of the CPUs that this process may use."""
    cpus_at_once: int
    settings: dict[str, str]
    own_name_problem: str | None = None
    """Why torchrun could not reach this host under its own name; None under a launcher."""
    shell_as_init: str | None = None
    """The shell that is process 1 of this container; None if that is another program."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Facts":
        """Restore facts from the result of `dataclasses.asdict`."""
        return cls(**{**plain, "gpus": GpuFacts.from_json(plain["gpus"])})

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that this rank uses; None for a CPU, or a GPU that torch cannot describe."""
        kind, _, number = self.device.partition(":")
        if kind != "cuda" or int(number) >= len(self.gpus.visible):
            return None
        return self.gpus.visible[int(number)]


def gather_facts(launch: Launch, device: str, backend: str) -> tuple[Facts, torch.device]:
    """Collect the facts of this rank, choosing device, threads and interface as training does."""
    set_threads(launch)
    no_cuda = why_no_cuda() if device != "cpu" else None
    chosen, name, error, warning = _choose(launch, device, backend, no_cuda)
    gloo = gloo_interface(launch.spans_nodes, launch.master_addr or "")
    interface_error = gloo.error
    if name == "nccl":
        interface_error = interface_error or _nccl_interface_error()
    facts = Facts(
        rank=launch.rank,
        node_rank=launch.node_rank,
        spans_nodes=launch.spans_nodes,
        host=socket.gethostname(),
        boot=_read("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        pid=os.getpid(),
        environment=environment_facts(),
        code=code_digest(),
        code_directory=str(Path(__file__).parents[2]),
        device=str(chosen),
        backend=name,
        device_error=error,
        device_warning=warning,
        gpus=read_gpus(no_cuda) if device != "cpu" else GpuFacts(),
        interfaces=interfaces(),
        interface=gloo.name,
        address=gloo.address,
        interface_error=interface_error,
        threads=torch.get_num_threads(),
        cpus=cpu_affinity(),
        cpus_at_once=cpus_allowed(),
        settings={n: v for n, v in sorted(os.environ.items()) if n.startswith(_SETTINGS)},
        own_name_problem=own_name_problem() if launch.launcher == "none" else None,
        shell_as_init=_shell_as_init(),
    )
    return facts, chosen


def _choose(
    launch: Launch, device: str, backend: str, no_cuda: str | None
) -> tuple[torch.device, Backend, str | None, str | None]:
    """Choose device and backend as training does; return them, why that fails, and a warning."""
    warned: list[str] = []
    try:
        check_device(device)
        if no_cuda and device.startswith("cuda"):
            raise UserError(f"--device {device}: no GPU can be used ({no_cuda}); use --device cpu")
        chosen = pick_device(launch, "cpu" if no_cuda else device, warned.append)
        name = pick_backend(launch, chosen, device, backend)
        return chosen, name, None, warned[0] if warned else None
    except UserError as failure:
        error = str(failure)
    except RuntimeError as failure:
        error = f"torch cannot use a GPU: {shorten(str(failure))}"
    return torch.device("cpu"), "gloo", error, None


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _shell_as_init() -> str | None:
    name = Path(_read("/proc/1/cmdline").partition("\0")[0]).name
    return name if SHELLS.fullmatch(name) else None


def _nccl_interface_error() -> str | None:
    """Return why no interface matches NCCL's variable: prefixes, `=names`, or `^` of either."""
    value = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if not value or value.startswith("^"):
        return None
    exact, wanted = value.startswith("="), value.removeprefix("=").split(",")
    for name in interfaces():
        if any(name == want if exact else name.startswith(want) for want in wanted):
            return None
    return f"NCCL_SOCKET_IFNAME={value}: there is no such interface"
