"""The directory of one run: found or made, what is in it besides checkpoints and metrics."""

import contextlib
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from filelock import FileLock, Timeout

from mnist_dist import __version__
from mnist_dist.atomic import write_atomically
from mnist_dist.errors import UserError

Status = Literal["running", "completed", "preempted", "failed"]


class RunDirectory:
    """One run's directory. Every rank may name it; only rank 0 opens it, reads and writes."""

    def __init__(self, path: Path) -> None:
        """Name the directory; nothing is touched before `open`."""
        self.path = path
        self._lock: FileLock | None = None

    def __str__(self) -> str:
        """The path as a person would type it: relative when it is below the current directory."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def open(self) -> None:
        """Make the directory and keep other jobs out of it until this process ends.

        Raises:
            UserError: it cannot be written, is not a run's, or another job has it open.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = self.status is not None or (self.path / "checkpoints").exists()
            if (self.path / "config.json").exists() and not ours:
                raise UserError(
                    f"--run-dir {self.path}: holds a config.json but no status.json that can be "
                    "read, so it is not a run's; name another"
                )
            self._lock = _lock(self.path)
        except OSError as error:
            file = self.path.exists() and not self.path.is_dir()
            why = "is a file" if file else error.strerror
            raise UserError(
                f"--run-dir {self.path}: {why}; name a directory that can be written"
            ) from error

    @property
    def status(self) -> str | None:
        """The status that the run last wrote; None if there is none to read."""
        return read_status(self.path)

    @property
    def had_checkpoint(self) -> bool:
        """Whether the run got so far, by its status or, if that is lost, by its metrics."""
        told = _read_status_file(self.path)
        if told:
            ended_saved = told.get("status") in ("completed", "preempted")
            return ended_saved or told.get("saved_step") is not None
        metrics = self.path / "metrics.jsonl"
        return metrics.is_file() and metrics.stat().st_size > 0

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the file `name` atomically."""
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_status(
        self,
        status: Status,
        epoch: int,
        step: int,
        saved_step: int | None,
        resumable: bool,
        reason: str,
    ) -> None:
        """Say in status.json how the run stands.

        Args:
            status: the state of the run.
            epoch: epochs finished.
            step: optimizer steps taken.
            saved_step: the step of the newest checkpoint, from which the run would continue.
            resumable: the same command may get further, though nobody mends anything first:
                launch scripts requeue by it.
            reason: why, for a person.
        """
        about = {"status": status, "epoch": epoch, "step": step, "saved_step": saved_step}
        why = {"resumable": resumable, "reason": reason, "time": time.time()}
        self.write_json("status.json", about | why)


def read_status(path: Path) -> str | None:
    """The status in the run directory `path`; None if it is not a run's directory."""
    told = _read_status_file(path)
    return str(told["status"]) if "status" in told else None


def _read_status_file(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((path / "status.json").read_text())
        return told if isinstance(told, dict) else {}
    return {}


def find_run_directory(run_dir: str | None, job_id: str | None) -> Path:
    """The directory the user named, that of an earlier start of the same job, or a new name.

    Args:
        run_dir: as the user gave it, or None for `runs/<timestamp>_<launch id>`.
        job_id: the same for every restart of the job, so that a restart finds its unfinished run;
            None if the launcher names nothing of the kind.

    Returns:
        An absolute path; nothing is made.
    """
    chosen = Path(run_dir).expanduser() if run_dir is not None else _default_path(job_id)
    return chosen.absolute()


def _default_path(job_id: str | None) -> Path:
    runs = Path("runs")
    if job_id is not None:
        name = re.compile(rf"[\d-]+_{re.escape(job_id)}")
        earlier = [p for p in runs.glob("*") if name.fullmatch(p.name)]
        unfinished = [p for p in earlier if read_status(p) != "completed"]
        if unfinished:
            return max(unfinished)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return runs / f"{stamp}_{job_id or f'pid-{os.getpid()}'}"


def _lock(path: Path) -> FileLock:
    """Hold the directory for this process; the kernel frees it when the process dies."""
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=10)  # a process killed just now may take a moment to be gone
    except Timeout:
        raise UserError(
            f"--run-dir {path}: another job is writing there; name another, or wait for its end"
        ) from None
    except NotImplementedError:  # a file system without locks: go on without
        pass
    return lock


def code_digest() -> str:
    """SHA-256 (hex) of this package's sources: equal on hosts that run the same code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def environment_facts() -> dict[str, Any]:
    """What the figures of a run may depend on beside its configuration."""
    return {
        "mnist_dist": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """The commit of this code's checkout, "-dirty" if it was changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() or None
    return None
