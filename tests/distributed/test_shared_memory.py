"""Sums in shared memory: right to the last bit, on one host and over several; nothing is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    ROOT,
    completed_run,
    free_port,
    metrics,
    run_job,
    run_ranks,
    torchrun_environment,
)

from mnist_dist.launcher import read_launch
from mnist_dist.shared_memory import HostSum
from mnist_dist.world import join

SIZES = [1, 7, 64, 1000, 136_074]


def values(rank: int, size: int, call: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * call + rank))


def sums(calls: int) -> list[bytes]:
    """The bytes of sums of several sizes in turn, on this rank."""
    with join(read_launch(), "cpu", "auto") as world:
        host_sum = HostSum(world, max(SIZES), timeout=60)

        def add_up(mine: torch.Tensor) -> bytes:
            host_sum.slots[host_sum.turn][: len(mine)].copy_(mine)
            return host_sum.add_up(len(mine)).numpy().tobytes()

        return [add_up(values(world.rank, size, call)) for call in range(calls) for size in SIZES]


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


def two_hosts(*ranks_on: int) -> list[dict[str, str]]:
    """What torchrun tells the ranks of several hosts, here all on this one."""
    world_size, port = sum(ranks_on), free_port()
    environments: list[dict[str, str]] = []
    for host, count in enumerate(ranks_on):
        for local_rank in range(count):
            own = torchrun_environment(len(environments), world_size, port, f"test-{port}")
            own |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(count)}
            environments.append(own | {"GROUP_RANK": str(host)})
    return environments


def test_hosts_add_up_their_own_sums_and_then_each_others() -> None:
    first, *others = run_ranks(sums, 5, 3, environments=two_hosts(3, 2))
    assert all(other == first for other in others)
    position = 0
    for call in range(3):
        for size in SIZES:
            total = sum(values(rank, size, call).double() for rank in range(5))
            mine = torch.frombuffer(bytearray(first[position]), dtype=torch.float32)
            torch.testing.assert_close(mine.double(), total, rtol=1e-5, atol=1e-5)
            position += 1


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
    [((2, 2), "shared memory, gloo beyond"), ((1, 2), "gloo: a host has one process only")],
)
def test_a_run_over_hosts_gives_the_same_numbers(
    ranks_on: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    alone = losses(completed_run(tmp_path / "alone", 1, *FLAGS))
    ended = run_job(
        tmp_path, sum(ranks_on), "--run-dir=run", *FLAGS, environments=two_hosts(*ranks_on)
    )
    assert [rank.code for rank in ended] == [0] * sum(ranks_on), ended
    assert f"step   by hand, gradients over {said}" in ended[0].out
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def one_rank_stops(how: str) -> str:
    """Sum until rank 1 leaves, or comes no more; what this rank is told."""
    with join(read_launch(), "cpu", "auto") as world:
        host_sum = HostSum(world, 1000, timeout=2)
        try:
            for call in range(1000):
                if world.rank == 1 and call == 500:
                    if how == "leaves":
                        host_sum.close()
                    time.sleep(4)
                    return ""
                host_sum.add_up()
        except ConnectionError as error:
            # It has left, too, as far as the others can tell.
            time.sleep(4)
            return f"{type(error).__name__}: {error}"
    return "all sums were made"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("leaves", "ConnectionError: Connection closed by a rank of this host"),
        ("hangs", "ConnectionError: Timed out waiting for a rank of this host"),
    ],
)
def test_a_rank_that_leaves_or_hangs_is_an_error_of_the_others(how: str, said: str) -> None:
    assert run_ranks(one_rank_stops, 3, how) == [said, "", said]


def test_ranks_killed_in_the_middle_leave_nothing_behind(tmp_path: Path) -> None:
    def left_behind() -> list[str]:
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return [line for line in sockets if "mnist-dist" in line] + os.listdir("/dev/shm")  # noqa: PTH208

    before = left_behind()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--data=bundled", "--epochs=1000", "--run-dir=run"]
    job = subprocess.Popen(
        [*torchrun, str(ROOT / "train_ddp.py"), *flags],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert job.poll() is None
            time.sleep(0.05)
        ranks = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and parent_of(int(entry.name)) == job.pid
        ]
        maps = [Path(f"/proc/{rank}/maps").read_text() for rank in ranks]
        assert ["memfd:mnist-dist-sum" in text for text in maps] == [True, True]
    finally:
        for pid in (*ranks, job.pid):
            os.kill(pid, signal.SIGKILL)
        job.wait()
    deadline = time.monotonic() + 5  # for the kernel to take the processes apart
    while left_behind() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind() == before


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
