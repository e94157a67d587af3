"""Sums in shared memory: right to the last bit, on one host and over several; nothing is left."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import completed_run, hosts_of, metrics, run_job, run_ranks

from benchmarks.faults import KILLED_IN_SUM
from benchmarks.live_job import LiveJob
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.shared_memory import SharedMemoryAllReduce

SIZES = [1, 7, 64, 1000, 136_074]


def values(rank: int, size: int, call: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * call + rank))


def sums(calls: int) -> list[bytes]:
    """The bytes of sums of several sizes in turn, on this rank."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        all_reduce = SharedMemoryAllReduce(world, max(SIZES), timeout=60)

        def total(mine: torch.Tensor) -> bytes:
            return all_reduce(mine).numpy().tobytes()

        return [total(values(world.rank, size, call)) for call in range(calls) for size in SIZES]


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7])
def test_every_rank_has_the_sum_in_the_order_of_ranks_to_the_last_bit(world_size: int) -> None:
    first, *others = run_ranks(sums, world_size, 3)
    expected = []
    for call in range(3):
        for size in SIZES:
            total = values(0, size, call)
            for rank in range(1, world_size):
                total = total + values(rank, size, call)
            expected.append(total.numpy().tobytes())
    assert first == expected
    assert all(other == first for other in others)


def test_hosts_add_up_their_own_sums_and_then_each_others() -> None:
    first, *others = run_ranks(sums, 5, 3, environments=hosts_of(3, 2))
    assert all(other == first for other in others)
    position = 0
    for call in range(3):
        for size in SIZES:
            total = sum(values(rank, size, call).double() for rank in range(5))
            mine = torch.frombuffer(bytearray(first[position]), dtype=torch.float32)
            torch.testing.assert_close(mine.double(), total, rtol=1e-5, atol=1e-5)
            position += 1


def sums_of_dawdlers(calls: int) -> list[float]:
    """What the sum of the call's number was at each call, between which ranks dawdle at random."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        all_reduce, dice = SharedMemoryAllReduce(world, 64, timeout=60), random.Random(world.rank)
        sums = []
        for call in range(calls):
            if dice.random() < 0.1:
                time.sleep(dice.random() / 500)
            sums.append(all_reduce(torch.full((64,), float(call))).mean().item())
        return sums


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_that_come_early_and_late_in_turns_all_have_every_sum(world_size: int) -> None:
    for sums in run_ranks(sums_of_dawdlers, world_size, 2000):
        assert sums == [world_size * call for call in range(2000)]


def in_its_own_place(calls: int) -> list[float]:
    """Sums of a vector made where the sum would have it."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        all_reduce = SharedMemoryAllReduce(world, 1000, timeout=60)
        sums = []
        for call in range(calls):
            all_reduce.input_buffer.fill_(float(10**world.rank * (call + 1)))
            total = all_reduce(all_reduce.input_buffer)
            assert total.eq(total[0]).all()
            sums.append(total[0].item())
        return sums


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_vector_made_in_the_sums_own_place_is_added_up_like_any(world_size: int) -> None:
    """With two ranks that place is private; with more of them than CPUs it is shared."""
    ones = int("1" * world_size)
    for sums in run_ranks(in_its_own_place, world_size, 20):
        assert sums == [ones * (call + 1) for call in range(20)]


FLAGS = ["--data=bundled", "--train-samples=500", "--lr=0.05", "--epochs=2"]


def losses(run: Path) -> list[float]:
    return [r[name] for r in metrics(run) for name in ("train/loss", "val/loss") if name in r]


def test_the_backend_and_shared_memory_give_the_same_run(tmp_path: Path) -> None:
    alone = losses(completed_run(tmp_path / "alone", 1, *FLAGS))
    for way in ("auto", "off"):
        run = completed_run(tmp_path / way, 3, *FLAGS, f"--shared-memory={way}")
        assert losses(run) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks_on", "said"),
    [((2, 2), "shared memory, gloo between nodes"), ((1, 2), "gloo: a node has one process only")],
)
def test_a_run_over_hosts_gives_the_same_numbers(
    ranks_on: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    alone = losses(completed_run(tmp_path / "alone", 1, *FLAGS))
    ended = run_job(
        tmp_path, sum(ranks_on), "--run-dir=run", *FLAGS, environments=hosts_of(*ranks_on)
    )
    assert [rank.code for rank in ended] == [0] * sum(ranks_on), ended
    assert f"step   DistributedDataParallel, gradients over {said}" in ended[0].out
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def one_rank_stops(how: str) -> str:
    """Sum until rank 1 leaves, or comes no more; what this rank is told."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        all_reduce = SharedMemoryAllReduce(world, 1000, timeout=2 if how == "hangs" else 60)
        values = torch.zeros(1000)
        try:
            for call in range(1000):
                if world.rank == 1 and call == 500:
                    if how == "leaves":
                        all_reduce.close()
                    time.sleep(4)
                    return ""
                all_reduce(values)
        except ConnectionError as error:
            # The others see it go: by then they must have heard of rank 1 themselves.
            time.sleep(4)
            return f"{type(error).__name__}: {error}"
    return "all sums were made"


_CLOSED = "ConnectionError: Connection closed by a rank of this node"
_TIMED_OUT = "ConnectionError: Timed out waiting for a rank of this node"


def test_a_rank_that_leaves_is_an_error_of_the_others() -> None:
    assert run_ranks(one_rank_stops, 3, "leaves") == [_CLOSED, "", _CLOSED]


def test_a_rank_that_hangs_is_an_error_of_the_others() -> None:
    first, hung, third = run_ranks(one_rank_stops, 3, "hangs")
    assert hung == ""
    # The one whose time is up a moment sooner leaves, and the other may hear that before its own.
    assert _TIMED_OUT in (first, third)
    assert {first, third} <= {_TIMED_OUT, _CLOSED}


def test_ranks_killed_in_the_middle_leave_nothing_behind(tmp_path: Path) -> None:
    with LiveJob(tmp_path, 2, "--data=bundled", "--epochs=1000") as job:
        job.until(lambda: job.trains)
        ranks = [pid for pid, rank in job.alive().items() if rank is not None]
        maps = [Path(f"/proc/{rank}/maps").read_text() for rank in ranks]
        assert ["memfd:mnist-dist-all-reduce" in text for text in maps] == [True, True]
        held = job.holdings()
        assert set(job.left_over(held, grace=0)) > {f"process {pid}" for pid in ranks}
        for pid in (*ranks, job.launcher.pid):
            os.kill(pid, signal.SIGKILL)
        job.launcher.wait()
        assert job.left_over(held) == []


@pytest.mark.parametrize(("ranks", "victim", "notified"), [(2, 0, 0), (3, 1, 1)])
def test_a_rank_killed_inside_a_sum_ends_the_others_and_leaves_nothing_behind(
    ranks: int, victim: int, notified: int, tmp_path: Path
) -> None:
    """Its gradients are in its slot; it has notified its peers, or not."""
    place = {"KILLED_IN_SUM": f"{victim}:2000:{notified}"}
    flags = ["--data=bundled", "--epochs=1000"]
    with LiveJob(tmp_path, ranks, *flags, script=KILLED_IN_SUM, environment=place) as job:
        job.until(lambda: job.trains or job.ended)
        held = job.holdings()
        assert job.wait(timeout=60) == 1
        assert f"rank {victim} did not respond" in job.output
        steps = [int(step) for step in re.findall(r"this was at step (\d+)", job.output)]
        assert min(steps) > 900, "each rank that ends knows the step"
        assert job.left_over(held) == []
