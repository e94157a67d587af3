"""Kill processes at random instants, many times, and count what was lost.

python -m benchmarks.faults                    everything, in 15 minutes or more
python -m benchmarks.faults --kills 2 --saves 20
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_job import ROOT, LiveJob
from mnist_dist.errors import UserError
from mnist_dist.run.checkpoint import CheckpointStore

FLAGS = ["--data=bundled", "--train-samples=4000", "--epochs=6", "--global-batch-size=4"]
FLAGS += ["--lr=0.01", "--checkpoint-every-steps=250"]
STEPS = 6000
KILLED_IN_SUM = ROOT / "benchmarks" / "killed_in_sum.py"
# Seconds after which a job counts as hung; on an idle machine it takes a tenth of that.
TIMEOUT_S = 300.0


def kill_in_save(kind: str, count: int) -> tuple[int, int]:
    """Kill a saving process `count` times; count unreadable newest checkpoints and stray files."""
    unreadable = stray = 0
    # Built before the fork: torch's threads do not survive it, and the child would wait for them.
    state = {"model": {"w": torch.ones(300, 500)}}
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoints"
            directory.mkdir()
            writer = os.fork()  # a new interpreter would spend seconds on importing torch
            if writer == 0:
                _save_forever(state, directory, kind)
            while not any(directory.iterdir()):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.12))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            unreadable += not (_torch_save_is_sound if kind == "torch.save" else _ours_is_sound)(
                directory
            )
            names = {p.name for p in directory.iterdir()}
            stray += len([n for n in names if n.startswith(".") or n.endswith(".damaged")])
    return unreadable, stray


def _save_forever(state: dict[str, Any], directory: Path, kind: str) -> None:
    """Save one state after another until killed."""
    parent = os.getppid()
    store = CheckpointStore(directory, 3)
    store.open()
    for step in itertools.count(1):
        if os.getppid() != parent:
            os._exit(1)
        if kind == "torch.save":
            torch.save(state, directory / "newest.pt")
        else:
            store.save(state | {"step": step}, step, {}, best=True)
            store.flush()


def _torch_save_is_sound(directory: Path) -> bool:
    newest = directory / "newest.pt"
    try:
        return not newest.exists() or bool(torch.load(newest, weights_only=True))
    except Exception:
        return False


def _ours_is_sound(directory: Path) -> bool:
    """Return whether the next start would find no damage; nothing saved yet is sound, too."""
    store = CheckpointStore(directory, 3)
    store.open()
    try:
        _, damaged = store.load_latest()
        if (directory / "best.pt").exists():
            store.load_best()
    except UserError:
        return False
    return not damaged


def final_loss(run: Path) -> float:
    """Return the last epoch's validation loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([r["val/loss"] for r in records if "val/loss" in r][-1])


def ranks(job: LiveJob) -> list[int]:
    """Return the pids of the job's ranks."""
    return [pid for pid, rank in job.alive().items() if rank is not None]


def kill(pids: list[int]) -> None:
    """Send SIGKILL to those processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def one_rank(job: LiveJob) -> None:
    kill(random.sample(found, 1) if (found := ranks(job)) else [])


def all_ranks(job: LiveJob) -> None:
    kill(ranks(job))


def torchrun(job: LiveJob) -> None:
    kill([job.launcher.pid])


@dataclass
class Outcomes:
    """Counts over all kills of one kind."""

    training: int = 0
    completed: int = 0
    same_loss: int = 0
    left_over: int = 0

    def __str__(self) -> str:
        return (
            f"{self.completed} completed, {self.same_loss} same loss, {self.left_over} left over; "
            f"{self.training} killed in training"
        )


def baseline() -> tuple[float, float]:
    """Run a job without kills; return its seconds from the ranks' start on, and its final loss."""
    with tempfile.TemporaryDirectory() as folder, LiveJob(Path(folder), 2, *FLAGS) as job:
        job.until(lambda: len(ranks(job)) == 2)
        started = time.monotonic()
        if job.wait(TIMEOUT_S) != 0:
            raise RuntimeError(job.output)
        return time.monotonic() - started, final_loss(job.run)


def kill_often(target: Callable[[LiveJob], None] | None, count: int) -> Outcomes:
    """Kill at instants spread over a job's time, then let torchrun or a second start finish it.

    `target` None stands for a rank that is killed from within, inside an all-reduce of gradients.
    """
    outcomes = Outcomes()
    span, expected = baseline()
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            # One at random in each of `count` equal parts of the time.
            delay = span * (number + random.random()) / count
            run = _run_with_kill(Path(folder), target, delay, outcomes)
            if run is not None:
                outcomes.completed += 1
                outcomes.same_loss += abs(final_loss(run) / expected - 1) < 1e-5
        print(f"  {_name(target)} {number + 1}/{count}: {outcomes}", file=sys.stderr, flush=True)
    return outcomes


def _name(target: Callable[[LiveJob], None] | None) -> str:
    return target.__name__.replace("_", " ") if target else "a rank in an all-reduce"


def _run_with_kill(
    folder: Path, target: Callable[[LiveJob], None] | None, delay: float, outcomes: Outcomes
) -> Path | None:
    options: dict[str, Any] = {"torchrun": ("--max-restarts=3",)}
    if target is None:
        place = f"{random.randrange(2)}:{random.randint(1, STEPS)}:{random.randrange(2)}"
        options |= {"script": KILLED_IN_SUM, "environment": {"KILLED_IN_SUM": place}}
    with contextlib.suppress(TimeoutError):  # a hang: not completed
        with LiveJob(folder, 2, *FLAGS, **options) as job:
            job.until(lambda: len(ranks(job)) == 2 or job.ended)
            if target is not None:
                time.sleep(delay)
            else:  # the rank kills itself later: its sockets exist once it trains
                job.until(lambda: job.trains or job.ended)
            held = job.holdings()
            outcomes.training += job.trains
            if target is not None and not job.ended:
                target(job)
            code = job.wait(TIMEOUT_S)
            outcomes.left_over += bool(left := job.left_over(held))
            print(*left, sep="\n", end="", file=sys.stderr)
            if code == 0:
                return job.run
        with LiveJob(folder, 2, *FLAGS) as again:
            if again.wait(TIMEOUT_S) == 0 and again.status["status"] == "completed":
                return again.run
            print(again.output, file=sys.stderr)
    return None


TARGETS: dict[Callable[[LiveJob], None] | None, int] = {
    one_rank: 20,
    all_ranks: 20,
    torchrun: 50,
    None: 50,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, help="of each kind")
    parser.add_argument("--saves", type=int, default=300)
    chosen = parser.parse_args()
    print("| injected | times | observed |\n|---|---|---|")
    for kind in ("torch.save", "mnist-dist"):
        if chosen.saves:
            unreadable, stray = kill_in_save(kind, chosen.saves)
            row(f"`kill -9` during save, {kind}", chosen.saves,
                f"{unreadable} unreadable, {stray} stray files")  # fmt: skip
    for target, count in TARGETS.items():
        if times := count if chosen.kills is None else chosen.kills:
            outcomes = kill_often(target, times)
            when = " of gradients" if target is None else " at a random time"
            row(f"`kill -9` of {_name(target)}{when}", times, outcomes)


def row(*cells: Any) -> None:
    """Print one row of the table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
