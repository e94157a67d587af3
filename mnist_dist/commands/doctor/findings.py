"""What was found, said line by line as it comes, and the verdict in the end."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "problem", "skipped"]

_MARKS = {"ok": "ok", "warning": "warn", "problem": "FAIL", "skipped": "-"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """What to set or do; a warning and a problem have one."""
    figures: Any = None
    """What was measured, in plain types: seconds and bytes."""

    @property
    def line(self) -> str:
        """What was found and what to do."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass
class Report:
    """The findings of one examination, printed as text at once or as JSON at the end."""

    as_json: bool
    speaks: bool
    """Whether this process says what it finds."""
    findings: list[Finding] = field(default_factory=list)
    _about: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """A line that finds nothing, in text only."""
        if self.speaks and not self.as_json:
            print(line, flush=True)

    def describe(self, **about: Any) -> None:
        """Facts that JSON is to hold beside the findings."""
        self._about |= about

    def add(self, *findings: Finding) -> None:
        """Record and say what was found."""
        for finding in findings:
            self.findings.append(finding)
            self.say(f"  {_MARKS[finding.level]:<5} {finding.check:<13} {finding.line}")

    @property
    def healthy(self) -> bool:
        """Whether no problem was found; warnings are none."""
        return not any(finding.level == "problem" for finding in self.findings)

    def close(self, praise: str) -> None:
        """Say the verdict, which `praise` is where there is no problem."""
        problems = [finding for finding in self.findings if finding.level == "problem"]
        warnings = [finding for finding in self.findings if finding.level == "warning"]
        if problems:
            more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
            verdict = f"not all right: {problems[0].check}: {problems[0].line}{more}"
        elif warnings:
            count = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
            verdict = f"all right, with {count}: {praise}"
        else:
            verdict = f"all right: {praise}"
        self.say(verdict)
        if self.speaks and self.as_json:
            findings = [asdict(finding) for finding in self.findings]
            about = {"healthy": not problems, "verdict": verdict, **self._about}
            print(json.dumps(about | {"findings": findings}), flush=True)
