"""A state on disk: atomic, verified, pruned, found again. Knows nothing of training.

A checkpoint is `NAME.pt`, written by `torch.save`, and its sidecar `NAME.json` with the SHA-256 of
the first. Both appear by renaming a finished, flushed file, sidecar first: whenever the writer
dies, every checkpoint in the directory is complete and its sidecar knows it; the sidecar of one
that replaces another knows both.

Files are written by a thread, in order: training waits for the serialization only.
"""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from mnist_dist.atomic import TEMPORARY_SUFFIX, make_directory, write_atomically
from mnist_dist.errors import UserError

_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")


class CheckpointStore:
    """The checkpoints of one run. Every rank may name it; only rank 0 opens, reads and writes."""

    def __init__(
        self, directory: Path, keep: int, sync_metrics: Callable[[], None] = lambda: None
    ) -> None:
        """Name the directory, and how many of the newest checkpoints to keep with the best.

        Args:
            directory: created by `open`.
            keep: number of the newest checkpoints to keep.
            sync_metrics: called before each write, from the writing thread: whatever a checkpoint
                makes a resume skip must be on disk before it. May raise OSError.
        """
        self.directory = directory
        self.keep = keep
        self._sync_metrics = sync_metrics
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: list[Future[None]] = []
        # Content and sidecar of the files that the disk did not take yet, "best" before "step_N".
        # Only the thread uses it.
        self._unwritten: dict[str, tuple[bytes, dict[str, Any]]] = {}

    def open(self) -> None:
        """Make the directory; sweep temporary files and sidecars that a killed writer left."""
        make_directory(self.directory)
        for stray in self.directory.glob(f".*{TEMPORARY_SUFFIX}"):
            stray.unlink(missing_ok=True)
        for sidecar in self.directory.glob("*.json"):
            if not sidecar.with_suffix(".pt").exists():
                sidecar.unlink(missing_ok=True)

    def save(
        self,
        state: dict[str, Any],
        step: int,
        facts: Mapping[str, Any],
        best: bool = False,
        newest: bool = True,
        afterwards: Callable[[], None] | None = None,
    ) -> list[OSError]:
        """Start to write a state: as `best.pt` in place of the one before, as `step_<step>.pt`.

        Each gets its sidecar, with the `facts`; then what is too old is deleted. What cannot be
        written is tried again, with the next save and by `flush`, unless the next one replaces it.

        Args:
            state: to be serialized before this returns.
            step: optimizer steps since the start of the run.
            facts: for the sidecar.
            best: whether to write `best.pt`.
            newest: whether to write `step_<step>.pt`.
            afterwards: called from the writing thread once both are on disk; may raise OSError.

        Returns:
            Why earlier writes failed, since the last call.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = (buffer.getvalue(), {"step": step, **facts})
        names = ["best"] * best + [f"step_{step:08d}"] * newest
        files = dict.fromkeys(names, content)
        self._pending.append(self._writer.submit(self._write_files, files, afterwards))
        if len(self._pending) > 6:  # a disk slower than training must not pile up states
            wait(self._pending[:1])
        ended = [written for written in self._pending if written.done()]
        self._pending = [written for written in self._pending if written not in ended]
        return [error for written in ended if (error := _os_error(written)) is not None]

    def flush(self) -> None:
        """Return when everything that was saved is on disk; what failed before is tried again.

        Raises:
            OSError: something could not be written.
        """
        last_try = self._writer.submit(self._write_files, {}, None)
        pending, self._pending = self._pending, []
        for written in pending:
            _os_error(written)
        last_try.result()

    def _write_files(
        self, files: dict[str, tuple[bytes, dict[str, Any]]], afterwards: Callable[[], None] | None
    ) -> None:
        """Write these files, after those that could not be written before."""
        waiting = self._unwritten
        if any(name != "best" for name in files):
            waiting = {name: waiting[name] for name in waiting if name == "best"}
        waiting = waiting | files
        self._unwritten = {name: waiting[name] for name in sorted(waiting)}
        self._sync_metrics()
        # The best first: no checkpoint may know of a best epoch that is not in best.pt.
        for name, (content, sidecar) in list(self._unwritten.items()):
            self._write(name, content, sidecar)
            del self._unwritten[name]
        if afterwards is not None:
            afterwards()

    def load_latest(self, set_aside: bool = True) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest sound checkpoint (None in a new run) and what was found damaged on the way.

        Args:
            set_aside: rename newer, damaged files to `<name>.damaged`, so that they are neither
                tried nor counted again.

        Raises:
            UserError: there are checkpoints, and all are damaged; they stay as they are, so that
                the next start is no silent fresh one.
        """
        damaged: dict[Path, str] = {}
        for path in self._steps():
            try:
                state = load_checkpoint(path)
            except UserError as error:
                damaged[path] = str(error)
                continue
            for newer in damaged if set_aside else ():
                newer.replace(newer.with_name(newer.name + ".damaged"))
            return state, list(damaged.values())
        if damaged:
            raise UserError(
                f"--run-dir: every checkpoint is damaged ({'; '.join(damaged.values())}); "
                "give another --run-dir to start afresh"
            )
        return None, []

    def load_best(self) -> dict[str, Any]:
        """The state in `best.pt`.

        Raises:
            UserError: it is missing or damaged.
        """
        self.flush()
        best: dict[str, Any] = load_checkpoint(self.directory / "best.pt")
        return best

    def has_best(self, epoch: int) -> bool:
        """Whether `best.pt` is there, sound, and of that epoch or, after a kill, a later one."""
        try:
            return bool(self.load_best()["epoch"] >= epoch)
        except UserError:
            return False

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint on disk; None if there is none."""
        steps = self._steps()
        return int(steps[0].stem.removeprefix("step_")) if steps else None

    def _steps(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        found = {p: _STEP_FILE.fullmatch(p.name) for p in self.directory.iterdir()}
        return sorted((p for p, m in found.items() if m), key=lambda p: p.name, reverse=True)

    def _write(self, name: str, content: bytes, facts: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(content).hexdigest()
        path = self.directory / f"{name}.pt"
        sidecar = {**facts, "bytes": len(content), "sha256": digest, "replaces": _digest_of(path)}
        self.directory.mkdir(parents=True, exist_ok=True)  # somebody may have deleted the run
        write_atomically(path.with_suffix(".json"), json.dumps(sidecar, indent=2).encode())
        try:
            write_atomically(path, content)
        except OSError:
            if not path.exists():  # the sidecar of nothing
                path.with_suffix(".json").unlink(missing_ok=True)
            raise
        for old in self._steps()[self.keep :]:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)


def _os_error(ended: Future[None]) -> OSError | None:
    """Wait for the end of a write; return the OSError it ended with, if any."""
    try:
        ended.result()
    except OSError as error:
        return error
    return None


def _digest_of(path: Path) -> str | None:
    """SHA-256 of the sound checkpoint at `path` that is about to be replaced; None without one."""
    try:
        return hashlib.sha256(_sound_content(path)).hexdigest()
    except UserError:
        return None


def _sound_content(path: Path, needs_sidecar: bool = True) -> bytes:
    """The bytes of a checkpoint, once they are what its sidecar says. Raises UserError if not."""
    try:
        content = path.read_bytes()
        if not needs_sidecar and not path.with_suffix(".json").exists():
            return content
        sidecar = json.loads(path.with_suffix(".json").read_text())
        # A writer that died between the two files of a replacement left the old one, still sound.
        expected = (sidecar["sha256"], sidecar.get("replaces"))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.with_suffix('.json')}: not a checkpoint's sidecar") from error
    if hashlib.sha256(content).hexdigest() not in expected:
        raise UserError(f"{path}: its content is not what was saved (SHA-256 differs)")
    return content


def load_checkpoint(path: Path, needs_sidecar: bool = True) -> Any:
    """Read a checkpoint onto the CPU, after comparing it with its sidecar; nothing in it is run.

    Args:
        path: the `.pt` file.
        needs_sidecar: False takes a file without one as it is: people copy best.pt around. One
            that is there must still match.

    Returns:
        What was saved: a dict with TrainState's keys, if this project wrote it.

    Raises:
        UserError: it is missing or damaged; the text says how.
    """
    content = _sound_content(path, needs_sidecar)
    try:
        with warnings.catch_warnings():  # about files that other programs wrote
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes torch raise
        raise UserError(
            f"{path}: not a checkpoint (it would hold tensors and plain values only; nothing in "
            "it was run)"
        ) from error
