"""The job's command line, as the checks use it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["--data=bundled", "--epochs=3", "--lr=0.05"]
# Trains with another model than build_model's; the first argument is an expression.
PROGRAM = """
import sys, torch, train_ddp, mnist_dist.model, mnist_dist.job
from torch import nn
from benchmarks.gpu import models
build = getattr(models, sys.argv.pop(1))
for module in (train_ddp, mnist_dist.job, mnist_dist.model):
    module.build_model = build
train_ddp.run(sys.argv[1:])
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float
    run: Path

    @property
    def losses(self) -> list[float]:
        """Validation losses, one for each epoch."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [record["val/loss"] for record in map(json.loads, lines) if "val/loss" in record]

    @property
    def step(self) -> str:
        """What the line `step` shows."""
        return next(line[7:] for line in self.out.splitlines() if line.startswith("step "))

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return status

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the newest checkpoint."""
        newest = max(self.run.glob("checkpoints/step_*.pt"))
        weights: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["model"]
        return weights

    def require(self, code: int = 0) -> "Ended":
        """Return this, if the job ended with `code`."""
        assert self.code == code, f"exit code {self.code}: {self.err[-600:]}"
        return self


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def start(
    run: Path, *flags: str, processes: int = 0, model: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Start the job; with `processes`, by torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] * bool(processes)
    script = ["-c", PROGRAM, model] if model else [*launcher, str(ROOT / "train_ddp.py")]
    return subprocess.Popen(
        [sys.executable, *script, f"--run-dir={run}", *FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,
    )


def finish(run: Path, job: subprocess.Popen[str], started: float, timeout: float = 100.0) -> Ended:
    """Wait for a job that `start` returned; one that hangs is killed and has code -9."""
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
    return Ended(job.returncode, out, err, time.monotonic() - started, run)


def train(run: Path, *flags: str, **options: Any) -> Ended:
    """Run the job to its end."""
    started = time.monotonic()
    return finish(run, start(run, *flags, **options), started)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models' weights are the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    assert len(a) == len(b) > 0, (a, b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
