"""Kill things at random instants, many times, and count what was lost.

python -m benchmarks.faults                    all of it, in a quarter of an hour or more
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
IN_A_SUM = ROOT / "benchmarks" / "killed_in_sum.py"
# Seconds after which a job counts as hung; it takes a tenth of that where nothing else runs.
PATIENCE = 300.0


def kill_in_save(kind: str, count: int) -> tuple[int, int]:
    """Kill a process that saves, `count` times; unreadable newest checkpoints, stray files."""
    unreadable = stray = 0
    # Made here: torch's own threads do not survive a fork, and the writer would wait for them.
    state = {"model": {"w": torch.ones(300, 500)}}
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoints"
            directory.mkdir()
            writer = os.fork()  # a new interpreter would spend seconds on importing torch
            if writer == 0:
                _save_for_ever(state, directory, kind)
            while not any(directory.iterdir()):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.12))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            unreadable += not (_plain_is_sound if kind == "torch.save" else _ours_is_sound)(
                directory
            )
            names = {p.name for p in directory.iterdir()}
            stray += len([n for n in names if n.startswith(".") or n.endswith(".damaged")])
    return unreadable, stray


def _save_for_ever(state: dict[str, Any], directory: Path, kind: str) -> None:
    """What a writer does until it is killed: save one state after another."""
    killer = os.getppid()
    store = CheckpointStore(directory, 3)
    store.open()
    for step in itertools.count(1):
        if os.getppid() != killer:
            os._exit(1)
        if kind == "torch.save":
            torch.save(state, directory / "newest.pt")
        else:
            store.save(state, step, {}, best=True)
            store.flush()


def _plain_is_sound(directory: Path) -> bool:
    newest = directory / "newest.pt"
    try:
        return not newest.exists() or bool(torch.load(newest, weights_only=True))
    except Exception:
        return False


def _ours_is_sound(directory: Path) -> bool:
    """As the next start finds it; nothing saved yet is sound too, nothing found damaged."""
    store = CheckpointStore(directory, 3)
    store.open()
    try:
        _, damaged = store.load_latest()
    except UserError:
        return False
    return not damaged and (store.has_best() or not (directory / "best.pt").exists())


def final_loss(run: Path) -> float:
    """The last epoch's validation loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([r["val/loss"] for r in records if "val/loss" in r][-1])


def ranks(job: LiveJob) -> list[int]:
    """The processes of the job's ranks."""
    return [pid for pid, rank in job.alive().items() if rank is not None]


def kill(pids: list[int]) -> None:
    """SIGKILL; a process that has just ended by itself needs none."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def one_rank(job: LiveJob) -> None:
    kill(random.sample(found, 1) if (found := ranks(job)) else [])


def all_ranks(job: LiveJob) -> None:
    kill(ranks(job))


def the_agent(job: LiveJob) -> None:
    kill([job.launcher.pid])


@dataclass
class Seen:
    """What came of some kills."""

    training: int = 0
    completed: int = 0
    same_loss: int = 0
    left_over: int = 0

    def __str__(self) -> str:
        return (
            f"{self.completed} completed, {self.same_loss} same loss, {self.left_over} left over; "
            f"{self.training} struck in training"
        )


def undisturbed() -> tuple[float, float]:
    """Seconds from the ranks' start to the end of a job that nobody disturbs; its final loss."""
    with tempfile.TemporaryDirectory() as folder, LiveJob(Path(folder), 2, *FLAGS) as job:
        job.until(lambda: len(ranks(job)) == 2)
        begun = time.monotonic()
        if job.wait(PATIENCE) != 0:
            raise RuntimeError(job.output)
        return time.monotonic() - begun, final_loss(job.run)


def strike_often(strike: Callable[[LiveJob], None] | None, count: int) -> Seen:
    """Kill at instants spread over the job's whole time, then let torchrun or a relaunch end it.

    None stands for a rank that is killed from within, inside a sum of gradients.
    """
    seen = Seen()
    (span, expected) = undisturbed()
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            # One at random in each of `count` equal parts of the time.
            run = _disturbed(Path(folder), strike, span * (number + random.random()) / count, seen)
            if run is not None:
                seen.completed += 1
                seen.same_loss += abs(final_loss(run) / expected - 1) < 1e-5
        print(f"  {_name(strike)} {number + 1}/{count}: {seen}", file=sys.stderr, flush=True)
    return seen


def _name(strike: Callable[[LiveJob], None] | None) -> str:
    return strike.__name__.replace("_", " ") if strike else "a rank in a sum"


def _disturbed(
    folder: Path, strike: Callable[[LiveJob], None] | None, delay: float, seen: Seen
) -> Path | None:
    options: dict[str, Any] = {"torchrun": ("--max-restarts=3",)}
    if strike is None:
        place = f"{random.randrange(2)}:{random.randint(1, STEPS)}:{random.randrange(2)}"
        options |= {"script": IN_A_SUM, "environment": {"KILLED_IN_SUM": place}}
    with contextlib.suppress(TimeoutError):  # a hang: not completed
        with LiveJob(folder, 2, *FLAGS, **options) as job:
            job.until(lambda: len(ranks(job)) == 2 or job.ended)
            if strike is not None:
                time.sleep(delay)
            else:  # it comes by itself, and the sockets are there to be looked at until it does
                job.until(lambda: job.trains or job.ended)
            held = job.holdings()
            seen.training += job.trains
            if strike is not None and not job.ended:
                strike(job)
            code = job.wait(PATIENCE)
            seen.left_over += bool(left := job.left_over(held))
            print(*left, sep="\n", end="", file=sys.stderr)
            if code == 0:
                return job.run
        with LiveJob(folder, 2, *FLAGS) as again:
            if again.wait(PATIENCE) == 0 and again.status["status"] == "completed":
                return again.run
            print(again.output, file=sys.stderr)
    return None


STRIKES: dict[Callable[[LiveJob], None] | None, int] = {
    one_rank: 20,
    all_ranks: 20,
    the_agent: 50,
    None: 50,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, help="of each kind")
    parser.add_argument("--saves", type=int, default=300)
    chosen = parser.parse_args()
    print("| injected | times | must hold | seen |\n|---|---|---|---|")
    for kind in ("torch.save", "ours"):
        if chosen.saves:
            unreadable, stray = kill_in_save(kind, chosen.saves)
            row(f"`kill -9` during save, {kind}", chosen.saves, "0 unreadable, 0 stray files",
                f"{unreadable} unreadable, {stray} stray")  # fmt: skip
    for strike, count in STRIKES.items():
        if times := count if chosen.kills is None else chosen.kills:
            seen = strike_often(strike, times)
            when = " of gradients" if strike is None else " at a random time"
            row(f"`kill -9` of {_name(strike)}{when}", times,
                "all completed, final loss within 1e-5, 0 left over", seen)  # fmt: skip


def row(*cells: Any) -> None:
    """Print one row of the table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
