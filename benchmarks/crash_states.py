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
import hashlib
import importlib
import json
import logging
import math
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
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

import train_ddp
from benchmarks.disk_model import Disk, Operation, read_trace
from mnist_dist.run.directory import read_status

# Imported before the fork: a job's imports take longer than the rest of it.
_LATE_IMPORTS = ["mnist_dist.run.tensorboard", "torch.fx.experimental.symbolic_shapes"]
_LATE_IMPORTS += ["tensorboard.backend.event_processing.event_accumulator"]
_LIBRARY = "MNIST_DIST_FILE_OPERATIONS"
_SOURCE = Path(__file__).parent / "file_operations.c"
_EPOCHS, _STEPS_PER_EPOCH = 5, 3
_FLAGS = ["--data=bundled", "--train-samples=192", "--keep-checkpoints=2", "--run-dir=runs/x"]
_FLAGS += ["--lr=0.5", "--momentum=0.9", "--tensorboard=minimal"]  # the best epoch is not the last
_LAST = _EPOCHS * _STEPS_PER_EPOCH
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


@dataclass(frozen=True)
class Outcome:
    """What is compared of a completed run."""

    records: Mapping[tuple[int, bool], Mapping[str, Any]]
    """Of metrics.jsonl by epoch and whether it is the test's, without what differs in time."""
    weights: Mapping[str, str]
    """Digest of the model by checkpoint."""


def read_outcome(run: Path) -> tuple[Outcome, list[str]]:
    """Return what a completed run left, and what contradicts itself in it."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    records = {(r["epoch"], "test/loss" in r): _without_time(r) for r in found}
    bad = ["an epoch twice"] * (len(records) < len(found))
    bad += ["epochs in disorder"] * (list(records) != sorted(records))
    bad += _tensorboard_differs(run, found)
    status = json.loads((run / "status.json").read_text())
    if (status["status"], status["step"], status["saved_step"]) != ("completed", _LAST, _LAST):
        bad.append(f"status.json: {status['status']}, saved_step {status['saved_step']}")
    names = ("best.pt", f"step_{_LAST:08d}.pt")
    return Outcome(records, {n: _weights(run / "checkpoints" / n) for n in names}), bad


def _without_time(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != "time" and not k.startswith("perf/")}


def _weights(path: Path) -> str:
    model = torch.load(path, weights_only=True)["model"]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.values())).hexdigest()


def _tensorboard_differs(run: Path, records: list[dict[str, Any]]) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown = [(t, p.step, p.value) for t in events.Tags()["scalars"] for p in events.Scalars(t)]
    expected = [
        (tag, record["step"], value)
        for record in records
        for tag, value in record.items()
        if (tag == "lr" or "/" in tag) and not isinstance(value, list)
    ]
    pairs = zip(sorted(shown), sorted(expected), strict=False)
    same = all(
        a[:2] == b[:2] and math.isclose(a[2], b[2], rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs
    )
    images = [(tag, i.step) for tag in events.Tags()["images"] for i in events.Images(tag)]
    twice = ["TensorBoard: an image twice"] * (len(images) > len(set(images)))
    if same and len(shown) == len(expected):
        return twice
    steps = sorted(step for tag, step, _ in shown if tag == "val/loss")
    return [*twice, f"TensorBoard: other points than metrics.jsonl, val/loss at {steps}"]


def faults_in(directory: Path, code: int, reference: Outcome, safe_step: int = 0) -> list[str]:
    """Return what is wrong with a job that was to complete; nothing if all is as it should be."""
    log = directory.with_suffix(".log").read_text(errors="replace")
    last = log.rpartition("\n=== last start\n")[2]
    if "Traceback" in log:
        return [f"traceback: {log.strip().splitlines()[-1]}"]
    if code != 0:
        return [f"exit code {code}: {last.strip().splitlines()[-1] if last.strip() else ''}"]
    try:
        outcome, faults = read_outcome(directory / "runs" / "x")
    except (OSError, ValueError, KeyError) as error:
        return [f"{type(error).__name__}: {error}"]
    missing = reference.records.keys() - outcome.records.keys()
    faults += [f"missing in metrics.jsonl: {sorted(missing)}"] * bool(missing)
    faults += ["other metrics"] * (not missing and outcome.records != reference.records)
    names = [n for n, digest in reference.weights.items() if outcome.weights[n] != digest]
    faults += [f"other weights in {name}" for name in names]
    found = re.search(r"resume at step (\d+)", last)
    resumed = _LAST if "already complete" in last else int(found[1]) if found else 0
    return faults + [f"from step {resumed}, but {safe_step} was safe"] * (resumed < safe_step)


@dataclass
class Scene:
    """A way to run the job, recorded once from start to end."""

    name: str
    directory: Path

    def __post_init__(self) -> None:
        extra, before = SCENES[self.name]
        self.flags = [*_FLAGS, *extra, f"--epochs={_EPOCHS}"]
        self.directory.mkdir(parents=True)
        self.initial = self.directory / "initial"
        self.initial.mkdir()
        if before is not None:
            self._run(self.initial, [*_FLAGS, *extra, *before])
        work = self.directory / "undisturbed"
        shutil.copytree(self.initial, work)
        trace = self.directory / "trace"
        self._run(work, self.flags, Watch(trace))
        self.operations: list[Operation] = list(read_trace(trace, work))
        self.reference, faults = read_outcome(work / "runs" / "x")
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
        status = read_status(self.directory / "runs" / "x")
        if code == 1 and status == "completed" and SCENES[self.scene.name][1] is None:
            return ["exit code 1, but `completed`"]
        return self._start_again()

    def _start_again(self, safe_step: int = 0) -> list[str]:
        digest = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            digest.update(os.fsencode(path.relative_to(self.directory)))
            digest.update(path.read_bytes() if path.is_file() else b"")
        self.state = digest.hexdigest()
        job = Job(0, self.directory)
        with job.log.open("a") as log:
            log.write("\n=== last start\n")
        code = start(self.directory, self.scene.flags).wait()
        return faults_in(self.directory, code, self.scene.reference, safe_step)


FAULTS = {
    "power losses": Attempt.power_loss,
    "kills": Attempt.kill,
    "full disks": Attempt.full_disk,
}


def disturb(scenes: list[Scene], folder: Path, name: str) -> tuple[str, str, list[str], str]:
    """Disturb a job; `name` is the seed of all that is random. Returns the row of a result."""
    rng = random.Random(name)
    kind, scene = name.split("/")[1], rng.choice(scenes)
    attempt = Attempt(scene, folder / name.replace("/", "_").replace(" ", "_"), rng)
    faults = FAULTS[kind](attempt)
    if not faults:
        shutil.rmtree(attempt.directory)
        attempt.directory.with_suffix(".log").unlink()
    return name, scene.name, faults, attempt.state


Result = tuple[str, str, list[str], str]


def disturb_all(
    scenes: list[Scene], folder: Path, names: list[str], jobs: int, until: float
) -> Iterator[Result]:
    """Yield the results of disturbances started before `until`, `jobs` at a time."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of events that a restart replaced
    receivers = []
    for number in range(jobs):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        if os.fork() == 0:
            _disturb_each(scenes, folder, names[number::jobs], sender, until)
        sender.close()
        receivers.append(receiver)
    while receivers:
        for receiver in list(receivers):
            try:
                if receiver.poll(0.05):
                    yield receiver.recv()
            except EOFError:
                receivers.remove(receiver)


def _disturb_each(
    scenes: list[Scene],
    folder: Path,
    names: list[str],
    sender: "Connection[Result, Any]",
    until: float,
) -> NoReturn:
    try:
        for name in names:
            if time.monotonic() > until:
                break
            sender.send(disturb(scenes, folder, name))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def report(results: list[Result], seconds: float) -> list[str]:
    """Return the table's lines, and one line for each kind of wrong outcome."""
    lines = ["| disturbed by | job | times | distinct states | wrong |", "|---|---|---|---|---|"]
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
    try:
        scenes = [Scene(name, folder / f"scene-{n}") for n, name in enumerate(SCENES)]
        names = [chosen.only] if chosen.only else names
        random.Random(chosen.seed).shuffle(names)
        until = time.monotonic() + 60 * chosen.minutes
        results = list(disturb_all(scenes, chosen.keep or folder, names, chosen.jobs, until))
    finally:
        shutil.rmtree(folder)
    print("\n".join(report(results, time.monotonic() - started)))
    sys.exit(any(faults for _, _, faults, _ in results) or not results)


if __name__ == "__main__":
    main()
