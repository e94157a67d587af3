"""How many CPUs a process may use, and how many threads it computes with."""

import os
import re
from pathlib import Path
from typing import Literal

import pytest
import torch

from mnist_dist.distributed.devices import (
    cgroup_quota,
    cpus_allowed,
    ranks_outnumber_cpus,
    set_threads,
    threads_for,
    threads_per_process,
)
from mnist_dist.distributed.launcher import Launch

# Of cgroup version 1.
CPU_CGROUPS = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct")
pytestmark = pytest.mark.usefixtures("threads_as_before")


def test_no_more_cpus_than_the_process_may_run_on() -> None:
    everything = os.sched_getaffinity(0)
    assert 1 <= cpus_allowed() <= len(everything)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert cpus_allowed() == 1
        assert threads_per_process(1, None) == 1
    finally:
        os.sched_setaffinity(0, everything)


def test_processes_of_a_host_share_its_cpus() -> None:
    assert threads_per_process(1, None) == cpus_allowed()
    assert threads_per_process(cpus_allowed(), None) == 1
    assert threads_per_process(10 * cpus_allowed(), None) == 1


@pytest.mark.parametrize("given", [1, 10**6])
def test_slurms_share_is_taken_but_never_more_than_there_is(given: int) -> None:
    assert threads_per_process(1, given) == min(given, cpus_allowed())


def test_ranks_outnumber_cpus_unless_each_has_been_given_its_own() -> None:
    assert not ranks_outnumber_cpus(cpus_allowed(), None)
    assert ranks_outnumber_cpus(cpus_allowed() + 1, None)
    assert not ranks_outnumber_cpus(cpus_allowed() + 1, cpus_per_task=1)


@pytest.mark.parametrize(
    ("given", "launcher", "batch", "threads"),
    [
        (None, "none", None, cpus_allowed()),
        (None, "none", 1, 1),
        (None, "none", 128, 1),  # the tuned recipe's batch
        (None, "none", 10**6, cpus_allowed()),
        ("1", "torchrun", 10**6, cpus_allowed()),
        ("3", "torchrun", 1, 3),
        ("1", "none", 10**6, 1),
    ],
)
def test_threads_follow_cpus_and_rows_unless_the_user_chose(
    given: str | None,
    launcher: Literal["torchrun", "none"],
    batch: int | None,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torchrun sets OMP_NUM_THREADS to 1 on its own, so there 1 is nobody's choice."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        torch.set_num_threads(int(given))
    set_threads(Launch(launcher), batch)
    assert torch.get_num_threads() == threads


def test_large_products_have_threads_of_their_own_meanwhile(
    monkeypatch: pytest.MonkeyPatch, threads_as_before: None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(1)
    with threads_for(10**6, Launch("none")):
        assert torch.get_num_threads() == cpus_allowed()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000", "cpu.max": "50000 100000"}, 0.5),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/host/path", {"cpu.max": "200000 100000"}, 2),
        ("0::/../../other", {"cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/job\n0::/", {"cpu,cpuacct/job/cpu.cfs": "400000 100000"}, 4),
        ("2:cpu:/job/task\n1:memory:/m", {"cpu/job/cpu.cfs": "100000 50000"}, 2),
        ("2:cpu:/\n1:memory:/m", {"cpu/cpu.cfs": "-1 100000", "m/cpu.max": "1 1"}, None),
        ("2:cpuset:/s\n0::/slice", {"unified/slice/cpu.max": "100000 100000"}, 1),
        (None, {"cpu.max": "300000 100000"}, 3),
    ],
)
def test_the_lowest_quota_of_the_cgroup_and_its_parents_counts(
    groups: str | None, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "cpu.cfs":  # version 1 has a file for each number
            for kind, number in zip(("quota", "period"), text.split(), strict=True):
                file.with_name(f"cpu.cfs_{kind}_us").write_text(f"{number}\n")
        else:
            file.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "list").write_text(f"{groups}\n")
    assert cgroup_quota(tmp_path / "list", tmp_path / "cgroup") == quota


def test_a_quota_of_a_parent_cgroup_limits_the_threads_of_a_real_process() -> None:
    top = next((t for t in map(Path, CPU_CGROUPS) if os.access(t / "cgroup.procs", os.W_OK)), None)
    if top is None:
        pytest.skip("no cgroup can be made here")
    parent, home = top / f"test-{os.getpid()}", Path("/proc/self/cgroup").read_text()
    child = parent / "child"
    child.mkdir(parents=True)
    try:
        (parent / "cpu.cfs_quota_us").write_text("50000")
        (child / "cgroup.procs").write_text(str(os.getpid()))
        assert cgroup_quota() == 0.5
        assert cpus_allowed() == 1
    finally:
        back = re.findall(r"^\d+:cpu[,:].*?(/.*)$", home, re.MULTILINE)[0]
        (top / back.strip("/") / "cgroup.procs").write_text(str(os.getpid()))
        child.rmdir()
        parent.rmdir()
