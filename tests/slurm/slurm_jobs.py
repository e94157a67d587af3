"""Jobs on the private Slurm: submitted with sbatch, watched through squeue and status.json."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from private_slurm import Cluster
from processes import metrics

_ENDS = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}


class Job:
    """One of launch/'s sbatch scripts, submitted from a checkout."""

    def __init__(
        self,
        cluster: Cluster,
        checkout: Path,
        script: str,
        *flags: str,
        sbatch: str = "",
        nice: int = 0,
        **variables: str,
    ) -> None:
        self.cluster = cluster
        self.checkout = checkout
        activate = Path(sys.prefix) / "bin" / "activate"
        environment = cluster.environment | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ACTIVATE": str(activate) if activate.exists() else "",
            **variables,
        }
        words = [
            "nice",
            f"-n{nice}",
            "sbatch",
            "--parsable",
            *sbatch.split(),
            f"launch/{script}",
            *flags,
        ]
        done = subprocess.run(
            words,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    @property
    def state(self) -> str:
        """Slurm's word for the job; of an array's tasks, each one's once."""
        states = self.cluster.ask("squeue", "-h", "-tall", f"-j{self.id}", "-o%T").split()
        return " ".join(sorted(set(states)))

    @property
    def restarts(self) -> int:
        shown = self.cluster.ask("scontrol", "show", "job", self.id)
        return int(shown.partition("Restarts=")[2].split()[0])

    @property
    def output(self) -> str:
        """The job's log files."""
        return "".join(
            log.read_text() for log in sorted(self.checkout.glob(f"slurm-{self.id}*.out"))
        )

    @property
    def run(self) -> Path:
        """The job's only run directory."""
        runs = list((self.checkout / "runs").glob(f"*_slurm-{self.id}"))
        assert len(runs) == 1, (runs, self.output)
        return runs[0]

    @property
    def status(self) -> dict[str, Any]:
        """Its status.json; empty before there is one."""
        for file in (self.checkout / "runs").glob(f"*_slurm-{self.id}/status.json"):
            content: dict[str, Any] = json.loads(file.read_text())
            return content
        return {}

    def processes(self) -> list[int]:
        """Those that train, on all nodes; under torchrun its agents too."""
        return self.cluster.processes("train_ddp.py", f"SLURM_JOB_ID={self.id}")

    def until(self, *states: str, timeout: float = 90) -> None:
        """Wait until Slurm says one of `states`; another end is an error at once."""
        try:
            self.cluster.until(lambda: self.state in {*states, *_ENDS}, timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{self.state}\n{self.output}\n{error}") from error
        assert self.state in states, self.output + self.cluster.report()

    def until_saved(self, step: int = 1) -> None:
        """Wait until it has a checkpoint of `step` or later."""
        try:
            self.cluster.until(lambda: (self.status.get("saved_step") or 0) >= step)
        except TimeoutError as error:
            raise TimeoutError(f"{self.output}\n{error}") from error

    def final_loss(self) -> float:
        """The validation loss of the last epoch, of which each must be there once."""
        losses = [r["val/loss"] for r in metrics(self.run) if "val/loss" in r]
        assert [r["epoch"] for r in metrics(self.run) if "val/loss" in r] == list(
            range(1, len(losses) + 1)
        )
        return float(losses[-1])
