"""Measure the time from start to the first step, and the memory that one more process takes.

python -m benchmarks.start --data ../shared/data/mnist.pkl.gz

The data is in the cache before. A bare process only imports torch; a bare rank also forms a gloo
group. Memory is the sum of the processes' proportional shares (PSS of /proc/PID/smaps_rollup).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_BARE_START = "import time, torch; print(time.time())"
# The real job up to the end of its first optimizer step.
OUR_START = """
import os, sys, time, train_ddp
step = train_ddp.train_step
def first_step(*arguments):
    step(*arguments)
    os.write(1, f"{time.time()}\\n".encode())  # one write, not to mix with other ranks' lines
    os._exit(0)
train_ddp.train_step = first_step
train_ddp.run(sys.argv[1:])
"""
READ = """
import sys, time, torch
from mnist_dist.data import load, find_data
started = time.perf_counter()
load(find_data(sys.argv[1], None))
print(time.perf_counter() - started)
"""
_PSS = """
def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
"""
_BARE_RANK = f"""
import os, torch, torch.distributed as dist
{_PSS}
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
dist.barrier()
sizes = [None] * dist.get_world_size()
dist.all_gather_object(sizes, pss())
if dist.get_rank() == 0:
    print(sum(sizes), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends normally
"""
# The real job; prints the memory of all ranks after the first epoch.
_OUR_RANK = f"""
import sys, train_ddp
{_PSS}
evaluate = train_ddp.evaluate
def evaluate_and_print_pss(model, split, world, *rest, **named):
    result = evaluate(model, split, world, *rest, **named)
    sizes = world.gather(pss())
    if world.is_main_process:
        print("PSS", sum(sizes), flush=True)
    return result
train_ddp.evaluate = evaluate_and_print_pss
train_ddp.run(sys.argv[1:])
"""


def run_python(program: str, *arguments: str, processes: int = 1) -> str:
    """Run a program in a temporary directory, several processes by torchrun; return its output."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "program.py"
        script.write_text(program)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        root = Path(__file__).parent.parent
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), str(script), *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(root)},
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return done.stdout


def seconds_until_output(program: str, *arguments: str, processes: int = 1) -> float:
    """Return the seconds from the start of a program until its first process prints the time."""
    started = time.time()
    output = run_python(program, *arguments, processes=processes)
    return min(float(line) for line in output.splitlines() if line[:1].isdigit()) - started


def our_memory(data: str, processes: int) -> float:
    """Return the MiB of all the job's processes together, after an epoch."""
    return _memory(_OUR_RANK, ["--data", data, "--epochs=1"], processes)


def measure(data: str, rounds: int) -> dict[str, list[float]]:
    """Measure each time once a round, bare and ours in turns, and memory once."""
    flags = ["--data", data, "--epochs=1"]
    results: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        results.setdefault(name, []).append(value)

    for _ in range(rounds):
        add("import torch (s)", seconds_until_output(_BARE_START))
        add("start to first step (s)", seconds_until_output(OUR_START, *flags))
        add("cache read (s)", float(run_python(READ, data)))
    add(
        "memory a third bare rank adds (MiB)",
        _memory(_BARE_RANK, [], 3) - _memory(_BARE_RANK, [], 2),
    )
    add("memory a third mnist-dist rank adds (MiB)", our_memory(data, 3) - our_memory(data, 2))
    return results


def _memory(program: str, arguments: list[str], processes: int) -> float:
    for line in run_python(program, *arguments, processes=processes).splitlines():
        if line.startswith("PSS") or line[:1].isdigit():
            return float(line.split()[-1])
    raise RuntimeError("the job did not print its memory")


def table(results: dict[str, list[float]]) -> list[str]:
    """Return the table's lines: medians and spread."""
    lines = ["| measurement | median | range |", "|---|---|---|"]
    for name, values in results.items():
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {statistics.median(values):.3f} | {spread} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    data = chosen.data if chosen.data in ("auto", "bundled") else str(Path(chosen.data).resolve())
    run_python(READ, data)  # fills the cache
    results = measure(data, chosen.rounds)
    print(json.dumps(results) if chosen.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
