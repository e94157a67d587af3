"""A job that runs while faults are done to it: its processes, what they hold, how it ended."""

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

    def holdings(self) -> set[str]:
        """What its processes hold that might outlive them: sockets and shared memory, by inode."""
        held: set[str] = set()
        for pid in self.alive():
            with contextlib.suppress(OSError):
                held |= _shared_memory(Path(f"/proc/{pid}"))
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        held.add(str(descriptor.readlink()))
        return {name for name in held if name.startswith(("socket:", "memory:"))}

    def left_over(self, held: set[str], grace: float = 5.0) -> list[str]:
        """Its processes, and things among `held`, that are still there after `grace` seconds."""
        deadline = time.monotonic() + grace
        while (left := self._left_over(held)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left_over(self, held: set[str]) -> list[str]:
        entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        now: set[str] = set().union(*map(_shared_memory, entries))
        now |= set(map(_file_identity, Path("/dev/shm").iterdir()))
        table = Path("/proc/net/unix").read_text().splitlines()[1:]
        now |= {f"socket:[{line.split()[6]}]" for line in table}
        return [*(f"process {pid}" for pid in self.alive()), *(now & held)]

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
        """Wait until the first epoch has been recorded in this start of the job.

        Lines of progress within an epoch name it, too, but do not start with it.
        """
        self.until(lambda: "\nepoch " in self.output.partition("run    ")[2] or self.ended)

    @property
    def trains(self) -> bool:
        """Whether its ranks have begun to take steps, and its launcher lives."""
        return not self.ended and "\nstep   " in self.output

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


def _shared_memory(process: Path) -> set[str]:
    """The shared memory that a process has mapped, with or without a name, by inode."""
    with contextlib.suppress(OSError):
        maps = [line.split() for line in (process / "maps").read_text().splitlines()]
        shared = [m for m in maps if m[5:] and m[5].startswith(("/memfd:", "/dev/shm/"))]
        return {f"memory:{device}:{inode}" for _, _, _, device, inode, *_ in shared}
    return set()


def _file_identity(file: Path) -> str:
    """As /proc/PID/maps has it."""
    with contextlib.suppress(FileNotFoundError):
        about = file.stat()
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        return f"memory:{device}:{about.st_ino}"
    return ""
