"""Examine the ranks of one launch: every rank measures, rank 0 checks and prints.

The ranks exchange results through their store alone, which works where a backend does not.
"""

import dataclasses
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore, Store

from mnist_dist.commands.doctor import allreduce_check, checks, disk, gpu_checks, gpus
from mnist_dist.commands.doctor.config import DoctorConfig
from mnist_dist.commands.doctor.facts import Facts, gather_facts
from mnist_dist.commands.doctor.findings import (
    Finding,
    Payloads,
    Report,
    by_node,
    describe_ranks,
    name_ranks,
)
from mnist_dist.commands.doctor.tcp_check import connect_to_all, listen
from mnist_dist.distributed.failures import brief, is_comm_error
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.process_group import init_process_group
from mnist_dist.distributed.rendezvous import rendezvous
from mnist_dist.distributed.store import StoreMailbox
from mnist_dist.distributed.world import World
from mnist_dist.errors import RendezvousError, ReportedError, counted, print_line

# Shares of --timeout: for the rendezvous, and for each later stage.
_RENDEZVOUS_SHARE, _STAGE_SHARE = 0.6, 0.2
# How long rank 0 waits for a rank that takes a little longer than a stage should.
_SLACK_S = 1.5
# How long a rank stays for others that may still have to print or read something.
_LINGER_S = 2.0

_FOR_ALL_REDUCE = {"devices", "gpu test", "interface", "messages"}
# The checks without which a stage is skipped.
_NEEDED = {
    "messages": {"interface"},
    "clocks": {"interface"},
    "all-reduce": _FOR_ALL_REDUCE,
    "shared memory": _FOR_ALL_REDUCE | {"all-reduce"},
    "arithmetic": {"devices", "gpu test"},
    "training": _FOR_ALL_REDUCE | {"all-reduce", "arithmetic"},
}


class _StopError(Exception):
    """No further check is possible on any rank; the text gives what to fix first."""


class Examination:
    """One rank's part in an examination."""

    def __init__(self, launch: Launch, config: DoctorConfig) -> None:
        """Prepare; the time starts now."""
        self.exit_code = 1
        self._launch = launch
        self._config = config
        self._report = Report(config.json, enabled=launch.rank == 0)
        self._deadline = time.monotonic() + config.timeout
        self._stage = "start"
        self._mailbox: StoreMailbox
        self._world: World
        self._facts_by_rank: dict[int, Facts] = {}
        """Of every rank on rank 0, else empty."""
        self._failed: set[str] = set()
        """Names of the failed checks, the same on every rank."""

    def run(self) -> None:
        """Make all checks and set `exit_code`; may block forever."""
        try:
            self._examine()
        except Exception as error:
            if is_comm_error(error):
                self._fail_alone(f"lost its connection to the other ranks ({brief(error)})")
            else:
                traceback.print_exc()

    def time_out(self) -> None:
        """Print in which stage `run` is blocked."""
        self._fail_alone(f"is still waiting after {self._config.timeout:g} s")

    def _fail_alone(self, text: str) -> None:
        """Print a failure that this rank cannot report to its peers."""
        text = f"rank {self._launch.rank} on {socket.gethostname()} {text}"
        remedy = "see the output of the other ranks, or raise --timeout"
        finding = Finding(self._stage, "problem", text, remedy)
        if self._launch.rank == 0:
            self._report.add(finding)
            self._print_verdict()
        else:
            print_line(f"error: {finding.check}: {finding.line}")

    def _examine(self) -> None:
        self._report.print(f"mnist-dist doctor: {self._launch.description}")
        facts, device = gather_facts(self._launch, self._config.device, self._config.backend)
        facts, endpoint = listen(facts)
        self._stage = "rendezvous"
        try:
            store = self._rendezvous()
        except RendezvousError as error:
            self._end_without_rendezvous(facts, error)
            return
        self._mailbox = StoreMailbox(store, "doctor")
        self._mailbox.publish(f"endpoint/{self._launch.rank}", endpoint)
        try:
            self._run_stage("facts", lambda seconds: dataclasses.asdict(facts), self._check_facts)
            if "versions" in self._failed:
                raise _StopError("fix versions first")
            self._check_tcp()
            self._check_disk(facts.boot)
            self._run_stage(
                "gpu test",
                lambda seconds: gpus.self_test(device) if device.type == "cuda" else {},
                gpu_checks.check_self_test,
            )
            self._check_all_reduce(store, device, facts)
            if self._config.train:
                self._check_training(device)
        except _StopError as first:
            self._report.add(Finding("other checks", "skipped", f"not checked: {first}"))
        self._end()

    def _rendezvous(self) -> Store:
        if self._launch.world_size == 1:
            return HashStore()
        return rendezvous(self._launch, _RENDEZVOUS_SHARE * self._config.timeout, flag="--timeout")

    def _end_without_rendezvous(self, facts: Facts, error: RendezvousError) -> None:
        """Report what the first rank of each node found: no other rank can."""
        first_here = self._launch.local_rank == 0
        if first_here and self._launch.rank != 0:
            self._report.enabled = True
            self._report.print(f"mnist-dist doctor: {self._launch.description}")
        self._set_facts([facts])
        self._report.add(*checks.check_facts(self._facts_by_rank))
        self._report.add(Finding("rendezvous", "problem", str(error)))
        self._print_verdict()
        # A launcher stops all ranks when one exits, and others may still have to print.
        if not first_here:
            time.sleep(max(0.0, self._deadline - _LINGER_S - time.monotonic()))
        elif self._launch.spans_nodes:
            time.sleep(_LINGER_S)

    def _run_stage(
        self,
        stage: str,
        measure: Callable[[float], Any],
        check: Callable[..., list[Finding]],
        *arguments: Any,
        share: float = _STAGE_SHARE,
    ) -> None:
        """Measure on every rank, for at most the seconds given, and check all results on rank 0.

        Args:
            stage: its name. It is skipped if a check in `_NEEDED` failed.
            measure: given the seconds it may take, returns what this rank measured.
            check: given what all ranks measured, in rank order, their facts and `arguments`.
            arguments: further ones of `check`.
            share: of --timeout that it may take, if that is left.

        Raises:
            _StopError: on all ranks, if one of them did not respond.
        """
        if self._is_blocked(stage):
            return
        self._stage = stage
        left = self._deadline - time.monotonic() - _SLACK_S
        seconds = max(1.0, min(share * self._config.timeout, left))
        self._mailbox.publish(f"{stage}/{self._launch.rank}", measure(seconds))
        if self._launch.rank == 0:
            payloads = self._collect(stage, seconds + _SLACK_S)
            missing = [rank for rank, payload in enumerate(payloads) if payload is None]
            if missing:
                text = f"{name_ranks(missing, self._facts_by_rank)} did not respond in time"
                remedy = "check that it is alive and what it printed, or raise --timeout"
                findings = [Finding(stage, "problem", text, remedy)]
            else:
                findings = check(payloads, self._facts_by_rank, *arguments)
            self._report.add(*findings)
            failed = [finding.check for finding in findings if finding.level == "problem"]
            self._mailbox.publish(f"{stage}/result", [bool(missing), failed])
        any_missing, failed = self._mailbox.wait_for(f"{stage}/result")
        self._failed.update(failed)
        if any_missing:
            raise _StopError("every rank must respond first")

    def _is_blocked(self, stage: str) -> bool:
        """Report a stage as skipped if a check that it needs failed."""
        blocking = sorted(self._failed & _NEEDED.get(stage, set()))
        if blocking:
            text = f"not checked: fix {' and '.join(blocking)} first"
            self._report.add(Finding(stage, "skipped", text))
        return bool(blocking)

    def _collect(self, stage: str, seconds: float) -> list[Any]:
        keys = [f"{stage}/{rank}" for rank in range(self._launch.world_size)]
        return self._mailbox.collect(keys, time.monotonic() + seconds)

    def _check_facts(self, payloads: Payloads, _: object) -> list[Finding]:
        self._set_facts([Facts.from_json(payload) for payload in payloads])
        findings = checks.check_facts(self._facts_by_rank)
        if self._launch.world_size == 1:
            return findings
        address = self._launch.master_addr or ""
        where = f"{f'[{address}]' if ':' in address else address}:{self._launch.master_port}"
        return [Finding("rendezvous", "ok", f"{len(payloads)} ranks at {where}"), *findings]

    def _set_facts(self, facts: Sequence[Facts]) -> None:
        """Record and print which ranks there are."""
        self._facts_by_rank = {each.rank: each for each in facts}
        self._report.context = {
            "launcher": self._launch.launcher,
            "world_size": self._launch.world_size,
            "ranks": [dataclasses.asdict(each) for each in facts],
        }
        for line in describe_ranks(self._facts_by_rank):
            self._report.print(line)

    def _check_tcp(self) -> None:
        if self._launch.world_size == 1:
            return
        if self._launch.rank == 0:
            self._mailbox.publish("endpoints", self._collect("endpoint", _SLACK_S))
        endpoints = dict(enumerate(self._mailbox.wait_for("endpoints")))
        del endpoints[self._launch.rank]
        self._run_stage(
            "messages", lambda seconds: connect_to_all(endpoints, seconds), checks.check_messages
        )
        self._is_blocked("clocks")  # which are compared by messages

    def _check_disk(self, boot: str) -> None:
        """Examine the run directory on the first rank of each node; all look before one writes."""
        first_here, run_dir = self._launch.local_rank == 0, self._config.run_dir
        path = Path(run_dir).expanduser().absolute()
        self._run_stage(
            "shared disk",
            lambda seconds: disk.identify(path, boot) if first_here else {},
            checks.check_shared_disk,
            run_dir,
        )
        self._run_stage(
            "disk",
            lambda seconds: disk.measure(path, boot) if first_here else {},
            checks.check_disk,
            run_dir,
        )

    def _check_all_reduce(self, store: Store, device: torch.device, facts: Facts) -> None:
        """Form the process group and all-reduce."""
        if self._launch.world_size == 1:
            text = "not checked: start with torchrun or srun, as for training"
            self._report.add(Finding("other ranks", "skipped", text))
            return

        def by_backend(seconds: float) -> dict[str, Any]:
            # NCCL's watchdog would end the process before it can report anything.
            timeout = seconds if facts.backend == "gloo" else 10 * self._config.timeout
            try:
                self._world = init_process_group(
                    self._launch, device, facts.backend, store, timeout
                )
            except (ReportedError, RuntimeError) as error:
                return {"error": brief(error)}
            return allreduce_check.by_backend(self._world)

        self._run_stage("all-reduce", by_backend, checks.check_backend)
        self._run_stage(
            "shared memory",
            lambda seconds: allreduce_check.by_shared_memory(self._world, seconds),
            checks.check_shared_memory,
        )

    def _check_training(self, device: torch.device) -> None:
        """Train on each rank alone, then on all together."""
        # Imports the job, which no other check needs.
        from mnist_dist.commands.doctor import train_check

        precision = self._config.precision
        mine = train_check.TrainCheck(self._launch, device, precision)
        self._run_stage(
            "arithmetic", lambda _: mine.alone(), train_check.check_alone, precision, share=1.0
        )
        if self._launch.world_size > 1:
            self._run_stage(
                "training",
                lambda seconds: mine.together(self._world, seconds),
                train_check.check_together,
                precision,
                share=1.0,
            )

    def _print_verdict(self) -> None:
        count, nodes = self._launch.world_size, len(by_node(self._facts_by_rank))
        together = f"{count} ranks on {counted(nodes, 'node')} can train together"
        self._report.close(together if count > 1 else "this process can train here")

    def _end(self) -> None:
        """Print the verdict on rank 0; the other ranks exit after that, with the same exit code."""
        self._stage = "verdict"
        if self._launch.rank == 0:
            self._print_verdict()
            self._mailbox.publish("verdict", 0 if self._report.healthy else 1)
        self.exit_code = self._mailbox.wait_for("verdict")
        self._mailbox.publish(f"received/{self._launch.rank}", True)
        if self._launch.rank == 0:  # it may host the store: it stays until all have the verdict
            self._collect("received", _LINGER_S)
