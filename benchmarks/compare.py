"""Seconds an epoch takes, ours and the peers', on the same work, interleaved in one run.

python -m benchmarks.compare --data ../shared/data/mnist.pkl.gz --world-sizes 1 2 4 --rounds 3

An epoch is training and validation; ours is the whole job of 25 epochs, the default, with its
records and checkpoints. Every contender runs as a job of its own, one after another, as often as
there are rounds; the first epoch of each job warms up and does not count. Then follow the tables of
`benchmarks.parts` and `benchmarks.start`. `pip install -e '.[compare]'` installs the peers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import parts, start
from benchmarks.jobs import epochs_after_the_first, train
from benchmarks.peers import PEERS, Work

OURS = {"mnist-dist": "ddp", "mnist-dist --step manual": "manual"}
_OTHER = "{}: not training"
_INSIDE = "--inside"


def epochs_of_ours(work: Work, processes: int, step: str) -> tuple[list[float], float]:
    """Each epoch of the real job but the first, from its own record.

    Returns:
        Its seconds; and the share of them all that was not training but validation, records and
        checkpoints.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = [f"--data={work.data}", f"--global-batch-size={work.global_batch_size}"]
        flags.append(f"--step={step}")
        records = train(Path(directory) / "run", processes, *flags)
    epochs = epochs_after_the_first(records)
    steps = records[0]["step"]
    training = sum(steps * record["perf/step_ms"] / 1e3 for _, record in epochs)
    seconds = [taken for taken, _ in epochs]
    return seconds, 1 - training / sum(seconds)


def epochs_of_peer(name: str, work: Work, processes: int) -> list[float]:
    """The same of a peer, in a job of its own."""
    words = ["-m", "benchmarks.compare", _INSIDE, name, "--data", work.data]
    words += ["--epochs", str(work.epochs), "--batch", str(work.global_batch_size)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.NamedTemporaryFile("r") as result:
        subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), *words],
            env={**os.environ, "BENCHMARK_RESULT": result.name},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds: list[float] = json.load(result)
    return seconds[1:]


def run_inside(name: str, work: Work) -> NoReturn:
    """Be one process of a peer's job."""
    seconds = list(PEERS[name](work))
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(seconds))
    os._exit(0)  # left to the interpreter's end, gloo's threads abort the process now and then


def measure(work: Work, processes: int, rounds: int, names: list[str]) -> dict[str, list[float]]:
    """Seconds of all epochs of each contender; the contenders take turns."""
    shares = {name: _OTHER.format(name) for name in OURS}
    seconds: dict[str, list[float]] = {n: [] for n in (*OURS, *names, *shares.values())}
    for _ in range(rounds):
        for ours, step in OURS.items():
            epochs, share = epochs_of_ours(work, processes, step)
            seconds[ours] += epochs
            seconds[shares[ours]].append(share)
        for name in names:
            seconds[name] += epochs_of_peer(name, work, processes)
    return seconds


def table(processes: int, seconds: dict[str, list[float]]) -> list[str]:
    """Lines of the table: medians, spread, and how many times faster ours is with either step."""
    ddp, manual = (statistics.median(seconds[name]) for name in OURS)
    lines = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        if name.endswith(_OTHER.format("")):
            spread = f"{min(values):.1%} to {max(values):.1%}"
            lines.append(f"| {processes} | {name} | {middle:.1%} | {spread} | | |")
            continue
        times = f"{middle / ddp:.2f} | {middle / manual:.2f}"
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {processes} | {name} | {middle:.2f} | {spread} | {times} |")
    return lines


def main() -> None:
    """Print one table for all world sizes, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", default="auto", help="as of train_ddp.py")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--epochs", type=int, default=3, help="of a peer's job; the first warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--epochs-only", action="store_true", help="the first table only")
    parser.add_argument("--json", action="store_true", help="every epoch's seconds, as one object")
    parser.add_argument(_INSIDE, choices=PEERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    data = chosen.data if chosen.data in ("auto", "bundled") else str(Path(chosen.data).resolve())
    work = Work(data, chosen.epochs, chosen.batch)
    if chosen.inside:
        run_inside(chosen.inside, work)
    if chosen.json:
        print(json.dumps(everything(chosen, work, lambda lines: None)))
    else:
        everything(chosen, work, lambda lines: print("\n".join(lines), flush=True))


def everything(
    chosen: argparse.Namespace, work: Work, say: Callable[[list[str]], None]
) -> dict[str, Any]:
    """Measure all there is to measure, and say each table's lines as they come."""
    found: dict[str, Any] = {"epochs": {}, "parts": {}}
    say(
        [
            "| processes | | s an epoch | from to | times ddp | times manual |",
            "|---|---|---|---|---|---|",
        ]
    )
    for processes in chosen.world_sizes:
        # The original knows one process only.
        names = [n for n in chosen.peers if processes == 1 or n != "original script"]
        found["epochs"][processes] = measure(work, processes, chosen.rounds, names)
        say(table(processes, found["epochs"][processes]))
    if chosen.epochs_only:
        return found
    say(["", *parts.HEADER.splitlines()])
    for processes in chosen.world_sizes:
        seconds = parts.run(work.data, processes, work.global_batch_size, chosen.rounds)
        found["parts"][processes] = seconds
        say(parts.table(processes, seconds))
    found["start"] = start.measure(work.data, chosen.rounds)
    say(["", *start.table(found["start"])])
    return found


if __name__ == "__main__":
    main()
