"""Ranks, hosts and quantities as a person reads them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from mnist_dist.commands.doctor.facts import Facts

Everybody = Mapping[int, Facts]
"""The ranks that are known, by rank."""


def by_host(everybody: Everybody) -> list[list[Facts]]:
    """The ranks of each host, hosts in the order of their first ranks."""
    hosts: dict[int, list[Facts]] = defaultdict(list)
    for _, facts in sorted(everybody.items()):
        hosts[facts.node_rank].append(facts)
    return list(hosts.values())


def name_ranks(ranks: Iterable[int], everybody: Everybody) -> str:
    """Ranks and their hosts: `rank 1 on n2`, `ranks 0-3 on n1, 4 on n2`; `rank 1` if unknown."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        places[f" on {everybody[rank].host}" if rank in everybody else ""].append(rank)
    several = sum(map(len, places.values())) > 1
    named = ", ".join(f"{spans(numbers)}{place}" for place, numbers in places.items())
    return f"rank{'s' if several else ''} {named}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers in order, runs of them drawn together: `0-3, 6`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def counted(count: int, noun: str) -> str:
    """`1 CPU`, `2 CPUs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Two digits and a unit: `0.12 ms`, `3.4 s`. ASCII alone: a log may take nothing else."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"


def amount(count: float) -> str:
    """Bytes in thousands: `541 kB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def introduce(everybody: Everybody) -> list[str]:
    """Who is there: a line for each host, and one for each of its ranks that differ."""
    lines = []
    for ranks in by_host(everybody):
        first = ranks[0]
        addresses = [f"{name} {address}" for name, address in first.interfaces.items() if address]
        system = first.environment["platform"].partition("-with-")[0]
        lines.append(f"  {first.host}: {system}, {', '.join(addresses)}")
        alike: dict[str, list[int]] = defaultdict(list)
        for facts in ranks:
            threads = counted(facts.threads, "thread")
            alike[f"{facts.device}, {threads} on CPUs {spans(facts.cpus)}"].append(facts.rank)
        lines += [f"    {name_ranks(numbers, {})}: {what}" for what, numbers in alike.items()]
    return lines
