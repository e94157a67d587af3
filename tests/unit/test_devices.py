"""How many CPUs a process may use, and how many threads it computes with."""

import os
from typing import Literal

import pytest
import torch

from mnist_dist.distributed.devices import (
    cpus_allowed,
    ranks_outnumber_cpus,
    set_threads,
    threads_per_process,
)
from mnist_dist.distributed.launcher import Launch

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
