"""What the ranks' facts mean: pure functions from them to findings."""

from collections import defaultdict
from collections.abc import Mapping

from mnist_dist.commands.doctor.findings import Finding, Level
from mnist_dist.commands.doctor.wording import Everybody, by_host, counted, name_ranks, spans

_VERSIONS = ("mnist_dist", "torch", "cuda", "python", "numpy")
# Unequal ones may change numbers or the way ranks talk.
_MUST_BE_EQUAL = ("torch", "cuda")


def judge_facts(everybody: Everybody) -> list[Finding]:
    """Everything that can be judged before the ranks do anything together."""
    judges = (judge_versions, judge_devices, judge_threads, judge_interfaces, judge_settings)
    return [finding for judge in judges for finding in judge(everybody)]


def judge_versions(everybody: Everybody) -> list[Finding]:
    """Code and torch must be equal; other versions had better be."""
    findings: list[Finding] = []
    if len({facts.code for facts in everybody.values()}) > 1:
        codes = {r: f"{f.code[:8]} in {f.code_directory}" for r, f in everybody.items()}
        text = f"the code of mnist_dist differs: {_difference(codes, everybody)}"
        remedy = "install the same commit for every rank"
        findings.append(Finding("versions", "problem", text, remedy))
    for name in _VERSIONS:
        versions = {rank: facts.environment[name] for rank, facts in everybody.items()}
        if which := _difference(versions, everybody):
            level: Level = "problem" if name in _MUST_BE_EQUAL else "warning"
            remedy = f"install one version of {name} for every rank"
            findings.append(Finding("versions", level, f"{name} differs: {which}", remedy))
    if findings:
        return findings
    first = next(iter(everybody.values()))
    names = [name for name in _VERSIONS if first.environment[name]]
    listed = [f"{name.replace('_', '-')} {first.environment[name]}" for name in names]
    commit = first.environment["git_commit"]
    listed.append(f"code {first.code[:8]}" + (f" (commit {_short(commit)})" if commit else ""))
    alike = "; the same for all ranks" if len(everybody) > 1 else ""
    return [Finding("versions", "ok", ", ".join(listed) + alike)]


def judge_devices(everybody: Everybody) -> list[Finding]:
    """Every rank must have a device, all of one kind."""
    findings: list[Finding] = []
    for facts in everybody.values():
        if facts.device_error and not findings:
            text = f"{name_ranks([facts.rank], everybody)}: {facts.device_error}"
            findings.append(Finding("devices", "problem", text))
    kinds = {rank: facts.device.partition(":")[0] for rank, facts in everybody.items()}
    if not findings and (which := _difference(kinds, everybody)):
        remedy = "see why torch sees no GPU there (nvidia-smi), or train with --device cpu"
        findings.append(Finding("devices", "problem", f"the device differs: {which}", remedy))
    if blind := [f.rank for f in everybody.values() if f.gpu_files and not f.gpus]:
        text = f"{name_ranks(blind, everybody)}: the host has a GPU that torch does not see"
        remedy = "install a torch for CUDA that the driver supports (nvidia-smi names its version)"
        findings.append(Finding("devices", "warning", text, remedy))
    if findings:
        return findings
    first = next(iter(everybody.values()))
    kind = first.device.partition(":")[0]
    model = f" ({first.gpus[0]})" if kind == "cuda" and first.gpus else ""
    each = "each rank has a GPU" if kind == "cuda" else "each rank computes on the CPU"
    talk = f"; they talk over {first.backend}" if len(everybody) > 1 else ""
    return [Finding("devices", "ok", f"{each}{model}{talk}")]


def judge_threads(everybody: Everybody) -> list[Finding]:
    """The ranks of a host must not want more CPUs at once than they have."""
    findings = []
    for ranks in by_host(everybody):
        numbers = {cpu for facts in ranks for cpu in facts.cpus}
        cpus = min(len(numbers), max(facts.cpus_at_once for facts in ranks) * len(ranks))
        threads = sum(facts.threads for facts in ranks)
        who = name_ranks((facts.rank for facts in ranks), everybody)
        if cpus < len(ranks):
            text = f"{who}: {len(ranks)} ranks share {counted(cpus, 'CPU')} ({spans(numbers)})"
            remedy = "start fewer, or give each its own (srun --cpus-per-task=N)"
            findings.append(Finding("threads", "warning", text, remedy))
        elif threads > cpus:
            text = f"{who}: {threads} threads on {counted(cpus, 'CPU')} ({spans(numbers)})"
            remedy = f"unset OMP_NUM_THREADS or set it to {cpus // len(ranks)}"
            findings.append(Finding("threads", "warning", text, remedy))
    if findings:
        return findings
    wanted = sorted({facts.threads for facts in everybody.values()})
    each = counted(wanted[0], "thread") if len(wanted) == 1 else f"{spans(wanted)} threads"
    return [Finding("threads", "ok", f"{each} for each rank, and CPUs for all of them")]


def judge_interfaces(everybody: Everybody) -> list[Finding]:
    """The interface that was asked for must be there, and lead to the other hosts."""
    wrong = defaultdict(list)
    for facts in everybody.values():
        if facts.interface_error:
            wrong[facts.interface_error].append(facts)
    findings = []
    for error, here in wrong.items():
        text = f"{error} ({name_ranks((facts.rank for facts in here), everybody)})"
        known = here[0].interfaces.items()
        outward = [n for n, address in known if address and not address.startswith("127.")]
        choices = " or ".join([*outward, *([] if here[0].spans_hosts else ["lo"])])
        remedy = f"set it to {choices}, or unset it" if choices else "unset it"
        findings.append(Finding("interface", "problem", text, remedy))
    if findings or len(everybody) == 1:
        return findings
    used = list(dict.fromkeys(f"{f.interface} {f.address}".strip() for f in everybody.values()))
    more = f" and {len(used) - 4} more" if len(used) > 4 else ""
    return [Finding("interface", "ok", f"over {', '.join(used[:4])}{more}")]


def judge_settings(everybody: Everybody) -> list[Finding]:
    """The variables that steer the backends had better be alike."""
    findings: list[Finding] = []
    alike = []
    for name in sorted({name for facts in everybody.values() for name in facts.settings}):
        values = {rank: facts.settings.get(name, "unset") for rank, facts in everybody.items()}
        which = _difference(values, everybody)
        if not which:
            alike.append(f"{name}={next(iter(values.values()))}")
        elif name != "CUDA_VISIBLE_DEVICES":  # some launchers give each rank its own GPU
            remedy = "export the same value for every rank, unless hosts differ in this"
            findings.append(Finding("settings", "warning", f"{name} differs: {which}", remedy))
    if alike and not findings:
        findings.append(Finding("settings", "ok", ", ".join(alike)))
    return findings


def _difference(values: Mapping[int, str | None], everybody: Everybody) -> str:
    """Who has which: `rank 0 on n1 has 2.13.0; rank 1 on n2 has 2.12.0`; empty if all are equal."""
    holders: dict[str | None, list[int]] = defaultdict(list)
    for rank, value in values.items():
        holders[value].append(rank)
    if len(holders) == 1:
        return ""
    return "; ".join(f"{name_ranks(ranks, everybody)} has {v}" for v, ranks in holders.items())


def _short(commit: str) -> str:
    name, _, dirty = commit.partition("-")
    return name[:8] + (f"-{dirty}" if dirty else "")
