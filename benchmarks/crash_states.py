"""Start the job on what power losses, kills and full disks leave behind, and compare the outcome.

python -m benchmarks.crash_states --states 5000 --kills 500 --full-disks 500 --seed 1

A job is run with a library that records its file operations. After each of them the power may
fail; a state that the disk may then hold is drawn at random and written out, and the same command
is started on it. It must end like the undisturbed run: exit code 0, the same weights, every epoch
once in metrics.jsonl and TensorBoard, not from before a checkpoint that was safe.

What a power loss may leave, of operations that no fsync made durable:
- of a file's new content all, nothing, a beginning, or any of its pages; what is missing reads as
  zeros or anything, where the file's size is on disk already;
- of a directory's changes (created, renamed, deleted names) all, none, the first ones or any.
Fsync of a file makes its content durable, fsync of a directory its names; neither does the other.

Kills come at one exact operation of a start, and sometimes of the next one too; a write may be cut
in half. A full disk refuses what takes space during some operations, and has room afterwards.
"""

import argparse
import collections
import ctypes
import functools
import hashlib
import importlib
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

import train_ddp
from benchmarks.disk_model import Disk, Operation, read_trace
from benchmarks.run_outcome import EPOCHS, FLAGS, RUN, faults_in, read_outcome
from mnist_dist.run.directory import read_status

# Imported before the fork: a job's imports take longer than the rest of it.
_LATE_IMPORTS = ["mnist_dist.run.tensorboard", "torch.fx.experimental.symbolic_shapes"]
_LATE_IMPORTS += ["tensorboard.backend.event_processing.event_accumulator"]
_LIBRARY = "MNIST_DIST_FILE_OPERATIONS"
_SOURCE = Path(__file__).parent / "file_operations.c"
# Seconds after which a start counts as hung; on an idle machine it takes one.
_TIMEOUT_S = 120.0
# What is run, and which flags of it were run to their end before.
SCENES: dict[str, tuple[list[str], list[str] | None]] = {
    "a checkpoint each epoch": ([], None),
    "every 2 steps": (["--checkpoint-every-steps=2"], None),
    "every 2 epochs": (["--checkpoint-every-epochs=2", "--tensorboard=full"], None),
    "extended from 2 epochs": ([], ["--epochs=2"]),
}


@dataclass(frozen=True)
class Watch:
    """What the preloaded library does in a started job."""

    trace: Path | None = None
    """File to record operations in."""
    kill_at: int = 0
    """Operation, from 1, at which the job is killed; 0 for none."""
    full: range = range(0)
    """Operations during which the disk is full."""


@dataclass
class Job:
    """A started job."""

    pid: int
    directory: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        """Return the file of what the job printed."""
        return self.directory.with_suffix(".log")

    def wait(self) -> int:
        """Return the exit code; negative if a signal ended the job."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - self.started > _TIMEOUT_S:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return 124
            time.sleep(0.005)


def start(directory: Path, flags: list[str], watch: Watch | None = None) -> Job:
    """Fork a process that runs the job in `directory`."""
    job = Job(0, directory)
    job.pid = os.fork()
    if job.pid:
        return job
    output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(directory)
    torch.set_num_threads(1)
    if watch is not None:
        flags_of_trace = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        trace = os.open(watch.trace, flags_of_trace, 0o666) if watch.trace else -1
        library = ctypes.CDLL(None)
        numbers = [watch.kill_at, watch.full.start, watch.full.stop]
        library.watch_files(os.fsencode(directory), trace, *map(ctypes.c_long, numbers))
    return train_ddp.run(flags)


@dataclass
class Scene:
    """A way to run the job, recorded once from start to end."""

    name: str
    directory: Path

    def __post_init__(self) -> None:
        extra, before = SCENES[self.name]
        self.flags = [*FLAGS, *extra, f"--epochs={EPOCHS}"]
        self.directory.mkdir(parents=True)
        self.initial = self.directory / "initial"
        self.initial.mkdir()
        if before is not None:
            self._run(self.initial, [*FLAGS, *extra, *before])
        work = self.directory / "undisturbed"
        shutil.copytree(self.initial, work)
        trace = self.directory / "trace"
        self._run(work, self.flags, Watch(trace))
        self.operations: list[Operation] = list(read_trace(trace, work))
        self.reference, faults = read_outcome(work / RUN)
        if faults:
            raise RuntimeError(f"{self.name}: the undisturbed run is wrong: {faults}")

    @staticmethod
    def _run(directory: Path, flags: list[str], watch: Watch | None = None) -> None:
        job = start(directory, flags, watch)
        if job.wait() != 0:
            raise RuntimeError(job.log.read_text())

    def safe_step(self, count: int) -> int:
        """Return the newest checkpoint that was durable after the first `count` operations."""
        safe, renamed = 0, 0
        for operation in self.operations[:count]:
            if match := re.search(r"step_(\d+)\.pt$", operation.target):
                renamed = int(match[1])
            if operation.kind == "sync" and operation.path.endswith("checkpoints"):
                safe = max(safe, renamed)
        return safe


@dataclass
class Attempt:
    """One disturbance of a job, in a directory of its own."""

    scene: Scene
    directory: Path
    rng: random.Random
    state: str = ""
    """Digest of what the disturbance left."""

    def power_loss(self) -> list[str]:
        """Start the job on a state that a power loss may leave; return what is wrong then."""
        scene = self.scene
        count = self.rng.randint(1, len(scene.operations))
        disk = Disk(scene.initial)
        for operation in scene.operations[:count]:
            disk.apply(operation)
        disk.lose_power(self.directory, self.rng)
        return self._start_again(scene.safe_step(count))

    def kill(self) -> list[str]:
        """Kill the job at an operation, sometimes at several starts, and start it again."""
        shutil.copytree(self.scene.initial, self.directory)
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            watch = Watch(kill_at=self.rng.randint(1, len(self.scene.operations)))
            code = start(self.directory, self.scene.flags, watch).wait()
            if code not in (0, -signal.SIGKILL):
                return [f"exit code {code} of a start to be killed"]
        return self._start_again()

    def full_disk(self) -> list[str]:
        """Let the disk be full for a while; if the job ends for that, start it again."""
        shutil.copytree(self.scene.initial, self.directory)
        first = self.rng.randint(1, len(self.scene.operations))
        full = range(first, first + self.rng.choice([1, 2, 5, 10, 20, 1000]))
        code = start(self.directory, self.scene.flags, Watch(full=full)).wait()
        if code == 0:
            return faults_in(self.directory, 0, self.scene.reference)
        if code not in (1, 2):
            return [f"exit code {code} on a full disk"]
        status = read_status(self.directory / RUN)
        if code == 1 and status == "completed" and SCENES[self.scene.name][1] is None:
            return ["exit code 1, but `completed`"]
        return self._start_again()

    def _start_again(self, safe_step: int = 0) -> list[str]:
        digest = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            digest.update(os.fsencode(path.relative_to(self.directory)))
            digest.update(path.read_bytes() if path.is_file() else b"")
        self.state = digest.hexdigest()
        seen = self.directory.parent / f"seen-{self.state}-{safe_step}"
        try:
            seen.mkdir()
        except FileExistsError:  # the job was started on the same files, with its result counted
            return []
        job = Job(0, self.directory)
        with job.log.open("a") as log:
            log.write("\n=== last start\n")
        code = start(self.directory, self.scene.flags).wait()
        return faults_in(self.directory, code, self.scene.reference, safe_step)


FAULTS: dict[str, Callable[[Attempt], list[str]]] = {
    "power losses": Attempt.power_loss,
    "kills": Attempt.kill,
    "full disks": Attempt.full_disk,
}


Result = tuple[str, str, list[str], str]


def disturb_each(scenes: list[Scene], folder: Path, until: float, names: list[str]) -> list[Result]:
    """Disturb jobs one after the other, those that can be started before `until`.

    Args:
        scenes: what is run.
        folder: for the jobs' files; those of a wrong outcome stay.
        until: by the monotonic clock.
        names: of the disturbances.

    Returns:
        For each its name, the scene's name, what was wrong, and a digest of what the disturbance
        left.
    """
    return [disturb(scenes, folder, name) for name in names if time.monotonic() < until]


def disturb(scenes: list[Scene], folder: Path, name: str) -> Result:
    """Disturb a job; `name` is the seed of all that is random."""
    rng = random.Random(name)
    kind, scene = name.split("/")[1], rng.choice(scenes)
    attempt = Attempt(scene, folder / name.replace("/", "_").replace(" ", "_"), rng)
    faults = FAULTS[kind](attempt)
    if not faults:
        shutil.rmtree(attempt.directory)
        attempt.directory.with_suffix(".log").unlink(missing_ok=True)
    return name, scene.name, faults, attempt.state


def report(results: list[Result], seconds: float) -> list[str]:
    """Return the table's lines, and one line for each kind of wrong outcome."""
    lines = ["| disturbance | job | times | distinct states | wrong |", "|---|---|---|---|---|"]
    groups = collections.defaultdict(list)
    for result in results:
        groups[result[0].split("/")[1], result[1]].append(result)
    for (kind, scene), group in sorted(groups.items()):
        states = len({state for *_, state in group if state})
        wrong = sum(bool(faults) for _, _, faults, _ in group)
        lines.append(f"| {kind} | {scene} | {len(group)} | {states} | {wrong} |")
    lines.append(f"\n{len(results)} jobs were disturbed in {seconds:.0f} s")
    kinds = collections.defaultdict(list)
    for name, _, faults, _ in results:
        if faults:
            kinds["; ".join(re.sub(r"\d+", "N", fault) for fault in faults)].append(name)
    lines += [f"{len(names)} times: {k}: --only '{names[0]}'" for k, names in kinds.items()]
    return lines


def preload() -> NoReturn:
    """Run this program again with the library that records file operations."""
    library = Path(tempfile.mkdtemp()) / "file_operations.so"
    compiler = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*compiler, str(_SOURCE), "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), _LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
    environment["GIT_DIR"] = os.devnull  # git would take longer than an epoch
    module = [sys.executable, "-m", "benchmarks.crash_states", *sys.argv[1:]]
    os.execve(sys.executable, module, {**os.environ, **environment})


def main() -> None:
    """Print the table; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=50, help="states after a power loss")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="jobs at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="start none after that")
    parser.add_argument("--only", metavar="NAME", help="one disturbance, as printed")
    parser.add_argument("--keep", type=Path, help="directory for those that went wrong")
    chosen = parser.parse_args()
    if _LIBRARY not in os.environ:
        preload()
    shutil.rmtree(Path(os.environ[_LIBRARY]).parent)  # it is loaded
    del os.environ["LD_PRELOAD"]
    counts = zip(FAULTS, (chosen.states, chosen.kills, chosen.full_disks), strict=True)
    names = [f"{chosen.seed}/{kind}/{n}" for kind, count in counts for n in range(count)]
    started = time.monotonic()
    for module in _LATE_IMPORTS:
        importlib.import_module(module)
    # No TemporaryDirectory: every forked job would delete it when it ends.
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    kept = chosen.keep or folder
    kept.mkdir(parents=True, exist_ok=True)
    try:
        scenes = [Scene(name, folder / f"scene-{n}") for n, name in enumerate(SCENES)]
        names = [chosen.only] if chosen.only else names
        random.Random(chosen.seed).shuffle(names)
        until = time.monotonic() + 60 * chosen.minutes
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of events that were replaced
        with multiprocessing.get_context("fork").Pool(chosen.jobs) as pool:
            action = functools.partial(disturb_each, scenes, kept, until)
            shares = [names[number :: chosen.jobs] for number in range(chosen.jobs)]
            results = [result for share in pool.map(action, shares, 1) for result in share]
    finally:
        shutil.rmtree(folder)
    print("\n".join(report(results, time.monotonic() - started)))
    sys.exit(any(faults for _, _, faults, _ in results) or not results)


if __name__ == "__main__":
    main()
