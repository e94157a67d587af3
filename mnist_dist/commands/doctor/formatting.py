"""Format ranks, nodes and quantities for people."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from mnist_dist.commands.doctor.facts import Facts
from mnist_dist.distributed.failures import format_ranges
from mnist_dist.errors import counted

FactsByRank = Mapping[int, Facts]
"""The known ranks."""


def by_node(facts_by_rank: FactsByRank) -> list[list[Facts]]:
    """Group the ranks by node, nodes in the order of their first ranks."""
    nodes: dict[int, list[Facts]] = defaultdict(list)
    for _, facts in sorted(facts_by_rank.items()):
        nodes[facts.node_rank].append(facts)
    return list(nodes.values())


def name_ranks(ranks: Iterable[int], facts_by_rank: FactsByRank) -> str:
    """Format ranks with their hosts, if known: `rank 1 on n2`, `ranks 0-3 on n1, 4 on n2`."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        places[f" on {facts_by_rank[rank].host}" if rank in facts_by_rank else ""].append(rank)
    several = sum(map(len, places.values())) > 1
    named = ", ".join(f"{format_ranges(numbers)}{place}" for place, numbers in places.items())
    return f"rank{'s' if several else ''} {named}"


def difference(values: Mapping[int, str | None], facts_by_rank: FactsByRank) -> str:
    """Format who has which value: `rank 0 on n1 has 1; rank 1 on n2 has 2`; "" if all are equal."""
    holders: dict[str | None, list[int]] = defaultdict(list)
    for rank, value in values.items():
        holders[value].append(rank)
    if len(holders) < 2:
        return ""
    return "; ".join(f"{name_ranks(ranks, facts_by_rank)} has {v}" for v, ranks in holders.items())


def duration(seconds: float) -> str:
    """Format seconds with two digits and a unit: `0.12 ms`, `3.4 s`. ASCII, for any log."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"


def amount(count: float) -> str:
    """Format bytes in decimal units: `541 kB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def describe_ranks(facts_by_rank: FactsByRank) -> list[str]:
    """Describe each node in one line, and its ranks in one line for each group of equal ones."""
    lines = []
    for ranks in by_node(facts_by_rank):
        first = ranks[0]
        addresses = [f"{name} {address}" for name, address in first.interfaces.items() if address]
        system = first.environment["platform"].partition("-with-")[0]
        lines.append(f"  {first.host}: {system}, {', '.join(addresses)}")
        groups: dict[str, list[int]] = defaultdict(list)
        for facts in ranks:
            threads = counted(facts.threads, "thread")
            cpus = format_ranges(facts.cpus)
            groups[f"{facts.device}, {threads} on CPUs {cpus}"].append(facts.rank)
        lines += [f"    {name_ranks(numbers, {})}: {text}" for text, numbers in groups.items()]
    return lines
