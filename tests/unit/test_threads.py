"""How many threads a process computes with."""

import os

import pytest

from mnist_dist.threads import cpus_allowed, threads_for_one


def test_no_more_cpus_than_the_process_may_run_on() -> None:
    everything = os.sched_getaffinity(0)
    assert 1 <= cpus_allowed() <= len(everything)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert cpus_allowed() == 1
        assert threads_for_one(1, None) == 1
    finally:
        os.sched_setaffinity(0, everything)


def test_processes_of_a_host_share_its_cpus() -> None:
    assert threads_for_one(1, None) == cpus_allowed()
    assert threads_for_one(cpus_allowed(), None) == 1
    assert threads_for_one(10 * cpus_allowed(), None) == 1


@pytest.mark.parametrize("given", [1, 10**6])
def test_slurms_share_is_taken_but_never_more_than_there_is(given: int) -> None:
    assert threads_for_one(1, given) == min(given, cpus_allowed())
