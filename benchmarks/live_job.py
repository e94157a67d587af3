"""A running job to inject faults into: its processes, what they hold open, how it ended."""

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
_VARIABLE = "MNIST_DIST_LIVE_JOB"


class LiveJob:
    """`train_ddp.py` under torchrun or plain python; a variable marks all its processes."""

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
        self._token = uuid.uuid4().hex
        self._log = directory / f"log-{self._token[:8]}"
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
                    _VARIABLE: self._token,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "LiveJob":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all processes that are left."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    @property
    def output(self) -> str:
        """Output of all processes so far."""
        return self._log.read_text()

    @property
    def status(self) -> dict[str, Any]:
        """Content of the run's status.json, empty before there is one."""
        with contextlib.suppress(OSError, ValueError):
            content: dict[str, Any] = json.loads((self.run / "status.json").read_text())
            return content
        return {}

    def alive(self) -> dict[int, int | None]:
        """Return the rank of each live process by pid, None for a launcher."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"{_VARIABLE}={self._token}".encode() in variables and not _is_dead(entry):
                    ranks = [v[5:] for v in variables if v.startswith(b"RANK=")]
                    found[int(entry.name)] = int(ranks[0]) if ranks else None
        return found

    def holdings(self) -> set[str]:
        """Return the sockets and shared memory that its processes hold, by inode."""
        held: set[str] = set()
        for pid in self.alive():
            with contextlib.suppress(OSError):
                held |= _shared_memory(Path(f"/proc/{pid}"))
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        held.add(str(descriptor.readlink()))
        return {name for name in held if name.startswith(("socket:", "memory:"))}

    def left_over(self, held: set[str], grace: float = 5.0) -> list[str]:
        """Return its processes, and what of `held`, that are still there after `grace` seconds."""
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
        """Return the pid of `rank`; without a launcher, that of the only process."""
        for pid, its_rank in self.alive().items():
            if its_rank == rank:
                return pid
        return self.launcher.pid

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until `condition` holds; else raise TimeoutError with the job's output."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out after {timeout} s; the job's output:\n{self.output}")
            time.sleep(0.01)

    def until_training(self) -> None:
        """Wait until this start of the job has finished an epoch.

        Lines of progress within an epoch name it, too, but do not start with it.
        """
        self.until(lambda: "\nepoch " in self.output.partition("run    ")[2] or self.ended)

    @property
    def trains(self) -> bool:
        """Whether its ranks have started to train, and its launcher is alive."""
        return not self.ended and "\nstep   " in self.output

    @property
    def ended(self) -> bool:
        """Whether the launcher has exited."""
        return self.launcher.poll() is not None

    def wait(self, timeout: float = 120) -> int:
        """Wait for the launcher and return its exit code."""
        try:
            return self.launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"still running after {timeout} s; the job's output:\n{self.output}"
            ) from None


def _is_dead(entry: Path) -> bool:
    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
    return state in "ZX"


def _shared_memory(process: Path) -> set[str]:
    """Return the shared memory that a process has mapped, named or not, by inode."""
    with contextlib.suppress(OSError):
        maps = [line.split() for line in (process / "maps").read_text().splitlines()]
        shared = [m for m in maps if m[5:] and m[5].startswith(("/memfd:", "/dev/shm/"))]
        return {f"memory:{device}:{inode}" for _, _, _, device, inode, *_ in shared}
    return set()


def _file_identity(file: Path) -> str:
    """Return device and inode as in /proc/PID/maps."""
    with contextlib.suppress(FileNotFoundError):
        about = file.stat()
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        return f"memory:{device}:{about.st_ino}"
    return ""
