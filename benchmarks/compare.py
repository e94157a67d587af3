"""Time an epoch of the job and of its peers on the same work, interleaved in one run.

python -m benchmarks.compare --data ../shared/data/mnist.pkl.gz --world-sizes 1 2 4 --rounds 3

An epoch is training and validation. Ours, with either --step, is the whole job of 25 epochs (the
default) with its records and checkpoints. In each round every contender runs once, as its own job,
and its first epoch, a warm-up, does not count. The tables of `benchmarks.parts` and
`benchmarks.start` follow. `pip install -e '.[compare]'` installs the peers.
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
HEADER = "| processes | program | s/epoch | range | vs. mnist-dist | vs. --step manual "
HEADER += "| not training |\n" + "|---" * 7 + "|"
_INSIDE = "--inside"


def epochs_of_ours(work: Work, processes: int, step: str) -> tuple[list[float], float]:
    """Run the real job and read its metrics.jsonl.

    Returns:
        Seconds of each epoch but the first; and the share of their total that was not training but
        validation, records and checkpoints.
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
    """Run a peer's job; return the seconds of each epoch but the first."""
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
    """Run one process of a peer's job."""
    seconds = list(PEERS[name](work))
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(seconds))
    os._exit(0)  # gloo's threads sometimes abort a process that ends normally


def measure(work: Work, processes: int, rounds: int, names: list[str]) -> dict[str, list[float]]:
    """Return the seconds of each contender's epochs; the contenders take turns."""
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
    """Return the table's lines: median, spread, the ratio to ours, and what is not training."""
    ddp, manual = (statistics.median(seconds[name]) for name in OURS)
    shares = {name: seconds[_OTHER.format(name)] for name in OURS}
    lines = []
    for name, values in seconds.items():
        if name.endswith(_OTHER.format("")):
            continue
        middle = statistics.median(values)
        times = f"{middle / ddp:.2f} | {middle / manual:.2f}"
        spread = f"{min(values):.2f} to {max(values):.2f}"
        share = f"{statistics.median(shares[name]):.1%}" if name in shares else ""
        lines.append(f"| {processes} | {name} | {middle:.2f} | {spread} | {times} | {share} |")
    return lines


def main() -> None:
    """Print one table for all world sizes, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--epochs", type=int, default=3, help="of a peer's job, with the warm-up")
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
    chosen: argparse.Namespace, work: Work, show: Callable[[list[str]], None]
) -> dict[str, Any]:
    """Measure everything; `show` each table's lines as they are ready."""
    found: dict[str, Any] = {"epochs": {}, "parts": {}}
    show([HEADER])
    for processes in chosen.world_sizes:
        # The original runs on one process only.
        names = [n for n in chosen.peers if processes == 1 or n != "original script"]
        found["epochs"][processes] = measure(work, processes, chosen.rounds, names)
        show(table(processes, found["epochs"][processes]))
    if chosen.epochs_only:
        return found
    show(["", *parts.HEADER.splitlines()])
    for processes in chosen.world_sizes:
        seconds = parts.run(work.data, processes, work.global_batch_size, chosen.rounds)
        found["parts"][processes] = seconds
        show(parts.table(processes, seconds))
    found["start"] = start.measure(work.data, chosen.rounds)
    show(["", *start.table(found["start"])])
    return found


if __name__ == "__main__":
    main()
