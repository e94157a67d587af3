"""Check and time the GPU path: python -m benchmarks.gpu --check [--data mnist.pkl.gz].

Prints one table at the end; what fails does not stop the rest. With $OUT set, leaves check.json and
the errors' tracebacks there. `--device cpu` makes the checks that need no GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks
from benchmarks.gpu.measurements import measure

_CHECK_S = 150.0  # after which a check has failed
_AT_ONCE = 5


def main() -> int:
    """Run what the flags ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="make the checks")
    parser.add_argument("--measure", action="store_true", help="take the measurements (GPU only)")
    parser.add_argument("--data", default="auto", help="full MNIST, for the measurements")
    parser.add_argument("--rounds", type=int, default=5, help="of epochs; 0 leaves them out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a check")
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        checks.run(chosen.run, chosen.device)
    result: dict[str, Any] = {"machine": describe(chosen.device)}
    if chosen.check:
        result["checks"] = check_all(chosen.device, chosen.only)
    if chosen.measure:
        result["measurements"] = measure(chosen.data, chosen.device, chosen.rounds)
    if directory := os.environ.get("OUT"):
        (Path(directory) / "gpu.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    return int(not all(each["ok"] for each in result.get("checks", {}).values()))


def describe(device: str) -> str:
    """Name the device and the versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cpu":
        return f"CPU, {versions}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{found}, CUDA {torch.version.cuda}, NCCL {nccl}, {versions}"


def check_all(device: str, only: list[str]) -> dict[str, dict[str, Any]]:
    """Make all checks, some at a time, each in a process of its own; return results by name."""
    names = [*checks.ON_ANY_DEVICE, *(checks.ON_GPUS if device != "cpu" else ())]
    names = [name for name in names if not only or name in only]
    found: dict[str, dict[str, Any]] = {}
    for at_once, chosen in (
        (_AT_ONCE if device != "cpu" else 1, [n for n in names if n not in checks.ALONE]),
        (1, [n for n in names if n in checks.ALONE]),
    ):
        with ThreadPoolExecutor(at_once) as pool:
            results = pool.map(lambda name: _check(name, device), chosen)
            found |= dict(zip(chosen, results, strict=True))
    return found


def _check(name: str, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu", f"--run={name}", f"--device={device}"]
    started = time.monotonic()
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_CHECK_S, check=False
        )
        lines = ended.stdout.splitlines()
        result = json.loads(lines[-1]) if lines else {"ok": False, "found": ended.stderr[-1000:]}
        errors = ended.stderr
    except subprocess.TimeoutExpired as error:
        result = {"ok": False, "found": f"not done after {_CHECK_S:.0f} s"}
        errors = str(error.stderr)
    if not result["ok"]:
        print(f"== {name} failed: {result['found']}\n{errors[-3000:]}", flush=True)
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def table(result: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    lines = [result["machine"], "", "| check | | found | s |", "|---|---|---|---|"]
    for name, each in result.get("checks", {}).items():
        mark, found = ("ok" if each["ok"] else "FAILED"), str(each["found"]).replace("\n", " ")
        lines.append(f"| {name.replace('_', ' ')} | {mark} | {found[:400]} | {each['seconds']} |")
    for name, rows in result.get("measurements", {}).items():
        lines += ["", name, json.dumps(rows) if not _is_table(rows) else _rows(rows)]
    return "\n".join(lines)


def _is_table(rows: dict[str, Any]) -> bool:
    return all(isinstance(row, dict) for row in rows.values())


def _rows(rows: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.4g}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
