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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mnist_dist.atomic import TEMPORARY_SUFFIX, write_atomically
from mnist_dist.errors import UserError

_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")


class CheckpointStore:
    """The checkpoints of one run. Every rank may name it; only rank 0 opens, reads and writes."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Name the directory, and how many of the newest checkpoints to keep with the best."""
        self.directory = directory
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: list[Future[None]] = []

    def open(self) -> None:
        """Make the directory; sweep temporary files and sidecars that a killed writer left."""
        self.directory.mkdir(exist_ok=True)
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
    ) -> None:
        """Begin to write a state: as `best.pt` in place of the one before, as `step_<step>.pt`.

        Each gets its sidecar, with the `facts`; then what is too old is deleted.

        Raises:
            OSError: an earlier write failed, or the disk cannot take this one; older files are
                intact.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        if best:
            self.afterwards(partial(self._write, "best", content, {"step": step, **facts}))
        if newest:
            name = f"step_{step:08d}"
            self.afterwards(partial(self._write, name, content, {"step": step, **facts}))

    def afterwards(self, action: Callable[[], None]) -> None:
        """Let the writer call `action`, which may raise OSError, after what it has to write now.

        Raises:
            OSError: an earlier action or write failed.
        """
        self._pending.append(self._writer.submit(action))
        if len(self._pending) > 6:  # a disk slower than training must not pile up states
            wait(self._pending[:1])
        ended = [written for written in self._pending if written.done()]
        self._pending = [written for written in self._pending if written not in ended]
        for written in ended:
            written.result()

    def flush(self) -> None:
        """Return when everything that was saved is on disk, or could not be.

        Raises:
            OSError: something could not be written.
        """
        pending, self._pending = self._pending, []
        wait(pending)
        for written in pending:
            written.result()

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

    def has_best(self) -> bool:
        """Whether `best.pt` is there and sound."""
        try:
            self.load_best()
        except UserError:
            return False
        return True

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
