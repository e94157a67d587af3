"""The doctor's checks of facts and measurements that cannot be produced on one machine."""

import dataclasses
import errno
import fcntl
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_systems import directories_cannot_be_flushed

from mnist_dist.commands.doctor import disk
from mnist_dist.commands.doctor.checks import (
    check_backend,
    check_clocks,
    check_devices,
    check_disk,
    check_host,
    check_shared_memory,
    check_threads,
    check_versions,
)
from mnist_dist.commands.doctor.facts import Facts, gather_facts
from mnist_dist.commands.doctor.findings import Finding, amount, duration, name_ranks
from mnist_dist.commands.doctor.gpus import Gpu, GpuFacts
from mnist_dist.commands.doctor.tcp_check import Listener, connect
from mnist_dist.distributed.failures import format_ranges
from mnist_dist.distributed.launcher import Launch


@pytest.fixture(scope="module")
def pair() -> dict[int, Facts]:
    """Real facts of this process, as if of two nodes."""
    own, _ = gather_facts(Launch("none"), "cpu", "auto")
    first = dataclasses.replace(own, host="n1", threads=1, cpus=[0, 1], cpus_at_once=2)
    return {0: first, 1: dataclasses.replace(first, rank=1, node_rank=1, host="n2")}


def changed(pair: dict[int, Facts], **facts: Any) -> dict[int, Facts]:
    return {0: pair[0], 1: dataclasses.replace(pair[1], **facts)}


def test_unequal_torch_is_a_problem_and_unequal_python_a_warning(pair: dict[int, Facts]) -> None:
    versions = pair[1].environment | {"torch": "2.12.0", "python": "3.10.1"}
    found = check_versions(changed(pair, environment=versions))
    assert [(finding.check, finding.level) for finding in found] == [
        ("versions", "problem"),
        ("versions", "warning"),
    ]
    assert found[0].text.endswith("; rank 1 on n2 has 2.12.0")
    assert found[0].remedy == "install one version of torch for every rank"
    assert [finding.level for finding in check_versions(pair)] == ["ok"]


def test_a_rank_without_its_gpu_is_named(pair: dict[int, Facts]) -> None:
    h100 = GpuFacts(visible=[Gpu("H100")])
    gpu = dataclasses.replace(pair[0], device="cuda:0", backend="nccl", gpus=h100)
    blind = dataclasses.replace(pair[1], gpus=GpuFacts(device_files=1))
    problem, warning = check_devices({0: gpu, 1: blind})
    assert "rank 0 on n1 has cuda; rank 1 on n2 has cpu" in problem.text
    assert (problem.level, warning.level) == ("problem", "warning")
    assert warning.text.startswith("rank 1 on n2: the node has a GPU that torch does not see")


def test_ranks_that_are_bound_to_one_cpu_are_a_warning(pair: dict[int, Facts]) -> None:
    here = {rank: dataclasses.replace(f, node_rank=0, cpus=[3]) for rank, f in pair.items()}
    (finding,) = check_threads(here)
    assert finding.level == "warning"
    assert "2 ranks share 1 CPU (3)" in finding.text
    assert check_threads(pair)[0].level == "ok"


def test_a_quota_is_shared_by_the_ranks_of_a_node(pair: dict[int, Facts]) -> None:
    """Each sees two CPUs of its affinity and a quota of one for both."""
    here = {rank: dataclasses.replace(f, node_rank=0, cpus_at_once=1) for rank, f in pair.items()}
    (finding,) = check_threads(here)
    assert finding.level == "warning"
    assert "2 ranks share 1 CPU (a cgroup's quota on 0-1)" in finding.text
    alone = {0: dataclasses.replace(pair[0], threads=2, cpus_at_once=1)}
    (finding,) = check_threads(alone)
    assert "2 threads on 1 CPU (a cgroup's quota on 0-1)" in finding.text
    assert finding.remedy == "unset OMP_NUM_THREADS or set it to 1"


def test_a_host_that_torchrun_cannot_find_is_a_problem(pair: dict[int, Facts]) -> None:
    unknown = dataclasses.replace(pair[0], own_name_problem="n1 does not resolve (unknown)")
    (finding,) = check_host({0: unknown})
    assert finding.level == "problem"
    assert "n1 does not resolve (unknown)" in finding.text
    assert "--local-addr=127.0.0.1" in finding.remedy
    assert check_host(pair) == []


def test_a_shell_as_process_1_of_a_container_is_a_warning(pair: dict[int, Facts]) -> None:
    (finding,) = check_host(changed(pair, shell_as_init="bash"))
    assert finding.level == "warning"
    assert finding.text.startswith(
        "process 1 on n2 is the shell bash, which does not forward SIGTERM"
    )


def measured(directory: Path, pair: dict[int, Facts]) -> list[Finding]:
    return check_disk([disk.measure(directory, "boot")], {0: pair[0]}, str(directory))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_is_a_warning_with_the_risk(
    number: int, pair: dict[int, Facts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (finding,) = measured(tmp_path, pair)
    assert (finding.check, finding.level) == ("disk", "warning")
    assert finding.text.endswith("two jobs in one run directory do not notice each other")


@pytest.mark.parametrize(
    ("number", "level"), [(errno.EINVAL, "warning"), (errno.EIO, "problem")], ids=["EINVAL", "EIO"]
)
def test_a_directory_that_cannot_be_flushed_is_a_warning_and_a_broken_disk_a_problem(
    number: int,
    level: str,
    pair: dict[int, Facts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directories_cannot_be_flushed(number, monkeypatch)
    (finding,) = measured(tmp_path, pair)
    assert (finding.check, finding.level) == ("disk", level)
    if level == "warning":
        assert "a power loss may take the newest checkpoint" in finding.text
    monkeypatch.undo()
    assert [finding.level for finding in measured(tmp_path, pair)] == ["ok"]


@pytest.mark.parametrize(("ahead", "way"), [(3.0, "3 s ahead of"), (-7200.0, "7200 s behind")])
def test_a_clock_that_is_off_is_named(ahead: float, way: str, pair: dict[int, Facts]) -> None:
    payloads = [{"1": {"error": None, "clock": ahead}}, {}]
    (finding,) = check_clocks(payloads, pair)
    assert finding.level == "warning"
    assert f"the clock of rank 1 on n2 is {way} that of rank 0 on n1" in finding.text


def test_a_wrong_sum_and_a_failed_one_are_problems_with_their_rank(pair: dict[int, Facts]) -> None:
    right = {"sums": [{"bytes": 1024, "seconds": 0.001, "correct": True}]}
    wrong = {"sums": [{"bytes": 1024, "seconds": 0.001, "correct": False}]}
    (finding,) = check_backend([right, wrong], pair)
    assert (finding.level, finding.text) == ("problem", "sums over gloo are wrong on rank 1 on n2")
    (finding,) = check_backend([{"error": "Timed out"}, right], pair)
    assert finding.text == "sums over gloo failed on rank 0 on n1: Timed out"
    assert check_backend([right, right], pair)[0].level == "ok"


def test_memory_that_cannot_be_shared_is_a_warning_since_gloo_takes_over(
    pair: dict[int, Facts],
) -> None:
    (finding,) = check_shared_memory([{"refused": "no memfd"}] * 2, pair)
    assert finding.level == "warning"
    assert "no memfd" in finding.text


class _SmallOnly(socketserver.StreamRequestHandler):
    """A path that drops large packets: answers short lines, and none to a long one."""

    def handle(self) -> None:
        while len(self.rfile.readline(100)) < 100:
            self.wfile.write(b"token 0.0\n")
        self.server.left.wait(30)  # type: ignore[attr-defined]


@pytest.fixture
def small_only() -> Iterator[dict[str, Any]]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _SmallOnly) as server:
        server.left = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        yield {"address": host, "port": port, "token": "token"}
        server.left.set()  # type: ignore[attr-defined]
        server.shutdown()


def test_a_path_that_drops_large_messages_is_told_from_one_that_drops_all(
    small_only: dict[str, Any],
) -> None:
    assert connect(small_only, 1).error == "small messages pass, one of 64 KiB does not: timed out"
    other = connect(small_only | {"token": "mine"}, 1)
    assert other.error == "another program answers there"
    made = connect(Listener("127.0.0.1").endpoint, 5)
    assert made.error is None
    assert made.round_trip > 0


def test_quantities_and_ranks_are_formatted_for_people(pair: dict[int, Facts]) -> None:
    assert [duration(s) for s in (0.000052, 0.0123, 0.99999, 3.41, 75)] == [
        "0.052 ms",
        "12 ms",
        "1 s",
        "3.4 s",
        "75 s",
    ]
    assert [amount(b) for b in (12, 1024, 544_296, 3.2e12)] == [
        "12 B",
        "1.0 kB",
        "544 kB",
        "3.2 TB",
    ]
    assert format_ranges([3, 0, 1, 2, 6]) == "0-3, 6"
    assert name_ranks([0, 1], pair) == "ranks 0 on n1, 1 on n2"


def test_a_finding_is_one_line_with_its_remedy() -> None:
    assert Finding("x", "problem", "it is broken", "fix it").line == "it is broken; fix it"
    assert Finding("x", "ok", "it is whole").line == "it is whole"


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
def test_a_fifo_in_the_place_of_the_runs_is_a_fault_of_the_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "runs")
    assert disk.measure(tmp_path / "runs", "boot") == {"error": "Not a directory"}
