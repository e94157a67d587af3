"""Run the real job from its command line and read its metrics.jsonl."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def train(run_dir: Path, processes: int, *flags: str) -> list[dict[str, Any]]:
    """Train in `run_dir` on `processes` processes; return the objects of its metrics.jsonl.

    Raises:
        subprocess.CalledProcessError: the job failed; its error is on stderr.
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train_ddp.py"), f"--run-dir={run_dir}"]
    subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def epochs_after_the_first(
    records: list[dict[str, Any]],
) -> list[tuple[float, dict[str, Any]]]:
    """Return seconds, validation and records included, and record of each epoch but the first."""
    epochs = [record for record in records if "val/loss" in record]
    return [
        (record["time"] - previous["time"], record)
        for previous, record in itertools.pairwise(epochs)
    ]
