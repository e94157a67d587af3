"""A job that runs while faults are done to it: its processes by rank, and how it ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_MARK = "MNIST_DIST_LIVE_JOB"


class LiveJob:
    """`train_ddp.py` under torchrun or plain python, with every process findable by a mark."""

    def __init__(
        self,
        directory: Path,
        processes: int,
        *flags: str,
        torchrun: tuple[str, ...] = (),
        script: Path = ROOT / "train_ddp.py",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.run = directory / "run"
        self._mark = uuid.uuid4().hex
        self._log = directory / f"log-{self._mark[:8]}"
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun]
        words = [sys.executable, *(launcher if processes > 1 else []), str(script)]
        with self._log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*words, f"--run-dir={self.run}", *flags],
                cwd=directory,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **(environment or {}),
                    _MARK: self._mark,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "LiveJob":
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left, so that no test leaves processes behind."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    @property
    def output(self) -> str:
        """What all processes have said so far."""
        return self._log.read_text()

    @property
    def status(self) -> dict[str, Any]:
        """The run's status.json; empty before there is one."""
        with contextlib.suppress(OSError, ValueError):
            content: dict[str, Any] = json.loads((self.run / "status.json").read_text())
            return content
        return {}

    def alive(self) -> dict[int, int | None]:
        """The job's living processes: pid to rank, or to None for a launcher."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"{_MARK}={self._mark}".encode() in variables and not _is_dead(entry):
                    ranks = [v[5:] for v in variables if v.startswith(b"RANK=")]
                    found[int(entry.name)] = int(ranks[0]) if ranks else None
        return found

    def pid_of(self, rank: int) -> int:
        """The process of `rank`; the only one if there is no launcher."""
        for pid, own in self.alive().items():
            if own == rank:
                return pid
        return self.launcher.pid

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until `condition` holds, else raise TimeoutError with what the job said."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s in vain; the job said:\n{self.output}")
            time.sleep(0.01)

    def until_training(self) -> None:
        """Wait until the first epoch has been recorded in this start of the job."""
        self.until(lambda: "epoch " in self.output.partition("run    ")[2] or self.ended)

    @property
    def ended(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher.poll() is not None

    def wait(self, timeout: float = 120) -> int:
        """The launcher's exit code."""
        try:
            return self.launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end in {timeout} s; the job said:\n{self.output}") from None


def _is_dead(entry: Path) -> bool:
    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
    return state in "ZX"
