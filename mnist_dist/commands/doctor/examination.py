"""`mnist-dist doctor`: can processes that are started like this train here; if not, what to set.

mnist-dist doctor                                    this host
torchrun --nproc_per_node=4 -m mnist_dist doctor     four processes of it
srun python -m mnist_dist doctor                     one process per Slurm task
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

# Before torch, whose import takes seconds: it notes the parent that we are to end with.
from mnist_dist.distributed.launcher import Launch, leave_with_launcher, read_launch  # isort: skip

# What is wrong is said here in one line; torch's libraries would add forty to it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch.distributed import HashStore, Store

from mnist_dist.commands.doctor import disk, sums
from mnist_dist.commands.doctor.facts import Facts, gather_facts
from mnist_dist.commands.doctor.findings import Finding, Report
from mnist_dist.commands.doctor.judge_facts import judge_facts
from mnist_dist.commands.doctor.judge_measurements import (
    judge_backend,
    judge_clocks,
    judge_disks,
    judge_messages,
    judge_shared_memory,
    judge_sharing,
)
from mnist_dist.commands.doctor.messages import Listener, call_all
from mnist_dist.commands.doctor.table import Table
from mnist_dist.commands.doctor.wording import by_host, counted, introduce, name_ranks
from mnist_dist.distributed.failures import brief, lost_contact
from mnist_dist.distributed.rendezvous import meet
from mnist_dist.distributed.world import World, exit_with_error, form_group, leave
from mnist_dist.errors import MeetingError, ReportedError, UserError
from mnist_dist.flags import flag, parse_flags

# Parts of --timeout: for the ranks to meet, and for each of the later checks.
_TO_MEET, _EACH = 0.6, 0.2
# How long rank 0 waits for a rank whose check takes a little longer than it should.
_SLACK_S = 1.5
_LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class DoctorConfig:
    """Check whether the processes started with this command can train together.

    Start it as you start training: on its own, with
    `torchrun ... -m mnist_dist doctor` or with `srun ... python -m mnist_dist doctor`.
    Exit code 0: they can train together. Exit code 1: they cannot; the last line
    of rank 0 names the problem and the remedy.
    """

    run_dir: str = flag(
        "runs", metavar="DIR", help="directory for runs, whose disk is measured and left unchanged"
    )
    timeout: float = flag(
        25.0,
        metavar="SECONDS",
        help="time limit of all checks; the processes have three fifths of it to connect",
    )
    json: bool = flag(False, help="print one JSON object instead of text")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", help="device, as for training")
    backend: Literal["auto", "gloo", "nccl"] = flag("auto", help="backend, as for training")


class _OverError(Exception):
    """Nothing more can be asked: a rank is silent, or the ranks run unequal code."""


class Examination:
    """One rank's part: every rank looks and measures, rank 0 judges and speaks."""

    def __init__(self, launch: Launch, config: DoctorConfig) -> None:
        """Nothing is looked at yet."""
        self.launch = launch
        self.config = config
        self.report = Report(config.json, speaks=launch.rank == 0)
        self.stage = "start"
        self.code = 1
        self._deadline = time.monotonic() + config.timeout
        self._everybody: dict[int, Facts] = {}
        self._problems: set[str] = set()
        """The checks that found one: the same on all ranks."""

    def run(self) -> None:
        """Look at everything; `code` is this process's exit code afterwards."""
        try:
            self._examine()
        except Exception as error:
            if lost_contact(error):
                self._end_alone(f"lost contact with the others ({brief(error)})")
            else:
                traceback.print_exc()

    def give_up(self) -> None:
        """Say where the thread is stuck that is in `run`."""
        self._end_alone(f"still waits after {self.config.timeout:g} s")

    def _end_alone(self, what: str) -> None:
        """Say what became of this rank, of which no other may hear."""
        text = f"{name_ranks([self.launch.rank], {})} on {socket.gethostname()} {what}"
        remedy = "see what the other ranks say, or raise --timeout"
        finding = Finding(self.stage, "problem", text, remedy)
        if self.launch.rank == 0:
            self.report.add(finding)
            self._say_verdict()
        else:
            line = f"mnist-dist: error: {finding.check}: {finding.line}"
            print(line, file=sys.stderr, flush=True)

    def _examine(self) -> None:
        self._title()
        own, device = gather_facts(self.launch, self.config.device, self.config.backend)
        own, seat = _take_seat(own)
        self.stage = "meeting"
        try:
            store = self._meet()
        except MeetingError as error:
            self._end_unmet(own, error)
            return
        table = Table(store, self.launch.rank, self.launch.world_size)
        with contextlib.suppress(_OverError):
            seats = self._introduce(table, own, seat)
            self._check_messages(table, seats)
            self._check_disk(table)
            self._check_sums(table, store, device)
        self._end(table)

    def _title(self) -> None:
        processes = f"{self.launch.world_size} process{'es' * (self.launch.world_size > 1)}"
        self.report.say(f"mnist-dist doctor: {processes} ({self.launch.launcher})")

    def _meet(self) -> Store:
        if self.launch.world_size == 1:
            return HashStore()
        return meet(
            self.launch.rank,
            self.launch.world_size,
            self.launch.master_addr or "",
            self.launch.master_port or 0,
            self.launch.hosts_store,
            _TO_MEET * self.config.timeout,
            flag="--timeout",
        )

    def _end_unmet(self, own: Facts, error: MeetingError) -> None:
        """Each host's first rank says what it saw: no other can."""
        first_here = self.launch.local_rank == 0
        if first_here and not self.report.speaks:
            self.report.speaks = True
            self._title()
        self._introduced({own.rank: own})
        self.report.add(*judge_facts(self._everybody))
        self.report.add(Finding("meeting", "problem", str(error)))
        self._say_verdict()
        # A launcher stops all ranks when one ends, and others may still have something to say.
        if not first_here:
            time.sleep(max(0.0, self._deadline - _LAST_WORDS_S - time.monotonic()))
        elif self.launch.spans_hosts:
            time.sleep(_LAST_WORDS_S)

    def _round(
        self,
        table: Table,
        stage: str,
        act: Callable[[float], Any],
        judge: Callable[[list[Any]], list[Finding]],
    ) -> None:
        """Every rank acts, for so many seconds at most; rank 0 judges what each saw.

        Raises:
            _OverError: on all ranks, if one of them gave no answer.
        """
        self.stage = stage
        left = self._deadline - time.monotonic() - _SLACK_S
        seconds = max(1.0, min(_EACH * self.config.timeout, left))
        words = table.collect(stage, act(seconds), seconds + _SLACK_S)
        if self.launch.rank == 0:
            silent = [rank for rank, word in enumerate(words) if word is None]
            findings = [self._silence(stage, silent)] if silent else judge(words)
            self.report.add(*findings)
            problems = [finding.check for finding in findings if finding.level == "problem"]
            table.tell(stage, [bool(silent), problems])
        over, problems = table.hear(stage)
        self._problems.update(problems)
        if over:
            raise _OverError

    def _silence(self, stage: str, ranks: list[int]) -> Finding:
        text = f"{name_ranks(ranks, self._everybody)} gave no answer in time"
        remedy = "see that it is alive and what it says, or raise --timeout"
        return Finding(stage, "problem", text, remedy)

    def _introduce(self, table: Table, own: Facts, seat: dict[str, Any]) -> list[dict[str, Any]]:
        """Let all know all; returns where each rank listens.

        Raises:
            _OverError: on all ranks, if they do not run the same code.
        """

        def judge(words: list[Any]) -> list[Finding]:
            table.tell("everybody", words)
            self._introduced({rank: Facts(**word["facts"]) for rank, word in enumerate(words)})
            return [*self._met(), *judge_facts(self._everybody)]

        mine = {"facts": dataclasses.asdict(own), "seat": seat}
        self._round(table, "facts", lambda seconds: mine, judge)
        if "versions" in self._problems:
            self._skip("the rest", "all ranks must run the same versions first")
            raise _OverError
        words = table.hear("everybody")
        self._everybody = {rank: Facts(**word["facts"]) for rank, word in enumerate(words)}
        return [word["seat"] for word in words]

    def _introduced(self, everybody: dict[int, Facts]) -> None:
        """Say who is there."""
        self._everybody = everybody
        self.report.describe(
            launcher=self.launch.launcher,
            world_size=self.launch.world_size,
            ranks=[dataclasses.asdict(facts) for facts in everybody.values()],
        )
        for line in introduce(everybody):
            self.report.say(line)

    def _met(self) -> list[Finding]:
        if self.launch.world_size == 1:
            return []
        where = f"{self.launch.master_addr}:{self.launch.master_port}"
        return [Finding("meeting", "ok", f"{self.launch.world_size} ranks came to {where}")]

    def _skip(self, check: str, why: str) -> None:
        self.report.add(Finding(check, "skipped", f"not checked: {why}"))

    def _check_messages(self, table: Table, seats: list[dict[str, Any]]) -> None:
        if self.launch.world_size == 1:
            return
        if "interface" in self._problems:
            self._skip("messages", "mend the interface first")
            return
        others = {rank: seat for rank, seat in enumerate(seats) if rank != self.launch.rank}
        self._round(
            table,
            "messages",
            lambda seconds: call_all(others, seconds),
            lambda words: [
                *judge_messages(words, self._everybody),
                *judge_clocks(words, self._everybody),
            ],
        )

    def _check_disk(self, table: Table) -> None:
        """The first rank of each host looks at the run directory; all look before one writes."""
        first_here = self.launch.local_rank == 0
        run_dir = Path(self.config.run_dir).expanduser().absolute()
        look: dict[str, Any] = {}
        looks: list[Any] = []

        def act(seconds: float) -> dict[str, Any]:
            if first_here:
                look.update(disk.look(run_dir, self._everybody[self.launch.rank].boot))
            return look

        def judge(words: list[Any]) -> list[Finding]:
            looks.extend(words)
            return judge_sharing(words, self._everybody, self.config.run_dir)

        self._round(table, "shared disk", act, judge)
        self._round(
            table,
            "disk",
            lambda seconds: disk.measure(look) if first_here else {},
            lambda words: judge_disks(words, looks, self._everybody, self.config.run_dir),
        )

    def _check_sums(self, table: Table, store: Store, device: torch.device) -> None:
        if self.launch.world_size == 1:
            self._skip("other ranks", "start it with torchrun or srun, as you start training")
            return
        if blocked := self._problems & {"devices", "interface", "messages"}:
            self._skip("all-reduce", f"mend {' and '.join(sorted(blocked))} first")
            return
        backend = self._everybody[self.launch.rank].backend
        worlds: list[World] = []

        def by_backend(seconds: float) -> dict[str, Any]:
            # NCCL's own watch would end the process before it could say anything.
            patience = seconds if backend == "gloo" else 10 * self.config.timeout
            try:
                worlds.append(form_group(self.launch, device, backend, store, patience))
            except RuntimeError as error:
                return {"error": brief(error)}
            return sums.by_backend(worlds[0])

        self._round(
            table, "all-reduce", by_backend, lambda words: judge_backend(words, self._everybody)
        )
        if "all-reduce" not in self._problems:
            self._round(
                table,
                "shared memory",
                lambda seconds: sums.by_shared_memory(worlds[0], seconds),
                lambda words: judge_shared_memory(words, self._everybody),
            )

    def _say_verdict(self) -> None:
        count, hosts = self.launch.world_size, len(by_host(self._everybody))
        together = f"{count} ranks on {counted(hosts, 'host')} can train together"
        self.report.close(together if count > 1 else "this process can train here")

    def _end(self, table: Table) -> None:
        """Rank 0 speaks the verdict; the others end after that, with the same exit code."""
        self.stage = "verdict"
        if self.launch.rank == 0:
            self._say_verdict()
            table.tell("verdict", 0 if self.report.healthy else 1)
        self.code = table.hear("verdict")
        # Rank 0 may host the store: it stays until all have heard.
        table.collect("heard", True, _LAST_WORDS_S)


def _take_seat(own: Facts) -> tuple[Facts, dict[str, Any]]:
    """Listen for the other ranks' calls where gloo would; the facts tell if that cannot be."""
    if own.interface_error:
        return own, {}
    try:
        return own, Listener(own.address).seat
    except OSError as error:
        why = f"cannot listen on {own.interface} {own.address} ({error.strerror or error})"
        return dataclasses.replace(own, interface_error=why), {}


def parse(argv: Sequence[str]) -> DoctorConfig:
    """Read the flags.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
    """
    config = parse_flags(DoctorConfig, argv, "mnist-dist doctor")
    if not 5 <= config.timeout <= 3600:
        raise UserError(f"--timeout {config.timeout:g}: give 5 to 3600 seconds")
    if not config.run_dir:
        raise UserError("--run-dir: give a path, or leave the flag out")
    if config.backend == "nccl" and config.device == "cpu":
        raise UserError("--backend nccl: nccl needs GPUs; use gloo with --device cpu")
    return config


def main(argv: Sequence[str]) -> int:
    """Examine; returns the process's exit code."""
    launch = Launch("alone")
    try:
        launch = read_launch()
        config = parse(argv)
    except ReportedError as error:
        return exit_with_error(launch, error)
    if launch.launcher != "alone":
        leave_with_launcher(launch.rank)
    examination = Examination(launch, config)
    # What hangs for ever, such as a network's disk or a store whose host is gone, hangs in here.
    thread = threading.Thread(target=examination.run, daemon=True)
    thread.start()
    thread.join(config.timeout)
    if thread.is_alive():
        examination.give_up()
    return examination.code


def run(argv: Sequence[str]) -> NoReturn:
    """`main` as a process of its own, which really ends."""
    try:
        code = main(argv)
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
