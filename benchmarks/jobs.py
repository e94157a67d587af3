"""Run the real job as a user would, and read what it recorded."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def train(run_dir: Path, processes: int, *flags: str) -> list[dict[str, Any]]:
    """Train in `run_dir` on `processes` processes; the objects of its metrics.jsonl.

    Raises:
        subprocess.CalledProcessError: the job did not end well; its output is on the console.
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train_ddp.py"), f"--run-dir={run_dir}"]
    subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def epochs_after_the_first(
    records: list[dict[str, Any]],
) -> list[tuple[float, dict[str, Any]]]:
    """Seconds of each epoch but the first, validation and records included; what it recorded."""
    epochs = [record for record in records if "val/loss" in record]
    return [(own["time"] - last["time"], own) for last, own in itertools.pairwise(epochs)]
