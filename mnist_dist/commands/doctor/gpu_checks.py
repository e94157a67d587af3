"""Check the ranks' GPUs: pure functions from facts and measurements to findings."""

from collections import defaultdict
from itertools import combinations

from mnist_dist.commands.doctor.facts import Facts
from mnist_dist.commands.doctor.findings import (
    FactsByRank,
    Finding,
    Payloads,
    by_node,
    duration,
    find_difference,
    find_each,
    name_ranks,
)
from mnist_dist.commands.doctor.gpus import Gpu, GpuFacts
from mnist_dist.distributed.gpu_count import NO_NVIDIA_SMI
from mnist_dist.errors import counted

# What these variables do to the precision of float32 products, and the remedy.
_TF32_VARIABLES = {
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (
        "has no effect: the job sets the precision itself",
        "unset it, and train with --precision tf32 for TF32",
    ),
    "NVIDIA_TF32_OVERRIDE": (
        "overrides --precision inside CUDA's libraries, and the job cannot undo it",
        "unset it",
    ),
}


def check_gpus(facts_by_rank: FactsByRank) -> list[Finding]:
    """Check the GPUs that ranks use: what nvidia-smi prints about them, and peer access."""
    findings = [
        *_check_nvidia_smi(facts_by_rank),
        *_check_ecc(facts_by_rank),
        *_check_mig(facts_by_rank),
        *_check_peer_access(facts_by_rank),
    ]
    used = [facts.gpu for facts in facts_by_rank.values() if facts.gpu]
    good = ["no uncorrected ECC errors"] * all(gpu.ecc_errors == 0 for gpu in used)
    good += ["MIG disabled"] * all(gpu.mig is False for gpu in used)
    if findings or not used or not good:
        return findings
    return [Finding("gpus", "ok", ", ".join(good))]


def check_gpu_versions(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require equal NCCL versions of ranks that use it; warn of different drivers."""
    nccl = {f.rank: f.gpus.nccl for f in facts_by_rank.values() if f.backend == "nccl"}
    same_nccl = "use the same build of torch and the same LD_LIBRARY_PATH for every rank"
    drivers = {f.rank: f.gpus.driver for f in _on_gpus(facts_by_rank) if f.gpus.driver}
    same_driver = "install one version of the driver on every node"
    return [
        *find_difference("versions", "problem", "NCCL", nccl, same_nccl, facts_by_rank),
        *find_difference("versions", "warning", "GPU driver", drivers, same_driver, facts_by_rank),
    ]


def check_detection(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require that torch can use the GPUs it counts; warn of those that it does not see."""
    failed, unseen = {}, {}
    for rank, facts in facts_by_rank.items():
        if facts.gpus.error:
            if not facts.device_error:  # which has the same cause
                failed[rank] = f"torch cannot use a GPU: {facts.gpus.error}"
        elif not facts.gpus.visible and (text := _unseen(facts.gpus)):
            unseen[rank] = text
    check_driver = "check the driver (nvidia-smi), or train with --device cpu"
    install = "install a CUDA build of torch that the driver supports (nvidia-smi shows which)"
    return [
        *find_each("devices", "problem", failed, check_driver, facts_by_rank),
        *find_each("devices", "warning", unseen, install, facts_by_rank),
    ]


def _unseen(gpus: GpuFacts) -> str:
    """Format the signs of a GPU that torch does not see, and the reason; "" without any."""
    driver_fails = gpus.nvidia_smi_error if gpus.nvidia_smi_error != NO_NVIDIA_SMI else None
    if not (gpus.device_files or gpus.driver or driver_fails):
        return ""
    reasons = ", ".join(reason for reason in (gpus.unavailable, driver_fails) if reason)
    # Programs may be installed on nodes without GPUs, too.
    sign = "the node has" if gpus.device_files or gpus.driver else "the node seems to have"
    return f"{sign} a GPU that torch does not see" + (f" ({reasons})" if reasons else "")


def check_sharing(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require that each rank that uses NCCL has a GPU to itself."""
    users: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for facts in facts_by_rank.values():
        if facts.backend == "nccl" and facts.gpu and facts.gpu.uuid:
            # Not the node's rank: two launchers on one machine share its GPUs, too.
            users[facts.boot, facts.gpu.uuid].append(facts)
    findings = []
    for ranks in users.values():
        if len(ranks) > 1 and ranks[0].gpu:
            who = name_ranks((facts.rank for facts in ranks), facts_by_rank)
            text = f"{who} use the same {ranks[0].gpu.label}, which NCCL refuses"
            remedy = "bind one GPU to each task (srun --gpus-per-task=1), or use --backend gloo"
            findings.append(Finding("devices", "problem", text, remedy))
    return findings


def _check_nvidia_smi(facts_by_rank: FactsByRank) -> list[Finding]:
    """Report where driver, MIG and memory errors are unknown; `check_detection` covers CPUs."""
    missing, failed = {}, {}
    for facts in _on_gpus(facts_by_rank):
        if facts.gpus.nvidia_smi_error == NO_NVIDIA_SMI:
            missing[facts.rank] = f"ECC errors and MIG not checked: {NO_NVIDIA_SMI}"
        elif facts.gpus.nvidia_smi_error:
            failed[facts.rank] = facts.gpus.nvidia_smi_error
    provide = "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    look = "look for driver errors in the kernel's log (dmesg)"
    return [
        *find_each("gpus", "skipped", missing, provide, facts_by_rank),
        *find_each("gpus", "warning", failed, look, facts_by_rank),
    ]


def _check_ecc(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require that no GPU of a rank has lost data in its memory."""
    remedy = "drain the node and reset the GPU (nvidia-smi --gpu-reset)"
    findings = []
    for rank, facts in facts_by_rank.items():
        if facts.gpu and facts.gpu.ecc_errors:
            errors = counted(facts.gpu.ecc_errors, "uncorrected ECC error")
            text = f"{facts.gpu.label} of {name_ranks([rank], facts_by_rank)} has {errors}"
            findings.append(Finding("gpus", "problem", text, remedy))
    return findings


def _check_mig(facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn if a rank uses an instance of a GPU that MIG splits."""
    text = "MIG is enabled: NCCL does not work between instances of one GPU"
    split = {rank: text for rank, f in facts_by_rank.items() if f.gpu and f.gpu.mig}
    remedy = (
        "start one process per instance with --backend gloo, or disable MIG (nvidia-smi -mig 0)"
    )
    return find_each("gpus", "warning", split, remedy, facts_by_rank)


def _check_peer_access(facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn if NCCL must copy through host memory between two ranks of a node."""
    remedy = "use GPUs that share NVLink or a PCIe switch (nvidia-smi topo -p2p r)"
    findings = []
    for ranks in by_node(facts_by_rank):
        on_nccl = [facts for facts in ranks if facts.backend == "nccl"]
        lacking = {
            frozenset(_gpu_key(facts.gpus.visible[n], f"cuda:{n}") for n in pair)
            for facts in on_nccl
            for pair in facts.gpus.without_peer_access
        }
        pairs = [
            (one.rank, other.rank)
            for one, other in combinations(on_nccl, 2)
            if frozenset(_gpu_key(f.gpu, f.device) for f in (one, other)) in lacking
        ]
        if pairs:
            more = f" (and {counted(len(pairs) - 1, 'other pair')})" if len(pairs) > 1 else ""
            text = (
                f"{name_ranks(pairs[0], facts_by_rank)}: no peer access between their GPUs{more}: "
                "NCCL copies through host memory"
            )
            findings.append(Finding("gpus", "warning", text, remedy))
    return findings


def _gpu_key(gpu: Gpu | None, device: str) -> str:
    """Identify a GPU on its node; torch's number does not where ranks see different GPUs."""
    return (gpu.uuid if gpu else None) or device


def check_tf32(facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn of variables that set the precision of float32 products."""
    findings = []
    for name, (effect, remedy) in _TF32_VARIABLES.items():
        values = {f.rank: f.settings[name] for f in _on_gpus(facts_by_rank) if name in f.settings}
        if values:
            text = f"{name}={values[min(values)]} {effect} ({name_ranks(values, facts_by_rank)})"
            findings.append(Finding("settings", "warning", text, remedy))
    return findings


def check_self_test(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Require a correct matrix product of every GPU, from each rank's `gpus.self_test`."""
    errors = {rank: each["error"] for rank, each in enumerate(payloads) if "error" in each}
    seconds = {rank: each["seconds"] for rank, each in enumerate(payloads) if "seconds" in each}
    if errors or not seconds:
        remedy = "look for Xid errors in the kernel's log (dmesg), and exclude the node"
        return find_each("gpu test", "problem", errors, remedy, facts_by_rank)
    text = f"each GPU multiplies matrices correctly, in {duration(max(seconds.values()))} at most"
    return [Finding("gpu test", "ok", text, figures={"seconds": seconds})]


def describe_gpus(facts_by_rank: FactsByRank) -> str:
    """Format the models that ranks use, and the first rank's versions: ` (NVIDIA H100, ...)`."""
    first = next(iter(facts_by_rank.values()))
    models = dict.fromkeys(facts.gpu.name for facts in facts_by_rank.values() if facts.gpu)
    versions = {
        "driver": first.gpus.driver,
        "CUDA": first.environment["cuda"],
        "NCCL": first.gpus.nccl,
    }
    known = [f"{name} {version}" for name, version in versions.items() if version]
    described = ", ".join(filter(None, [" or ".join(models), *known]))
    return f" ({described})" if described else ""


def _on_gpus(facts_by_rank: FactsByRank) -> list[Facts]:
    return [facts for facts in facts_by_rank.values() if facts.device.startswith("cuda")]
