"""A state on disk: atomic, verified, pruned, found again. Knows nothing of training.

A checkpoint is `NAME.pt`, written by `torch.save`, and its sidecar `NAME.json` with the SHA-256 of
the first. Both appear by renaming a finished, flushed file, sidecar first: whenever the writer
dies, every `step_*.pt` in the directory is complete and has its sidecar.
"""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from mnist_dist.atomic import TEMPORARY_SUFFIX, write_atomically
from mnist_dist.errors import UserError

_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")


class CheckpointStore:
    """The checkpoints of one run. Every rank may name it; only rank 0 opens, reads and writes."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Name the directory, and how many of the newest checkpoints to keep beside the best."""
        self.directory = directory
        self.keep = keep

    def open(self) -> None:
        """Make the directory; sweep temporary files and sidecars that a killed writer left."""
        self.directory.mkdir(exist_ok=True)
        for stray in self.directory.glob(f".*{TEMPORARY_SUFFIX}"):
            stray.unlink(missing_ok=True)
        for sidecar in self.directory.glob("*.json"):
            if not sidecar.with_suffix(".pt").exists():
                sidecar.unlink(missing_ok=True)

    def save(self, state: dict[str, Any], step: int, facts: dict[str, Any]) -> Path:
        """Write `step_<step>.pt` and its sidecar with `facts`, then delete what is too old."""
        path = self._write(f"step_{step:08d}", state, {"step": step, **facts})
        for old in self._steps()[self.keep :]:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)
        return path

    def save_best(self, state: dict[str, Any], step: int, facts: dict[str, Any]) -> Path:
        """Write `best.pt` and its sidecar in place of the ones before."""
        return self._write("best", state, {"step": step, **facts})

    def load_latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest sound checkpoint (None in a new run) and what was found damaged on the way.

        Damaged files that are newer are renamed to `<name>.damaged`: not tried or counted again.

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
            for newer in damaged:
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
        return load_checkpoint(self.directory / "best.pt")

    def _steps(self) -> list[Path]:
        found = {p: _STEP_FILE.fullmatch(p.name) for p in self.directory.iterdir()}
        return sorted((p for p, m in found.items() if m), key=lambda p: p.name, reverse=True)

    def _write(self, name: str, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        sidecar = {**facts, "bytes": len(content), "sha256": digest}
        path = self.directory / f"{name}.pt"
        write_atomically(path.with_suffix(".json"), json.dumps(sidecar, indent=2).encode())
        write_atomically(path, content)
        return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after comparing it with its sidecar.

    Raises:
        UserError: it is missing or damaged; the text says how.
    """
    try:
        content = path.read_bytes()
        expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.with_suffix('.json')}: not a checkpoint's sidecar") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path}: its content is not what was saved (SHA-256 differs)")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    except Exception as error:  # whatever a file that is no checkpoint makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a checkpoint ({reason})") from error
    return state
