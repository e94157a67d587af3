"""Kill things at random instants, many times, and count what was lost.

python -m benchmarks.faults                    all of it, about 20 minutes on 2 cores
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.live_job import LiveJob
from mnist_dist.checkpoint import CheckpointStore
from mnist_dist.errors import UserError

FLAGS = ["--data=bundled", "--train-samples=2400", "--epochs=2", "--global-batch-size=4"]
FLAGS += ["--lr=0.01", "--checkpoint-every-steps=100"]


def kill_in_save(kind: str, count: int) -> tuple[int, int]:
    """Kill a process that saves, `count` times; unreadable newest checkpoints, stray files."""
    unreadable = stray = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoints"
            directory.mkdir()
            writer = os.fork()  # a new interpreter would spend seconds on importing torch
            if writer == 0:
                _save_for_ever(directory, kind)
            time.sleep(random.uniform(0.02, 0.15))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            unreadable += not (_plain_is_sound if kind == "torch.save" else _ours_is_sound)(
                directory
            )
            names = {p.name for p in directory.iterdir()}
            stray += len([n for n in names if n.startswith(".") or n.endswith(".damaged")])
    return unreadable, stray


def _save_for_ever(directory: Path, kind: str) -> None:
    """What a writer does until it is killed: save one state after another."""
    state = {"model": {"w": torch.ones(300, 500)}}
    store = CheckpointStore(directory, 3)
    store.open()
    for step in itertools.count(1):
        if kind == "torch.save":
            torch.save(state, directory / "newest.pt")
        else:
            store.save(state, step, {})
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
    return not damaged


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
    kill(ranks(job)[:1] if random.random() < 0.5 else ranks(job)[-1:])


def all_ranks(job: LiveJob) -> None:
    kill(ranks(job))


def the_agent(job: LiveJob) -> None:
    kill([job.launcher.pid])


def kill_while_running(
    strike: Callable[[LiveJob], None], count: int, expected: float
) -> dict[str, int]:
    """Kill at a random time between start and end, then let torchrun or a relaunch end the job."""
    seen = {"completed": 0, "same loss": 0, "left over": 0}
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            run = _disturbed(Path(folder), strike, seen)
            if run is not None:
                seen["completed"] += 1
                seen["same loss"] += abs(final_loss(run) / expected - 1) < 1e-5
        print(f"  {strike.__name__} {number + 1}/{count}: {seen}", file=sys.stderr, flush=True)
    return seen


def _disturbed(
    folder: Path, strike: Callable[[LiveJob], None], seen: dict[str, int]
) -> Path | None:
    with LiveJob(folder, 2, *FLAGS, torchrun=("--max-restarts=3",)) as job:
        job.until(lambda: len(ranks(job)) == 2 or job.ended)
        time.sleep(random.uniform(0, 7))
        if not job.ended:
            strike(job)
        if strike is the_agent:
            job.launcher.wait()
            time.sleep(5)
            seen["left over"] += len(job.alive())
        elif job.wait() == 0:
            return job.run
    with LiveJob(folder, 2, *FLAGS) as again:
        if again.wait() == 0 and again.status["status"] == "completed":
            return again.run
        print(again.output, file=sys.stderr)
    return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--saves", type=int, default=300)
    chosen = parser.parse_args()
    print("| injected | times | must hold | seen |\n|---|---|---|---|")
    for kind in ("torch.save", "ours"):
        if chosen.saves:
            unreadable, stray = kill_in_save(kind, chosen.saves)
            row(f"`kill -9` during save, {kind}", chosen.saves, "0 unreadable, 0 stray files",
                f"{unreadable} unreadable, {stray} stray")  # fmt: skip
    if chosen.kills:
        with tempfile.TemporaryDirectory() as folder, LiveJob(Path(folder), 2, *FLAGS) as job:
            job.wait()
            expected = final_loss(job.run)
        for strike in (one_rank, all_ranks, the_agent):
            seen = kill_while_running(strike, chosen.kills, expected)
            name = strike.__name__.replace("_", " ")
            row(f"`kill -9` of {name} at a random time", chosen.kills,
                "completed, final loss within 1e-5, 0 processes 5 s later", text(seen))  # fmt: skip


def row(*cells: Any) -> None:
    """Print one row of the table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def text(seen: dict[str, int]) -> str:
    """Counts as words."""
    return ", ".join(f"{count} {what}" for what, count in seen.items())


if __name__ == "__main__":
    main()
