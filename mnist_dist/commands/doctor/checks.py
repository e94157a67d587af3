"""Check the ranks' facts and measurements: pure functions from them to findings."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from mnist_dist.commands.doctor import gpu_checks
from mnist_dist.commands.doctor.findings import (
    FactsByRank,
    Finding,
    Level,
    Payloads,
    amount,
    by_node,
    duration,
    find_difference,
    find_each,
    find_errors,
    name_ranks,
    ranks_by_value,
)
from mnist_dist.distributed.failures import format_ranges
from mnist_dist.distributed.network import interface_remedy
from mnist_dist.errors import counted

_VERSIONS = ("mnist_dist", "torch", "cuda", "python", "numpy")
# Different ones may change results, or how ranks communicate.
_MUST_BE_EQUAL = ("torch", "cuda")
_SKEW_S = 1.0
_MIN_FREE_BYTES = 64 << 20
# An all-reduce of this size measures latency, not bandwidth.
_LATENCY_BYTES = 4096


def check_facts(facts_by_rank: FactsByRank) -> list[Finding]:
    """Check all that needs no communication between ranks."""
    checks = (
        check_versions,
        check_devices,
        gpu_checks.check_gpus,
        check_threads,
        check_host,
        check_interfaces,
        check_settings,
    )
    return [finding for check in checks for finding in check(facts_by_rank)]


def check_versions(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require equal code, torch, CUDA and NCCL; warn of other different versions."""
    findings: list[Finding] = []
    if len({facts.code for facts in facts_by_rank.values()}) > 1:
        codes = {r: f"{f.code[:8]} in {f.code_directory}" for r, f in facts_by_rank.items()}
        what, remedy = "the code of mnist_dist", "install the same commit for every rank"
        findings += find_difference("versions", "problem", what, codes, remedy, facts_by_rank)
    for name in _VERSIONS:
        versions = {rank: facts.environment[name] for rank, facts in facts_by_rank.items()}
        level: Level = "problem" if name in _MUST_BE_EQUAL else "warning"
        remedy = f"install one version of {name} for every rank"
        findings += find_difference("versions", level, name, versions, remedy, facts_by_rank)
    findings += gpu_checks.check_gpu_versions(facts_by_rank)
    if findings:
        return findings
    first = next(iter(facts_by_rank.values()))
    found = {name.replace("_", "-"): first.environment[name] for name in _VERSIONS}
    here = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    commit, _, dirty = (first.environment["git_commit"] or "").partition("-")
    code = f"code {first.code[:8]}"
    code += f" (commit {commit[:8]}{f'-{dirty}' if dirty else ''})" if commit else ""
    equal = "; equal on all ranks" if len(facts_by_rank) > 1 else ""
    return [Finding("versions", "ok", f"{here}, {code}{equal}")]


def check_devices(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require a device for every rank, all of one kind, that torch and the backend can use."""
    broken = {rank: f.device_error for rank, f in facts_by_rank.items() if f.device_error}
    findings = find_each("devices", "problem", broken, "", facts_by_rank)
    kinds = {rank: facts.device.partition(":")[0] for rank, facts in facts_by_rank.items()}
    if not broken:
        remedy = "check why torch sees no GPU there (nvidia-smi), or train with --device cpu"
        findings = find_difference("devices", "problem", "the device", kinds, remedy, facts_by_rank)
    if warned := {r: f.device_warning for r, f in facts_by_rank.items() if f.device_warning}:
        text, _, remedy = warned[min(warned)].partition("; ")
        text = f"{name_ranks(warned, facts_by_rank)}: {text}"
        findings.append(Finding("devices", "warning", text, remedy or "train with --device cpu"))
    findings += gpu_checks.check_detection(facts_by_rank)
    findings += gpu_checks.check_sharing(facts_by_rank)
    if findings:
        return findings
    first = next(iter(facts_by_rank.values()))
    on_gpu = kinds[first.rank] == "cuda"
    device = f"one GPU{gpu_checks.describe_gpus(facts_by_rank)}" if on_gpu else "the CPU"
    backend = f"; backend {first.backend}" if len(facts_by_rank) > 1 else ""
    return [Finding("devices", "ok", f"each rank uses {device}{backend}")]


def check_threads(facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn if the ranks of a node run more threads than they have CPUs."""
    findings = []
    for ranks in by_node(facts_by_rank):
        numbers = {cpu for facts in ranks for cpu in facts.cpus}
        # A quota, which shows as fewer CPUs than the affinity has, is one for all ranks here.
        quotas = [facts.cpus_at_once for facts in ranks if facts.cpus_at_once < len(facts.cpus)]
        cpus, threads = min([len(numbers), *quotas]), sum(facts.threads for facts in ranks)
        by_quota = "a cgroup's quota on " if cpus < len(numbers) else ""
        available = f"{counted(cpus, 'CPU')} ({by_quota}{format_ranges(numbers)})"
        if cpus < len(ranks):
            text = f"{len(ranks)} ranks share {available}"
            remedy = "start fewer ranks, or bind each to its own CPUs (srun --cpus-per-task=N)"
        elif threads > cpus:
            text = f"{threads} threads on {available}"
            remedy = f"unset OMP_NUM_THREADS or set it to {cpus // len(ranks)}"
        else:
            continue
        texts = dict.fromkeys((facts.rank for facts in ranks), text)
        findings += find_each("threads", "warning", texts, remedy, facts_by_rank)
    if findings:
        return findings
    counts = sorted({facts.threads for facts in facts_by_rank.values()})
    each = counted(counts[0], "thread") if len(counts) == 1 else f"{format_ranges(counts)} threads"
    return [Finding("threads", "ok", f"{each} per rank, and enough CPUs for all")]


def check_host(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require an own name that torchrun can use, and warn of a process 1 that stops no job."""
    findings = []
    for first, *_ in by_node(facts_by_rank):
        if first.own_name_problem:
            text = f"torchrun would wait five minutes for this host: {first.own_name_problem}"
            remedy = (
                "start torchrun with --local-addr=127.0.0.1 (on several hosts, with this host's "
                "address), or add the name to /etc/hosts"
            )
            findings.append(Finding("own name", "problem", text, remedy))
        if first.shell_as_init:
            text = (
                f"process 1 on {first.host} is the shell {first.shell_as_init}, which does "
                "not forward SIGTERM: stopping this container kills the job without a checkpoint"
            )
            remedy = "start the job with exec, or under an init (docker run --init)"
            findings.append(Finding("stops", "warning", text, remedy))
    return findings


def check_interfaces(facts_by_rank: FactsByRank) -> list[Finding]:
    """Require that the selected interface exists and reaches the other nodes."""
    findings = []
    errors = {rank: f.interface_error for rank, f in facts_by_rank.items() if f.interface_error}
    for error, ranks in ranks_by_value(errors).items():
        first = facts_by_rank[ranks[0]]
        remedy = interface_remedy(first.interfaces, first.spans_nodes)
        text = f"{error} ({name_ranks(ranks, facts_by_rank)})"
        findings.append(Finding("interface", "problem", text, remedy))
    if findings or len(facts_by_rank) == 1:
        return findings
    used = list(dict.fromkeys(f"{f.interface} {f.address}".strip() for f in facts_by_rank.values()))
    more = f" and {len(used) - 4} more" if len(used) > 4 else ""
    return [Finding("interface", "ok", f"over {', '.join(used[:4])}{more}")]


def check_settings(facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn if variables that configure the backends differ, or override the job's precision."""
    findings, equal = gpu_checks.check_tf32(facts_by_rank), []
    remedy = "export the same value for every rank, unless the nodes need different ones"
    for name in sorted({name for facts in facts_by_rank.values() for name in facts.settings}):
        values = {rank: facts.settings.get(name, "unset") for rank, facts in facts_by_rank.items()}
        if len(set(values.values())) == 1:
            equal.append(f"{name}={next(iter(values.values()))}")
        elif name != "CUDA_VISIBLE_DEVICES":  # some launchers give each rank its own GPU
            findings += find_difference("settings", "warning", name, values, remedy, facts_by_rank)
    if equal and not findings:
        findings.append(Finding("settings", "ok", ", ".join(equal)))
    return findings


def check_messages(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Check connections and clocks, from each rank's `connect_to_all`."""
    return [*check_tcp(payloads, facts_by_rank), *check_clocks(payloads, facts_by_rank)]


def check_tcp(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Require that every rank reached every other one, from each rank's `connect_to_all`."""
    failed: dict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    round_trips: dict[tuple[int, int], float] = {}
    for source, connections in enumerate(payloads):
        for name, connection in connections.items():
            target = int(name)
            if connection["error"]:
                nodes = (facts_by_rank[source].node_rank, facts_by_rank[target].node_rank)
                failed[nodes].append((source, target, connection["error"]))
            else:
                round_trips[source, target] = connection["round_trip"]
    if failed:
        return [_unreachable(pairs, facts_by_rank) for pairs in failed.values()]
    slowest, shortest = max(round_trips, key=round_trips.__getitem__), min(round_trips.values())
    pairs = counted(len(round_trips) // 2, "pair")
    text = f"{pairs} of ranks, both ways: a round trip takes {duration(shortest)}"
    if len(round_trips) > 2:
        text += f" to {duration(round_trips[slowest])} ({slowest[0]} to {slowest[1]})"
    each = [{"from": a, "to": b, "seconds": seconds} for (a, b), seconds in round_trips.items()]
    return [Finding("messages", "ok", text, figures=each)]


def _unreachable(pairs: list[tuple[int, int, str]], facts_by_rank: FactsByRank) -> Finding:
    """Report all failed pairs between two nodes in one direction as one finding."""
    source, target, error = pairs[0]
    interface = facts_by_rank[source].interface
    over = f" over {interface}" if interface else ""
    text = (
        f"{name_ranks([source], facts_by_rank)} cannot reach {name_ranks([target], facts_by_rank)} "
        f"at {facts_by_rank[target].address}{over}: {error}"
    )
    if len(pairs) > 1:
        text += f" (and {counted(len(pairs) - 1, 'other pair')} of ranks on these nodes)"
    remedy = (
        "allow TCP connections to every port between these nodes, or set GLOO_SOCKET_IFNAME to an "
        "interface that does"
    )
    return Finding("messages", "problem", text, remedy)


def check_clocks(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Warn if a clock differs from rank 0's, from the `connect_to_all` of rank 0."""
    connections = payloads[0].items()
    ahead = {int(rank): made["clock"] for rank, made in connections if not made["error"]}
    if not ahead:
        return []
    worst = max(ahead, key=lambda rank: abs(ahead[rank]))
    skew, figures = abs(ahead[worst]), {"seconds_ahead_of_rank_0": ahead}
    if skew < _SKEW_S:
        return [Finding("clocks", "ok", f"within {duration(skew)} of rank 0's", figures=figures)]
    text = (
        f"the clock of {name_ranks([worst], facts_by_rank)} is {duration(skew)} "
        f"{'ahead of' if ahead[worst] > 0 else 'behind'} that of {name_ranks([0], facts_by_rank)}"
    )
    return [Finding("clocks", "warning", text, "run chronyd or ntpd on both nodes", figures)]


def check_shared_disk(
    payloads: Payloads, facts_by_rank: FactsByRank, run_dir: str
) -> list[Finding]:
    """Warn if the nodes see different run directories, from each first rank's `disk.identify`."""
    firsts = [ranks[0].rank for ranks in by_node(facts_by_rank)]
    if len(firsts) == 1 or any("error" in payloads[rank] for rank in firsts):
        return []  # `check_disk` reports an error
    others = [rank for rank in firsts if payloads[rank]["identity"] != payloads[0]["identity"]]
    if not others:
        return [Finding("shared disk", "ok", f"all {len(firsts)} nodes see the same {run_dir}")]
    hosts = ", ".join(facts_by_rank[rank].host for rank in others)
    first = name_ranks([0], facts_by_rank)
    text = f"{hosts}: {run_dir} is not the directory that {first} writes to"
    remedy = "use a --run-dir that all nodes share if a restart may move rank 0 to another one"
    return [Finding("shared disk", "warning", text, remedy)]


def check_disk(payloads: Payloads, facts_by_rank: FactsByRank, run_dir: str) -> list[Finding]:
    """Require that rank 0's node can write, from each first rank's `disk.measure`.

    Other nodes that cannot are a warning: after a restart rank 0 may be there.
    """
    firsts = [ranks[0] for ranks in by_node(facts_by_rank)]
    findings = [
        finding
        for first in firsts
        for finding in _check_disk_of(payloads[first.rank], first.rank, first.host, run_dir)
    ]
    if findings:
        return findings
    first = payloads[0]
    where = run_dir if first["exists"] else f"{run_dir}, to be created in {first['directory']}"
    kind = f" {first['kind']}," if first["kind"] else ""
    text = (
        f"{where}:{kind} {amount(first['bytes_per_second'])}/s, a flush (fsync) takes "
        f"{duration(first['fsync_seconds'])}, {amount(first['free_bytes'])} free"
    )
    figures = {facts.host: payloads[facts.rank] for facts in firsts}
    return [Finding("disk", "ok", text, figures=figures)]


def _check_disk_of(
    payload: dict[str, Any], rank: int, host: str, run_dir: str
) -> Iterator[Finding]:
    """Report what a node cannot do with its disk; only rank 0's, which writes, must lock files."""
    level: Level = "problem" if rank == 0 else "warning"
    disk = f"--run-dir {run_dir}: {payload.get('directory', run_dir)} on {host}"
    if "error" in payload:
        text = f"{disk} cannot be written ({payload['error']})"
        yield Finding("disk", level, text, "use a writable directory")
    elif payload["free_bytes"] < _MIN_FREE_BYTES:
        text = f"{disk} has {amount(payload['free_bytes'])} left"
        yield Finding("disk", level, text, "free some space, or use another disk")
    elif rank == 0:
        if not payload["locks"]:
            risk = "cannot lock files: two jobs in one run directory do not notice each other"
            yield Finding("disk", "warning", f"{disk} {risk}", "use one --run-dir per job")
        if not payload["flushes_directories"]:
            risk = "cannot flush directories: a power loss may take the newest checkpoint"
            yield Finding("disk", "warning", f"{disk} {risk}", "prefer a local disk, ext4 or xfs")


def check_backend(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Require correct sums over the backend, from each rank's `allreduce_check.by_backend`."""
    backend = facts_by_rank[0].backend
    remedy = (
        "check that GLOO_SOCKET_IFNAME names an interface through which all nodes are reachable"
        if backend == "gloo"
        else "run it again with NCCL_DEBUG=INFO, which logs what NCCL tries"
    )
    return _check_sums("all-reduce", f"over {backend}", payloads, facts_by_rank, remedy)


def check_shared_memory(payloads: Payloads, facts_by_rank: FactsByRank) -> list[Finding]:
    """Require correct sums in shared memory, from `allreduce_check.by_shared_memory`."""
    for payload in payloads:
        if "unused" in payload:
            return [Finding("shared memory", "skipped", f"not used: {payload['unused']}")]
        if "refused" in payload:
            text = (
                f"the ranks of a node cannot share memory ({payload['refused']}); training uses "
                "gloo, which is slower"
            )
            remedy = "start all ranks of a node as one user in one container"
            return [Finding("shared memory", "warning", text, remedy)]
    remedy = "train with --shared-memory off"
    return _check_sums("shared memory", "in shared memory", payloads, facts_by_rank, remedy)


def _check_sums(
    check: str, where: str, payloads: Payloads, facts_by_rank: FactsByRank, remedy: str
) -> list[Finding]:
    what = f"sums {where} failed"
    if errors := find_errors(check, what, payloads, facts_by_rank, remedy):
        return errors
    sums_by_rank = [payload["sums"] for payload in payloads]
    wrong = [r for r, sums in enumerate(sums_by_rank) if not all(s["correct"] for s in sums)]
    if wrong:
        text = f"sums {where} are wrong on {name_ranks(wrong, facts_by_rank)}"
        return [Finding(check, "problem", text, f"suspect the memory there; {remedy}")]
    count, results, figures = len(payloads), [], []
    for sums in zip(*sums_by_rank, strict=True):
        size, seconds = sums[0]["bytes"], max(each["seconds"] for each in sums)
        # What nccl-tests call bus bandwidth: the traffic on each rank's link.
        rate = 2 * (count - 1) / count * size / seconds
        figures.append({"bytes": size, "seconds": seconds, "bytes_per_second": rate})
        speed = f" ({amount(rate)}/s)" if size > _LATENCY_BYTES else ""
        results.append(f"{amount(size)} in {duration(seconds)}{speed}")
    text = f"correct sums {where}: {', '.join(results)}"
    return [Finding(check, "ok", text, figures=figures)]
