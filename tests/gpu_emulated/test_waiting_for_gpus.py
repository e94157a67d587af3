"""Waits for a GPU end in time, with a peer's failure or after a stop; its events are stand-ins."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, run_main, run_ranks
from torch.distributed import HashStore

import train_ddp
from mnist_dist.distributed import launch_queue, sync
from mnist_dist.distributed.failures import FailureStore, PeerLostError, is_comm_error
from mnist_dist.distributed.launch_queue import LaunchQueue
from mnist_dist.distributed.launcher import Launch, read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.sync import RankSync
from mnist_dist.distributed.world import World
from mnist_dist.evaluation import Evaluation, evaluate

GPU = torch.device("cuda", 0)


class Events:
    """Makes torch.cuda.Event's stand-ins, which are done after `queries` queries; None: never."""

    def __init__(self, queries: int | None) -> None:
        self.queries = queries
        self.recorded = 0
        self.done: list[int] = []
        self.most_ahead = 0

    def __call__(self) -> Any:
        return _Event(self)


class _Event:
    def __init__(self, events: Events) -> None:
        self._events, self._queried = events, 0

    def record(self) -> None:
        self._events.recorded += 1
        self._number = self._events.recorded
        ahead = self._events.recorded - len(self._events.done)
        self._events.most_ahead = max(self._events.most_ahead, ahead)

    def query(self) -> bool:
        self._queried += 1
        if self._events.queries is None or self._queried <= self._events.queries:
            return False
        self._events.done.append(self._number)
        return True


MakeEvents = Callable[[int | None], Events]


@pytest.fixture
def make_events(monkeypatch: pytest.MonkeyPatch) -> MakeEvents:
    def make(queries: int | None) -> Events:
        events = Events(queries)
        monkeypatch.setattr(torch.cuda, "Event", events)
        return events

    return make


def ignore(seconds: float) -> None:
    """A check that lets a wait go on."""


def test_the_host_is_at_most_32_launches_ahead(make_events: MakeEvents) -> None:
    events, queue = make_events(3), LaunchQueue(GPU, 60, ignore)
    for _ in range(32):
        queue.add()
    assert events.done == []
    for _ in range(68):
        queue.add()
    assert events.most_ahead == 33
    assert events.done == list(range(1, 69))


def test_a_wait_is_for_everything_launched(make_events: MakeEvents) -> None:
    """Also for what was launched since the last event."""
    events, queue = make_events(2), LaunchQueue(GPU, 60, ignore)
    for _ in range(5):
        queue.add()
    queue.wait()
    assert events.done == [1, 2, 3, 4, 5, 6]
    queue.wait()
    assert events.done[6:] == [7]


@pytest.mark.parametrize("call", ["wait", "add"])
def test_work_that_does_not_end_in_time_is_a_lost_connection(
    call: str, make_events: MakeEvents
) -> None:
    make_events(None)
    queue = LaunchQueue(GPU, 0.05, ignore)
    for _ in range(32):
        queue.add()
    with pytest.raises(ConnectionError, match=r"Timed out after 0.05 s waiting for the GPU") as e:
        getattr(queue, call)()
    assert is_comm_error(e.value)


def test_a_wait_asks_its_check_and_ends_with_its_error(
    make_events: MakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_queue, "_CHECK_EVERY_S", 0.01)
    make_events(None)
    asked: list[float] = []

    def check(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            raise KeyError("a peer failed")

    with pytest.raises(KeyError, match="a peer failed"):
        LaunchQueue(GPU, 60, check).wait()
    assert len(asked) == 3
    assert 0 < asked[0] < asked[1] < asked[2]


def test_on_a_cpu_nothing_is_waited_for(make_events: MakeEvents) -> None:
    events = make_events(None)
    queue = LaunchQueue(torch.device("cpu"), 0.01, ignore)
    queue.add()
    queue.wait()
    assert events.recorded == 0


def wait_of_two_ranks(case: str) -> str:
    """How a rank's wait for its GPU ends; it would be given up after 1,000 s."""
    events = Events(None)
    torch.cuda.Event = events  # type: ignore[assignment, misc]
    launch_queue._CHECK_EVERY_S, sync._GRACE_S = 0.02, 0.1
    store = HashStore()
    peer = FailureStore(store, 1, 2)
    launch = Launch("torchrun", 0, 0, 2, 2)
    ranks = RankSync(World(launch, GPU, "nccl", FailureStore(store, 0, 2)), step_timeout=1000)
    actions: dict[str, Callable[[], None]] = {
        "peer fails": lambda: peer.publish("RuntimeError: boom"),
        "stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "GPU gets done": lambda: setattr(events, "queries", 0),
    }
    threading.Timer(0.3, actions[case]).start()
    try:
        ranks.launches.wait()
    except ConnectionError as error:
        return str(error)
    return f"done: {len(events.done)}"


@pytest.mark.parametrize("case", ["peer fails", "stopped"])
def test_a_wait_ends_early_when_a_peer_has_failed_or_this_rank_was_stopped(case: str) -> None:
    (text,) = run_ranks(wait_of_two_ranks, 1, case)
    assert re.fullmatch(r"Timed out after \d+ s waiting for the GPU", text)


def test_a_wait_goes_on_while_peers_are_well() -> None:
    assert run_ranks(wait_of_two_ranks, 1, "GPU gets done") == ["done: 1"]


def end_of_rank() -> str:
    """Rank 1 fails in training; rank 0 waits for its GPU, which waits for rank 1."""
    torch.cuda.Event = Events(None)  # type: ignore[assignment, misc]
    launch_queue._CHECK_EVERY_S = 0.02
    try:
        with init_distributed(read_launch(), "cpu", "auto") as world:
            if world.rank == 1:
                raise KeyError("no such digit")
            on_gpu = World(world.launch, GPU, "nccl", world.failures)
            RankSync(on_gpu, step_timeout=1000).launches.wait()
    except (PeerLostError, KeyError) as error:
        if isinstance(error, KeyError):
            time.sleep(3)  # as a real rank, whose connections close when it has ended
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_waits_for_its_gpu_names_the_peer_that_failed_and_why() -> None:
    waiting, failed = run_ranks(end_of_rank, 2)
    assert failed == "KeyError: 'no such digit'"
    assert waiting.startswith("PeerFailedError: rank 1 failed: KeyError: 'no such digit'")
    assert "waiting for the GPU" in waiting


def give_up_gpu(directory: str, since: str) -> Ended:
    """Run one process; its GPU hangs from the first step on, or from the first validation on."""
    called = {"training"}

    def noted(*arguments: Any) -> Evaluation:
        called.add("validation")
        return evaluate(*arguments)

    def wait(self: LaunchQueue) -> None:
        if since in called:
            raise ConnectionError("Timed out after 120 s waiting for the GPU")

    train_ddp.evaluate = noted  # type: ignore[assignment, attr-defined]
    LaunchQueue.wait = wait  # type: ignore[method-assign]
    flags = ["--data=bundled", "--train-samples=200", "--epochs=1", "--run-dir=run"]
    return run_main(directory, flags)


@pytest.mark.parametrize("since", ["training", "validation"])
def test_a_single_process_whose_gpu_hangs_ends_with_one_line_and_a_failed_run(
    since: str, tmp_path: Path
) -> None:
    (ended,) = run_ranks(give_up_gpu, 1, str(tmp_path), since)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: Timed out after 120 s waiting for the GPU at step")
    assert "nvidia-smi" in line
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()
