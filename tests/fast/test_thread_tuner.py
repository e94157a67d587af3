"""The number of threads that takes steps fastest is found, by the clock."""

import time

import pytest
import torch

from mnist_dist.fast.threads import ThreadTuner

pytestmark = pytest.mark.usefixtures("threads_as_before")


def take_steps(threads: ThreadTuner, steps: int, quickest: int) -> list[int]:
    """The threads of each step, where a step takes ten times as long on others than `quickest`."""
    taken = []
    for _ in range(steps):
        threads.start_step()
        taken.append(torch.get_num_threads())
        time.sleep(0.0005 if taken[-1] == quickest else 0.005)
    return taken


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_powers_of_two_and_the_most_are_tried(most: int, counts: list[int]) -> None:
    assert ThreadTuner(most).counts == counts


@pytest.mark.parametrize("quickest", [1, 2])
def test_the_quickest_number_is_found_and_kept(quickest: int) -> None:
    threads = ThreadTuner(2, steps_between_trials=20)
    taken = take_steps(threads, 150, quickest)
    assert taken[:20] == [2] * 20, "it begins with the most"
    settled = taken[60:]
    assert settled.count(quickest) > settled.count(3 - quickest)


def test_a_machine_that_changes_is_noticed() -> None:
    threads = ThreadTuner(2, steps_between_trials=20)
    for quickest in (1, 2, 1):
        take_steps(threads, 120, quickest)
        last = take_steps(threads, 56, quickest)  # a trial and what is between two
        assert last.count(quickest) > last.count(3 - quickest)


def test_on_many_cores_the_quickest_number_is_soon_found() -> None:
    """Long before the first of the trials that go on for the whole job."""
    threads = ThreadTuner(16)
    taken = []
    for _ in range(240):
        threads.start_step()
        taken.append(torch.get_num_threads())
        time.sleep(0.001 * taken[-1])
    assert taken[:20] == [16] * 20
    assert set(taken) == {16, 8, 4, 2, 1}
    assert taken[-1] == 1


def test_one_thread_stays_one() -> None:
    assert take_steps(ThreadTuner(1, steps_between_trials=3), 12, 1) == [1] * 12
