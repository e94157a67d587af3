"""What the ranks' measurements mean: pure functions from them to findings."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mnist_dist.commands.doctor.findings import Finding, Level
from mnist_dist.commands.doctor.wording import (
    Everybody,
    amount,
    by_host,
    counted,
    duration,
    name_ranks,
)

Words = Sequence[Any]
"""What each rank saw, in rank order."""

_SKEW_S = 1.0
_ROOM_BYTES = 64 << 20
# A sum of so little measures no bandwidth.
_LATENCY_BYTES = 4096


def judge_messages(words: Words, everybody: Everybody) -> list[Finding]:
    """Every rank must have reached every other; a word is a rank's `call_all`."""
    failed: dict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    trips: dict[tuple[int, int], float] = {}
    for caller, calls in enumerate(words):
        for name, made in calls.items():
            called = int(name)
            if made["error"]:
                hosts = (everybody[caller].node_rank, everybody[called].node_rank)
                failed[hosts].append((caller, called, made["error"]))
            else:
                trips[caller, called] = made["round_trip"]
    if failed:
        return [_unreached(pairs, everybody) for pairs in failed.values()]
    slowest, quickest = max(trips, key=trips.__getitem__), min(trips.values())
    pairs = counted(len(trips) // 2, "pair")
    text = f"{pairs} of ranks, both ways: a round trip takes {duration(quickest)}"
    if len(trips) > 2:
        text += f" to {duration(trips[slowest])} ({slowest[0]} to {slowest[1]})"
    each = [{"from": a, "to": b, "seconds": seconds} for (a, b), seconds in trips.items()]
    return [Finding("messages", "ok", text, figures=each)]


def _unreached(pairs: list[tuple[int, int, str]], everybody: Everybody) -> Finding:
    """One finding for all the pairs between two hosts, in one direction."""
    caller, called, error = pairs[0]
    target = everybody[called]
    over = f" over {everybody[caller].interface}" if everybody[caller].interface else ""
    text = (
        f"{name_ranks([caller], everybody)} cannot reach {name_ranks([called], everybody)} "
        f"at {target.address}{over}: {error}"
    )
    if len(pairs) > 1:
        text += f" (as {counted(len(pairs) - 1, 'other pair')} of these hosts)"
    remedy = (
        "let these hosts open every TCP port to each other, or set GLOO_SOCKET_IFNAME to an "
        "interface by which they can"
    )
    return Finding("messages", "problem", text, remedy)


def judge_clocks(words: Words, everybody: Everybody) -> list[Finding]:
    """The other ranks' clocks as rank 0 saw them in its calls."""
    ahead = {int(rank): made["clock"] for rank, made in words[0].items() if not made["error"]}
    if not ahead:
        return []
    worst = max(ahead, key=lambda rank: abs(ahead[rank]))
    skew, figures = abs(ahead[worst]), {"seconds_ahead_of_rank_0": ahead}
    if skew < _SKEW_S:
        return [Finding("clocks", "ok", f"within {duration(skew)} of rank 0's", figures=figures)]
    text = (
        f"the clock of {name_ranks([worst], everybody)} is {duration(skew)} "
        f"{'ahead of' if ahead[worst] > 0 else 'behind'} that of {name_ranks([0], everybody)}"
    )
    return [Finding("clocks", "warning", text, "run chronyd or ntpd on both hosts", figures)]


def judge_sharing(words: Words, everybody: Everybody, run_dir: str) -> list[Finding]:
    """Whether all hosts see the same run directory, by their first ranks' `disk.look`."""
    firsts = [ranks[0].rank for ranks in by_host(everybody)]
    if len(firsts) == 1 or any("error" in words[rank] for rank in firsts):
        return []  # an error is the disk's own finding
    apart = [rank for rank in firsts if words[rank]["identity"] != words[0]["identity"]]
    if not apart:
        return [Finding("shared disk", "ok", f"all {len(firsts)} hosts see the same {run_dir}")]
    hosts = ", ".join(everybody[rank].host for rank in apart)
    text = f"{hosts}: {run_dir} is not the directory that rank 0 on {everybody[0].host} writes to"
    remedy = "give a --run-dir that all share, if a restart may put rank 0 on another host"
    return [Finding("shared disk", "warning", text, remedy)]


def judge_disks(words: Words, looks: Words, everybody: Everybody, run_dir: str) -> list[Finding]:
    """Rank 0's host must be able to write; the others too, should rank 0 be there one day."""
    findings = []
    for ranks in by_host(everybody):
        first = ranks[0]
        word = words[first.rank]
        level: Level = "problem" if first.rank == 0 else "warning"
        place = looks[first.rank].get("directory", run_dir)
        text = f"--run-dir {run_dir}: {place} on {first.host}"
        remedy = "name a directory that can be written"
        if "error" in word:
            text = f"{text} cannot be written ({word['error']})"
            findings.append(Finding("disk", level, text, remedy))
        elif word["free_bytes"] < _ROOM_BYTES:
            text = f"{text} has {amount(word['free_bytes'])} left"
            findings.append(Finding("disk", level, text, "make room or name another directory"))
    if findings:
        return findings
    word, look = words[0], looks[0]
    where = run_dir if look["exists"] else f"{run_dir}, to be made in {look['directory']}"
    kind = f" {look['kind']}," if look["kind"] else ""
    text = (
        f"{where}:{kind} {amount(word['bytes_per_second'])}/s, a flush (fsync) takes "
        f"{duration(word['fsync_seconds'])}, {amount(word['free_bytes'])} free"
    )
    firsts = {ranks[0].host: ranks[0].rank for ranks in by_host(everybody)}
    figures = {host: looks[rank] | words[rank] for host, rank in firsts.items()}
    return [Finding("disk", "ok", text, figures=figures)]


def judge_backend(words: Words, everybody: Everybody) -> list[Finding]:
    """The backend's sums; a word is a rank's `sums.by_backend`."""
    backend = everybody[0].backend
    remedy = (
        "see that GLOO_SOCKET_IFNAME names an interface by which all hosts reach each other"
        if backend == "gloo"
        else "run it again with NCCL_DEBUG=INFO, which says what NCCL tries"
    )
    return _judge_sums("all-reduce", f"over {backend}", words, everybody, remedy)


def judge_shared_memory(words: Words, everybody: Everybody) -> list[Finding]:
    """The sums between the ranks of a host; a word is a rank's `sums.by_shared_memory`."""
    for word in words:
        if "unused" in word:
            return [Finding("shared memory", "skipped", f"not used: {word['unused']}")]
        if "refused" in word:
            text = f"the ranks of a host share no memory ({word['refused']}): gloo, slower, adds up"
            remedy = "start all ranks of a host as one user in one container"
            return [Finding("shared memory", "warning", text, remedy)]
    remedy = "train with --shared-memory off"
    return _judge_sums("shared memory", "in shared memory", words, everybody, remedy)


def _judge_sums(
    check: str, way: str, words: Words, everybody: Everybody, remedy: str
) -> list[Finding]:
    if failed := {rank: word["error"] for rank, word in enumerate(words) if "error" in word}:
        text = f"sums {way} failed on {name_ranks(failed, everybody)}: {failed[min(failed)]}"
        return [Finding(check, "problem", text, remedy)]
    wrong = [rank for rank, word in enumerate(words) if not all(s["right"] for s in word["sums"])]
    if wrong:
        text = f"sums {way} are wrong on {name_ranks(wrong, everybody)}"
        return [Finding(check, "problem", text, f"suspect the memory there; {remedy}")]
    count, parts, figures = len(words), [], []
    for each in zip(*(word["sums"] for word in words), strict=True):
        size, seconds = each[0]["bytes"], max(one["seconds"] for one in each)
        # What nccl-tests call bus bandwidth: the traffic that each rank's own link must carry.
        rate = 2 * (count - 1) / count * size / seconds
        figures.append({"bytes": size, "seconds": seconds, "bytes_per_second": rate})
        speed = f" ({amount(rate)}/s)" if size > _LATENCY_BYTES else ""
        parts.append(f"{amount(size)} in {duration(seconds)}{speed}")
    text = f"right sums {way}: {', '.join(parts)}"
    return [Finding(check, "ok", text, figures=figures)]
