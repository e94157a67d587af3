"""From start to the first step, and the memory that one more process takes.

python -m benchmarks.start --data ../shared/data/mnist.pkl.gz

The data is in the cache already. A bare process only imports torch; a bare rank also joins a gloo
group. Memory is the sum of all processes' proportional shares (PSS of /proc/PID/smaps_rollup).
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
# The job as it is, up to the end of its first optimizer step.
OUR_START = """
import os, sys, time, train_ddp
steps = train_ddp.train_epoch
def first(*arguments):
    for loss_sum in steps(*arguments):
        os.write(1, f"{time.time()}\\n".encode())  # whole: other ranks say theirs, too
        os._exit(0)
train_ddp.train_epoch = first
train_ddp.run(sys.argv[1:])
"""
READ = """
import sys, time, torch
from mnist_dist.data import load, find_data
begun = time.perf_counter()
load(find_data(sys.argv[1], None))
print(time.perf_counter() - begun)
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
os._exit(0)  # left to the interpreter's end, gloo's threads abort the process now and then
"""
# The job as it is; after its first epoch every rank says what it takes.
_OUR_RANK = f"""
import sys, train_ddp
{_PSS}
evaluate = train_ddp.evaluate
def weighed(model, split, world, *rest, **more):
    result = evaluate(model, split, world, *rest, **more)
    sizes = world.gather(pss())
    if world.is_main:
        print("PSS", sum(sizes), flush=True)
    return result
train_ddp.evaluate = weighed
train_ddp.run(sys.argv[1:])
"""


def run_python(program: str, *arguments: str, processes: int = 1) -> str:
    """What a program prints, in a directory of its own; torchrun starts several processes."""
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


def started(program: str, *arguments: str, processes: int = 1) -> float:
    """Seconds from the start of a program to the moment that its first process prints."""
    begun = time.time()
    said = run_python(program, *arguments, processes=processes)
    return min(float(line) for line in said.splitlines() if line[:1].isdigit()) - begun


def our_memory(data: str, processes: int) -> float:
    """MiB of all the job's processes together, after an epoch."""
    return _weighed(_OUR_RANK, ["--data", data, "--epochs=1"], processes)


def measure(data: str, rounds: int) -> dict[str, list[float]]:
    """Every figure as often as there are rounds; bare and ours take turns."""
    flags = ["--data", data, "--epochs=1"]
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for _ in range(rounds):
        note("import torch, s", started(_BARE_START))
        note("start to first step, s", started(OUR_START, *flags))
        note("read the cached data, s", float(run_python(READ, data)))
    note("a third bare rank, MiB", _weighed(_BARE_RANK, [], 3) - _weighed(_BARE_RANK, [], 2))
    note("a third rank of ours, MiB", our_memory(data, 3) - our_memory(data, 2))
    return seen


def _weighed(program: str, arguments: list[str], processes: int) -> float:
    for line in run_python(program, *arguments, processes=processes).splitlines():
        if line.startswith("PSS") or line[:1].isdigit():
            return float(line.split()[-1])
    raise RuntimeError("the job said nothing of its memory")


def table(seen: dict[str, list[float]]) -> list[str]:
    """Lines of the table: medians and spread."""
    lines = ["| what | median | from to |", "|---|---|---|"]
    for name, values in seen.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"| {name} | {statistics.median(values):.3f} | {spread} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as of train_ddp.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    data = chosen.data if chosen.data in ("auto", "bundled") else str(Path(chosen.data).resolve())
    run_python(READ, data)  # fills the cache
    seen = measure(data, chosen.rounds)
    print(json.dumps(seen) if chosen.json else "\n".join(table(seen)))


if __name__ == "__main__":
    main()
