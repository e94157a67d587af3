"""What checks find, in words: the ranks it concerns, and the report it is printed in."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from mnist_dist.commands.doctor.facts import Facts
from mnist_dist.distributed.failures import format_ranges, format_ranks
from mnist_dist.errors import JobError, counted, print_line, print_result

T = TypeVar("T")

Level = Literal["ok", "warning", "problem", "skipped"]

FactsByRank = Mapping[int, Facts]
"""The known ranks."""

Payloads = Sequence[Any]
"""What each rank measured, in rank order."""

_MARKS = {"ok": "ok", "warning": "warn", "problem": "FAIL", "skipped": "skip"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """What to set or do after a warning or a problem."""
    figures: Any = None
    """Measurements in plain types, in seconds and bytes."""

    @property
    def line(self) -> str:
        """The text and the remedy."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def find_each(
    check: str, level: Level, texts: Mapping[int, str], remedy: str, facts_by_rank: FactsByRank
) -> list[Finding]:
    """Return a finding for each different text, which names the ranks that have it."""
    return [
        Finding(check, level, f"{name_ranks(ranks, facts_by_rank)}: {text}", remedy)
        for text, ranks in ranks_by_value(texts).items()
    ]


def find_difference(
    check: str,
    level: Level,
    name: str,
    values: Mapping[int, str | None],
    remedy: str,
    facts_by_rank: FactsByRank,
) -> list[Finding]:
    """Return a finding that lists which ranks have which value; none if all have the same."""
    differing = difference(values, facts_by_rank)
    return [Finding(check, level, f"{name} differs: {differing}", remedy)] if differing else []


@dataclass
class Report:
    """The findings of one examination, printed as text at once or as JSON at the end."""

    as_json: bool
    enabled: bool
    """Whether this process prints."""
    context: dict[str, Any] = field(default_factory=dict)
    """What the JSON object holds besides the findings."""
    findings: list[Finding] = field(default_factory=list)
    is_lost: bool = False
    """Whether the report could not be written, to a full disk for example."""

    def print(self, line: str) -> None:
        """Print `line`, in text mode only."""
        if self.enabled and not self.as_json:
            self._write(line)

    def add(self, *findings: Finding) -> None:
        """Record and print findings."""
        for finding in findings:
            self.findings.append(finding)
            self.print(f"  {_MARKS[finding.level]:<5} {finding.check:<13} {finding.line}")

    @property
    def healthy(self) -> bool:
        """Whether no check failed and the report is written; a warning is no failure."""
        return not self._of_level("problem") and not self.is_lost

    def close(self, success: str) -> None:
        """Print the verdict, which is `success` if no check failed."""
        problems, warnings = self._of_level("problem"), self._of_level("warning")
        if problems:
            more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
            verdict = f"FAILED: {problems[0].check}: {problems[0].line}{more}"
        elif warnings:
            verdict = f"OK, with {counted(len(warnings), 'warning')}: {success}"
        else:
            verdict = f"OK: {success}"
        self.print(verdict)
        if self.enabled and self.as_json:
            findings = [asdict(finding) for finding in self.findings]
            summary = {"healthy": self.healthy, "verdict": verdict, **self.context}
            self._write(json.dumps(summary | {"findings": findings}))

    def _write(self, line: str) -> None:
        try:
            if not self.is_lost:
                print_result(line)
        except JobError as error:
            self.is_lost = True
            print_line(f"error: {error}")

    def _of_level(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]


def ranks_by_value(values: Mapping[int, T]) -> dict[T, list[int]]:
    """Group ranks, of which `values` has the value of each."""
    ranks: dict[T, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    return ranks


def by_node(facts_by_rank: FactsByRank) -> list[list[Facts]]:
    """Group the ranks by node, nodes in the order of their first ranks."""
    nodes = ranks_by_value({rank: f.node_rank for rank, f in sorted(facts_by_rank.items())})
    return [[facts_by_rank[rank] for rank in ranks] for ranks in nodes.values()]


def name_ranks(ranks: Iterable[int], facts_by_rank: FactsByRank) -> str:
    """Format ranks with their hosts, if known: `rank 1 on n2`, `ranks 0-3 on n1, 4 on n2`."""
    places = ranks_by_value(
        {r: f" on {facts_by_rank[r].host}" if r in facts_by_rank else "" for r in sorted(ranks)}
    )
    several = sum(map(len, places.values())) > 1
    named = ", ".join(f"{format_ranges(numbers)}{place}" for place, numbers in places.items())
    return f"rank{'s' if several else ''} {named}"


def difference(values: Mapping[int, str | None], facts_by_rank: FactsByRank) -> str:
    """Format who has which value: `rank 0 on n1 has 1; rank 1 on n2 has 2`; "" if all are equal."""
    holders = ranks_by_value(values)
    if len(holders) < 2:
        return ""
    return "; ".join(f"{name_ranks(ranks, facts_by_rank)} has {v}" for v, ranks in holders.items())


def find_errors(
    check: str, what: str, payloads: Payloads, facts_by_rank: FactsByRank, remedy: str = ""
) -> list[Finding]:
    """Return a finding that names all ranks with an `error` in place of a measurement, if any."""
    errors = {rank: each["error"] for rank, each in enumerate(payloads) if "error" in each}
    if not errors:
        return []
    text = f"{what} on {name_ranks(errors, facts_by_rank)}: {errors[min(errors)]}"
    return [Finding(check, "problem", text, remedy)]


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
        resources = {
            f.rank: f"{f.device}, {counted(f.threads, 'thread')} on CPUs {format_ranges(f.cpus)}"
            for f in ranks
        }
        for text, numbers in ranks_by_value(resources).items():
            lines.append(f"    {format_ranks(numbers)}: {text}")
    return lines
