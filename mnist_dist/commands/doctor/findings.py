"""Findings, printed line by line as they come, and the verdict at the end."""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mnist_dist.errors import counted, print_line

Level = Literal["ok", "warning", "problem", "skipped"]

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
            print(line, flush=True)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # the reader has exited, as after `| head`
                self.is_lost = True
                print_line(f"error: the report cannot be written ({error.strerror})")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _of_level(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]
