"""Write, verify, prune and find checkpoints. Independent of training.

A checkpoint is `NAME.pt`, written by `torch.save`, and its sidecar `NAME.json` with the SHA-256 of
the first. Both appear by renaming a finished, flushed file, sidecar first: whenever the writer
dies, every checkpoint in the directory is complete and its sidecar knows it; the sidecar of one
that replaces another knows both.

Files are written by a thread, in order: training waits for the serialization only.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from mnist_dist.errors import UserError
from mnist_dist.files import make_directory, read_regular, sweep_temporary, write_atomically

# Bytes; a file of this project's model has 0.6 MB with its optimizer, a sidecar 500 bytes.
_LARGEST_FILE = 1 << 36
_LARGEST_SIDECAR = 1 << 20
# Errors that show that a file is missing or none at all. Others, such as a permission or a network
# disk that is away, are no proof of damage.
_NO_FILE = {errno.ENOENT, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EFBIG}
_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")


class UnreadableError(UserError):
    """A file cannot be read now, and may be sound."""


class CheckpointStore:
    """The checkpoints of one run. Every rank may name it; only rank 0 opens, reads and writes."""

    def __init__(
        self,
        directory: Path,
        keep: int,
        prepare: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Name the directory, and how many of the newest checkpoints to keep with the best.

        `prepare` is called before each save, and `check` before each file gets its name and before
        old ones are deleted, from the writing thread. Both may raise OSError to prevent that.
        """
        self.directory = directory
        self.keep = keep
        self._prepare, self._check = prepare, check
        self._unreadable: set[Path] = set()
        """Newer than the state of the run, so that they do not count as its checkpoints."""
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: list[Future[None]] = []
        # Content and sidecar of the files that the disk did not take yet, "best" before "step_N".
        # Only the thread uses it.
        self._unwritten: dict[str, tuple[bytes, dict[str, Any]]] = {}

    def open(self) -> None:
        """Make the directory; sweep temporary files and sidecars that a killed writer left."""
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            fault = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, fault, str(self.directory))
        make_directory(self.directory)
        sweep_temporary(self.directory)
        for sidecar in self.directory.glob("*.json"):
            if not os.path.lexists(sidecar.with_suffix(".pt")):
                with contextlib.suppress(OSError):
                    sidecar.unlink()

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
            state: serialized before this returns.
            step: optimizer steps since the start of the run.
            facts: for the sidecar.
            best: write `best.pt`.
            newest: write `step_<step>.pt`.
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
        return _os_errors(ended)

    def flush(self) -> list[OSError]:
        """Wait until everything that was saved is on disk; what failed before is tried again.

        Returns:
            Why earlier writes failed, since the last call of this or `save`.

        Raises:
            OSError: something could not be written.
        """
        last_try = self._writer.submit(self._write_files, {}, None)
        pending, self._pending = self._pending, []
        failures = _os_errors(pending)
        last_try.result()
        return failures

    def _write_files(
        self, files: dict[str, tuple[bytes, dict[str, Any]]], afterwards: Callable[[], None] | None
    ) -> None:
        """Write these files, after those that could not be written before."""
        waiting = self._unwritten
        if any(name != "best" for name in files):
            waiting = {name: waiting[name] for name in waiting if name == "best"}
        waiting = waiting | files
        self._unwritten = {name: waiting[name] for name in sorted(waiting)}
        self._prepare()
        # The best first: no checkpoint may know of a best epoch that is not in best.pt.
        for name, (content, sidecar) in list(self._unwritten.items()):
            self._write(name, content, sidecar)
            del self._unwritten[name]
        if afterwards is not None:
            afterwards()

    def load_latest(
        self, find_fault: Callable[[Any], str | None] = lambda state: None, set_aside: bool = True
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest sound checkpoint (None in a new run) and why newer ones were passed over.

        Args:
            find_fault: given what a file holds, describes why it cannot be used, None if it can.
            set_aside: rename newer, damaged files to `<name>.damaged`, so that they are neither
                tried nor counted again. Those that cannot be read now are left unchanged.

        Raises:
            UserError: there are checkpoints, and none can be used; they are left unchanged, so that
                the next start is no silent fresh one.
        """
        passed_over: dict[Path, UserError] = {}
        with _naming_file():
            paths = self._steps()
        for path in paths:
            try:
                state = load_checkpoint(path)
                step = state.get("step") if isinstance(state, dict) else None
                fault = find_fault(state) or (step != _step(path) and f"it is of step {step}")
                if fault:
                    raise UserError(f"{path}: not what its name and sidecar claim: {fault}")
            except UserError as error:
                passed_over[path] = error
                continue
            for newer, reason in passed_over.items():
                if isinstance(reason, UnreadableError):
                    self._unreadable.add(newer)
                elif set_aside:
                    _set_aside(newer)
            return state, list(map(str, passed_over.values()))
        if passed_over:
            raise UserError(
                "--run-dir: every step_*.pt is damaged or unreadable "
                f"({'; '.join(map(str, passed_over.values()))}); "
                "restore a copy of one, or use another --run-dir to start over"
            )
        return None, []

    def load_best(self) -> dict[str, Any]:
        """The state in `best.pt`.

        Raises:
            UserError: it is missing or damaged.
        """
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
        """The step of the newest checkpoint on disk; None if none can be found."""
        with contextlib.suppress(OSError):
            return next(map(_step, self._steps()), None)
        return None

    def _steps(self) -> list[Path]:
        """The checkpoints by step, the newest first, without those that were passed over."""
        if not self.directory.is_dir():
            return []
        found = {p for p in self.directory.iterdir() if _STEP_FILE.fullmatch(p.name)}
        return sorted(found - self._unreadable, key=_step, reverse=True)

    def _write(self, name: str, content: bytes, facts: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(content).hexdigest()
        path = self.directory / f"{name}.pt"
        sidecar = {**facts, "bytes": len(content), "sha256": digest, "replaces": _digest_of(path)}
        self.directory.mkdir(exist_ok=True)  # it alone may have been deleted
        text = json.dumps(sidecar, indent=2).encode()
        write_atomically(path.with_suffix(".json"), text, lambda _: self._check())
        try:
            write_atomically(path, content, lambda _: self._check())
        except OSError:
            self._check()
            if not path.exists():  # the sidecar of nothing
                path.with_suffix(".json").unlink(missing_ok=True)
            raise
        self._unreadable.discard(path)
        self._check()
        for old in self._steps()[self.keep :]:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)


def _os_errors(writes: Iterable[Future[None]]) -> list[OSError]:
    """Wait for the end of all writes; return the OSErrors that they ended with."""
    errors = []
    for write in writes:
        try:
            write.result()
        except OSError as error:
            errors.append(error)
    return errors


def _digest_of(path: Path) -> str | None:
    """SHA-256 of the sound checkpoint at `path` that is about to be replaced; None without one."""
    try:
        return hashlib.sha256(_sound_content(path)).hexdigest()
    except UserError:
        return None


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _set_aside(path: Path) -> None:
    """Rename a checkpoint and its sidecar, whatever they are: a save may need their names."""
    for file in (path, path.with_suffix(".json")):
        with contextlib.suppress(OSError):
            file.replace(file.with_name(file.name + ".damaged"))


def _sound_content(path: Path, needs_sidecar: bool = True) -> bytes:
    """The bytes of a checkpoint, verified by its sidecar. Raises UserError if they differ."""
    sidecar_path = path.with_suffix(".json")
    if path.suffix == ".damaged":
        raise UserError(f"{path}: was set aside because it is damaged; use another checkpoint")
    with _naming_file():
        if not needs_sidecar and not os.path.lexists(sidecar_path):
            return read_regular(path, _LARGEST_FILE)
        path.stat()  # a missing checkpoint is named, and not its missing sidecar
        text = read_regular(sidecar_path, _LARGEST_SIDECAR)
    try:
        sidecar = json.loads(text)
        # A writer that died between the two files of a replacement left the old one, still sound.
        expected, size = (sidecar["sha256"], sidecar.get("replaces")), sidecar.get("bytes")
        if not isinstance(expected[0], str):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{sidecar_path}: not a checkpoint's sidecar") from error
    is_size_known = expected[1] is None and type(size) is int
    with _naming_file():
        content = read_regular(path, min(size, _LARGEST_FILE) if is_size_known else _LARGEST_FILE)
    if hashlib.sha256(content).hexdigest() not in expected:
        raise UserError(f"{path}: its content is not what was saved (SHA-256 differs)")
    return content


@contextlib.contextmanager
def _naming_file() -> Iterator[None]:
    """Raise an OSError in the block as a UserError, or UnreadableError, that names the file."""
    try:
        yield
    except OSError as error:
        kind = UserError if error.errno in _NO_FILE else UnreadableError
        raise kind(f"{error.filename}: {error.strerror}") from error


def load_checkpoint(path: Path, needs_sidecar: bool = True) -> Any:
    """Read a checkpoint onto the CPU, after comparing it with its sidecar; nothing in it is run.

    Without `needs_sidecar`, there may be none, since best.pt is often copied alone; one that is
    there must still match.

    Returns:
        What was saved: a dict with TrainState's keys, if this project wrote it.

    Raises:
        UserError: it is missing or damaged; the text gives the reason.
    """
    try:
        content = _sound_content(path, needs_sidecar)
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory") from error
    try:
        with warnings.catch_warnings():  # about files that other programs wrote
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is no checkpoint
        raise UserError(
            f"{path}: not a checkpoint, which has tensors and plain values only; nothing in it was "
            "executed"
        ) from error
