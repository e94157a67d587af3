"""Read what torch and the driver report about the GPUs, and test one.

A broken driver makes most of these calls raise. The doctor must report it, so failures become texts
among the facts.
"""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_dist.distributed.gpu_count import query_nvidia_smi

_FIELDS = "index,uuid,driver_version,mig.mode.current,ecc.errors.uncorrected.volatile.total"
_TIMEOUT_S = 5.0

_TEST_SIZE = 512

# torch raises AssertionError where it is built without CUDA, and for a GPU number it does not know.
_FAILURES = (RuntimeError, AssertionError)


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch sees."""

    name: str
    uuid: str | None = None
    """As nvidia-smi prints it."""
    index: int | None = None
    """nvidia-smi's number, which may differ from torch's; None if unknown."""
    mig: bool | None = None
    """Whether it is split into instances (MIG); None if unknown or impossible."""
    ecc_errors: int | None = None
    """Uncorrected memory errors since the driver was loaded; None if unknown or without ECC."""

    @property
    def label(self) -> str:
        """What to call it on its host: `GPU 3 (GPU-5c0b...)`."""
        names = [f"GPU {self.index}"] * (self.index is not None) + [self.uuid or self.name]
        return f"{names[0]} ({names[1]})" if len(names) > 1 else names[0]


@dataclass(frozen=True)
class GpuFacts:
    """What one rank finds out about GPUs, in plain types."""

    unavailable: str | None = None
    """Why torch can use no GPU."""
    error: str | None = None
    """Why torch cannot describe a GPU that it counts."""
    visible: list[Gpu] = field(default_factory=list)
    """The GPUs that torch sees, by torch's numbers; those before the one that gave `error`."""
    without_peer_access: list[list[int]] = field(default_factory=list)
    """Pairs of visible GPUs that cannot read each other's memory."""
    nccl: str | None = None
    driver: str | None = None
    nvidia_smi_error: str | None = None
    """`NO_NVIDIA_SMI`, or why it failed."""
    device_files: int = 0
    """Number of GPUs that the kernel shows, whether torch sees them or not."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "GpuFacts":
        """Restore facts from the result of `dataclasses.asdict`."""
        return cls(**{**plain, "visible": [Gpu(**gpu) for gpu in plain["visible"]]})


@dataclass(frozen=True)
class SmiRow:
    """What nvidia-smi prints about one GPU; None for what it does not know."""

    index: int
    uuid: str
    driver: str | None
    mig: bool | None
    ecc_errors: int | None


def why_no_cuda() -> str | None:
    """Return why torch cannot use a GPU; None if it can.

    torch gives its reason only once, at the first call of a process, and as a warning.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return None
        except _FAILURES as error:
            return shorten(str(error))
    if caught:
        return shorten(str(caught[-1].message))
    if not torch.version.cuda:
        return "torch is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA finds none" if visible is None else f'CUDA_VISIBLE_DEVICES is "{visible}"'


def read_gpus(unavailable: str | None) -> GpuFacts:
    """Collect the facts about the node's GPUs.

    Args:
        unavailable: the result of `why_no_cuda`. If there is a reason, torch is not asked for more:
            it counts the GPUs of a driver that it cannot use, and fails at the next call.
    """
    rows, nvidia_smi_error = read_nvidia_smi()
    error, visible, without_peer = None, [], []
    if unavailable is None:
        number: int | None = None
        try:
            for number in range(torch.cuda.device_count()):
                visible.append(_describe(number, rows))
            number = None
            without_peer = _without_peer_access(len(visible))
        except _FAILURES as failure:
            where = "" if number is None else f"GPU {number}: "
            error = f"{where}{shorten(str(failure))}"
    return GpuFacts(
        unavailable=unavailable,
        error=error,
        visible=visible,
        without_peer_access=without_peer,
        nccl=_nccl_version() if unavailable is None else None,
        driver=next((row.driver for row in rows if row.driver), None),
        nvidia_smi_error=nvidia_smi_error,
        device_files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
    )


def shorten(text: str) -> str:
    """Shorten torch's message about a CUDA failure to what happened, without its advice."""
    text = text.partition(" (Triggered internally")[0].strip()
    if numbered := re.search(r"Error \d+: .*", text):
        return numbered[0]
    line = text.partition("\n")[0].removeprefix("CUDA initialization: ")
    return line.partition(". ")[0].rstrip(".") or "torch gives no reason"


def _describe(number: int, rows: Sequence[SmiRow]) -> Gpu:
    """Describe the GPU of one of torch's numbers, with what nvidia-smi prints about it."""
    name = torch.cuda.get_device_name(number)
    given = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    # nvidia-smi prints a prefix, torch does not.
    uuid = f"GPU-{str(given).removeprefix('GPU-')}" if given else None
    row = next((row for row in rows if row.uuid == uuid), None)
    if row is None and len(rows) == 1:
        row = rows[0]  # the only one, also where torch gives the UUID of a MIG instance, or none
    # The name of a MIG instance: `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
    mig = " MIG " in name or None
    if row is None:
        return Gpu(name, uuid, mig=mig)
    return Gpu(name, uuid or row.uuid, row.index, mig or row.mig, row.ecc_errors)


def _without_peer_access(count: int) -> list[list[int]]:
    can_access = torch.cuda.can_device_access_peer
    return [
        [first, second]
        for first, second in combinations(range(count), 2)
        if not (can_access(first, second) and can_access(second, first))
    ]


def _nccl_version() -> str | None:
    with contextlib.suppress(AttributeError, *_FAILURES):  # a build without NCCL
        return ".".join(map(str, torch.cuda.nccl.version()))
    return None


def read_nvidia_smi() -> tuple[list[SmiRow], str | None]:
    """Query the driver through nvidia-smi.

    Returns:
        The GPUs, and why there is no answer: `NO_NVIDIA_SMI`, or what failed.
    """
    out, error = query_nvidia_smi(
        f"--query-gpu={_FIELDS}", "--format=csv,noheader", timeout=_TIMEOUT_S
    )
    return parse_nvidia_smi(out), error


def parse_nvidia_smi(text: str) -> list[SmiRow]:
    """Parse what nvidia-smi prints for `read_nvidia_smi`; other lines are skipped.

    A value that a GPU or its driver does not have is `[N/A]`, or another text in brackets.
    """
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == _FIELDS.count(",") + 1 and cells[0].isdecimal():
            index, uuid, driver, mig, ecc = cells
            version = driver if driver[:1].isdecimal() else None
            split = {"Enabled": True, "Disabled": False}.get(mig)
            rows.append(
                SmiRow(int(index), uuid, version, split, int(ecc) if ecc.isdecimal() else None)
            )
    return rows


def self_test(device: torch.device) -> dict[str, Any]:
    """Multiply two float32 matrices on `device` and compare the product with the CPU's.

    Small whole numbers: every intermediate sum is exact in any order, and even in TF32, so any
    difference is an error of the GPU.

    Returns:
        `seconds`, including the start of the CUDA libraries; or `error`.
    """
    numbers = torch.arange(_TEST_SIZE**2, dtype=torch.float32).reshape(_TEST_SIZE, _TEST_SIZE)
    left, right = numbers % 17 - 8, numbers % 13 - 6
    start = time.perf_counter()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        product = _multiply_on(device, left, right)
    except _FAILURES as error:
        return {"error": f"a matrix product fails: {shorten(str(error))}"}
    finally:
        torch.set_float32_matmul_precision(precision)
    if wrong := int((product != left @ right).sum()):
        return {"error": f"{wrong} of {product.numel()} elements of a matrix product are wrong"}
    return {"seconds": time.perf_counter() - start}


def _multiply_on(device: torch.device, left: Tensor, right: Tensor) -> Tensor:
    return (left.to(device) @ right.to(device)).cpu()
