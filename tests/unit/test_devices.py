"""How many threads a process computes with, and how many of them take the steps."""

import os
import time

import pytest
import torch

from mnist_dist.distributed.threads import (
    QuickestThreads,
    cpus_allowed,
    ranks_outnumber_cpus,
    threads_for_one,
)

pytestmark = pytest.mark.usefixtures("threads_as_before")


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


def test_ranks_outnumber_cpus_unless_each_has_been_given_its_own() -> None:
    assert not ranks_outnumber_cpus(cpus_allowed(), None)
    assert ranks_outnumber_cpus(cpus_allowed() + 1, None)
    assert not ranks_outnumber_cpus(cpus_allowed() + 1, cpus_per_task=1)


def take_steps(threads: QuickestThreads, steps: int, quickest: int) -> list[int]:
    """The threads of each step, where a step takes ten times as long on others than `quickest`."""
    taken = []
    for _ in range(steps):
        threads.begin_step()
        taken.append(torch.get_num_threads())
        time.sleep(0.0005 if taken[-1] == quickest else 0.005)
    return taken


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_powers_of_two_and_the_most_are_tried(most: int, counts: list[int]) -> None:
    assert QuickestThreads(most).counts == counts


@pytest.mark.parametrize("quickest", [1, 2])
def test_the_quickest_number_is_found_and_kept(quickest: int) -> None:
    threads = QuickestThreads(2, steps_between_trials=20)
    taken = take_steps(threads, 150, quickest)
    assert taken[:20] == [2] * 20, "it begins with the most"
    settled = taken[60:]
    assert settled.count(quickest) > settled.count(3 - quickest)


def test_a_machine_that_changes_is_noticed() -> None:
    threads = QuickestThreads(2, steps_between_trials=20)
    for quickest in (1, 2, 1):
        take_steps(threads, 120, quickest)
        last = take_steps(threads, 56, quickest)  # a trial and what is between two
        assert last.count(quickest) > last.count(3 - quickest)


def test_on_many_cores_the_quickest_number_is_soon_found() -> None:
    """Long before the first of the trials that go on for the whole job."""
    threads = QuickestThreads(16)
    taken = []
    for _ in range(240):
        threads.begin_step()
        taken.append(torch.get_num_threads())
        time.sleep(0.001 * taken[-1])
    assert taken[:20] == [16] * 20
    assert set(taken) == {16, 8, 4, 2, 1}
    assert taken[-1] == 1


def test_one_thread_stays_one() -> None:
    assert take_steps(QuickestThreads(1, steps_between_trials=3), 12, 1) == [1] * 12
