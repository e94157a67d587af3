"""The directory of one run: found or created, locked, and everything that is written into it."""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mnist_dist.distributed.failures import PeerFailedError, PeerLostError
from mnist_dist.errors import JobError, ReportedError, UserError
from mnist_dist.files import (
    make_directory,
    overwrite,
    read_json_object,
    sweep_temporary,
    sync_directory,
    write_atomically,
)
from mnist_dist.lock import FileLock, LockHeldError, LockLostError
from mnist_dist.run.checkpoint import CheckpointStore
from mnist_dist.run.environment import environment_facts
from mnist_dist.run.metrics import MetricsWriter
from mnist_dist.run.state import TrainState

Status = Literal["running", "completed", "preempted", "failed"]
_STAMP = "%Y%m%d-%H%M%S"
_RUN_NAME = re.compile(r"(?P<stamp>\d{8}-\d{6})_(?P<id>.+)", re.DOTALL)
_LARGEST_JSON = 1 << 20  # bytes
_LOCK_WAIT_S = 10.0


class RunDirectory:
    """Everything a run leaves behind. Every rank may name it; only rank 0 opens it and writes."""

    def __init__(self, path: Path, keep_checkpoints: int, warn: Callable[[str], None]) -> None:
        """Name the directory; nothing is touched before `open`."""
        self.path = path
        self.writer = MetricsWriter(path, warn)
        self.state: TrainState | None = None
        """The state of the run, on every rank once it has started here."""
        self._warn = warn
        self._lock = FileLock(path / ".lock")
        self.checkpoints = CheckpointStore(
            path / "checkpoints", keep_checkpoints, self._before_checkpoints, self._lock.check
        )

    def __str__(self) -> str:
        """Return the path as a user would type it: relative if below the current directory."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def open(self) -> None:
        """Create the directory or take over that of an earlier start, and lock it.

        Temporary files left by a killed process are deleted.

        Raises:
            UserError: it cannot be written, is not a run's, or another job has it open.
        """
        try:
            make_directory(self.path)
            is_run = self.status is not None or (self.path / "checkpoints").exists()
            if (self.path / "config.json").exists() and not is_run:
                raise UserError(
                    f"--run-dir {self.path}: holds a config.json but no status.json that can be "
                    "read, so it is not a run directory; use another"
                )
            self._lock.acquire(_LOCK_WAIT_S, self._warn)
            self.checkpoints.open()
            sweep_temporary(self.path)
            if not sync_directory(self.path):
                self._warn(
                    f"{self}: its file system cannot flush directories; after a power loss the "
                    "newest checkpoint may be missing, and the one before it continues the run"
                )
        except LockHeldError as error:
            raise UserError(
                f"--run-dir {self.path}: another job is writing there ({error}); wait until it "
                "ends, stop it, or use another directory"
            ) from error
        except OSError as error:
            reason = "is a file" if self.path.is_file() else _reason(error)
            raise UserError(f"--run-dir {self.path}: {reason}; use a writable directory") from error
        if self._lock.missing is not None:
            self._warn(
                f"{self}: its file system has no locks ({self._lock.missing}); start no second job "
                "there while this one runs: each would overwrite the other's files"
            )

    def find_fault(self) -> str | None:
        """Describe how the directory that this rank opened was moved, deleted or replaced, if so.

        Another job may be writing there then.
        """
        try:
            with self._failing():
                self._lock.check()
        except JobError as error:
            return str(error)
        return None

    @property
    def status(self) -> str | None:
        """The status that the run last wrote; None if there is none to read."""
        return read_status(self.path)

    @property
    def data(self) -> str | None:
        """The data that the run last used, as a value of --data; None if config.json is lost."""
        data = read_json_object(self.path / "config.json", _LARGEST_JSON).get("data")
        return data if isinstance(data, str) else None

    @property
    def had_checkpoint(self) -> bool:
        """Whether the run has ever saved one, by its status or, if that is lost, its metrics."""
        status = read_json_object(self.path / "status.json", _LARGEST_JSON)
        if status:
            ended_saved = status.get("status") in ("completed", "preempted")
            return ended_saved or status.get("saved_step") is not None
        metrics = self.path / "metrics.jsonl"
        return metrics.is_file() and metrics.stat().st_size > 0

    def start(
        self,
        state: TrainState,
        config: Mapping[str, Any],
        world: Mapping[str, Any],
        hparams: Mapping[str, Any],
    ) -> None:
        """Record that a run starts or continues, and open its metrics.

        Args:
            state: read again at every later write.
            config: every setting.
            world: describes the processes.
            hparams: what TensorBoard compares runs by.

        Raises:
            JobError: the directory cannot be written.
        """
        environment = environment_facts() | dict(world)
        with self._failing():
            self.state = state  # from here on, `end` records a failure
            # Status first: it marks the directory as a run's, whenever this process dies.
            self._write_status("running", state.epoch, state.step, "training")
            self._write_json("config.json", config)
            self._write_json("environment.json", environment)
            texts = {"config": config, "environment": environment}
            self.writer.open(state.epoch, state.step, texts, hparams)

    def save_checkpoint(
        self, saved: dict[str, Any], metrics: Mapping[str, float], best: bool, newest: bool
    ) -> None:
        """Start to write the checkpoints asked for. A failure is a warning; `flush` raises it."""
        assert self.state is not None
        epoch, step = self.state.epoch, self.state.step
        write_status = partial(self._write_status, "running", epoch, step, "training")
        failures = self.checkpoints.save(
            saved, step, metrics, best, newest, write_status if newest else None
        )
        for error in failures:
            self._warn(f"a checkpoint could not be written ({_reason(error)}); training continues")

    def flush(self) -> None:
        """Wait until every checkpoint is on disk; warn of failures that no longer matter.

        Raises:
            JobError: one, or the metrics of its epochs, could not be written.
        """
        with self._failing():
            failures = self.checkpoints.flush()
        for error in failures:
            self._warn(f"a checkpoint could not be written at first ({_reason(error)})")

    def load_best(self) -> dict[str, Any]:
        """Return the state in best.pt, once everything saved is on disk.

        Raises:
            JobError: a checkpoint could not be written, or best.pt is of another epoch than the
                best one.
            UserError: best.pt is missing or damaged.
        """
        assert self.state is not None
        self.flush()
        best = self.checkpoints.load_best()
        if best["epoch"] != self.state.best_epoch:
            raise JobError(
                f"{self}: best.pt has the weights of epoch {best['epoch']}, but the best of "
                f"the first {self.state.epoch} is epoch {self.state.best_epoch}; train more "
                "epochs, or evaluate best.pt itself"
            )
        return best

    def finish(self, results: Mapping[str, Any]) -> None:
        """Mark the run as completed, once all of it and `results`, for TensorBoard, are on disk.

        Raises:
            JobError: something could not be written.
        """
        assert self.state is not None
        with self._failing():
            self._lock.check()
            self.writer.close(self.state.step, {"results": results})
            epoch, step = self.state.epoch, self.state.step
            self._write_status("completed", epoch, step, "all epochs done", False)

    def end(self, error: BaseException) -> None:
        """Record why the run ended early, if it had started and its disk can still be written."""
        if self.state is None:
            return
        explained = isinstance(error, ReportedError | PeerLostError)
        status = error.status if isinstance(error, ReportedError) else "failed"
        is_lost = isinstance(error, PeerLostError) and not isinstance(error, PeerFailedError)
        resumable = status == "preempted" or is_lost
        reason = str(error) if explained else repr(error)
        with contextlib.suppress(OSError):
            self.checkpoints.flush()
        with contextlib.suppress(OSError):
            arguments = (status, self.state.epoch, self.state.step, reason, resumable)
            try:
                self._write_status(*arguments)
            except LockLostError:
                raise
            except OSError:  # no room for a new file: a launcher must not requeue a full disk
                overwrite(self.path / "status.json", _json(self._status(*arguments)))

    def _before_checkpoints(self) -> None:
        """Check that they would be written into this run, and that its metrics are on disk."""
        self._lock.check()
        self.writer.sync()
        self._lock.check()  # the flush may have taken long

    def _write_status(
        self, status: Status, epoch: int, step: int, reason: str, resumable: bool = True
    ) -> None:
        """Write status.json.

        It is `resumable`, by which launch scripts requeue, if the same command may get further
        without anything being fixed first.
        """
        self._write_json("status.json", self._status(status, epoch, step, reason, resumable))

    def _status(
        self, status: Status, epoch: int, step: int, reason: str, resumable: bool
    ) -> dict[str, Any]:
        saved_step = self.checkpoints.newest_step
        content = {"status": status, "epoch": epoch, "step": step, "saved_step": saved_step}
        return content | {"resumable": resumable, "reason": reason, "time": time.time()}

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._lock.check()  # first, or a full disk would hide that the directory is another's
        write_atomically(self.path / name, _json(content), lambda _: self._lock.check())

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except LockLostError as error:
            raise JobError(
                f"{self}: {error.strerror} while the job ran, and another job may be writing "
                "there, so this one ends without writing anything more; start it again, with "
                "--run-dir set to the run's new location if it was moved"
            ) from error
        except OSError as error:
            intact = self.checkpoints.newest_step is not None
            kept = "; the checkpoints in it are intact" if intact else ""
            raise JobError(
                f"{self} cannot be written ({_reason(error)}){kept}: fix that and run the same "
                "command again"
            ) from error


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _reason(error: OSError) -> str:
    reason, file = error.strerror or str(error), error.filename
    with contextlib.suppress(OSError, TypeError):
        disk = os.statvfs(Path(file).parent)
        if error.errno == errno.ENOSPC and disk.f_files and not disk.f_favail:
            reason += ", no free inodes (df -i)"
    return f"{reason}: {file}" if file else reason


def read_status(path: Path) -> str | None:
    """Return the status in the run directory `path`, None if it is not a run's directory."""
    status = read_json_object(path / "status.json", _LARGEST_JSON)
    return str(status["status"]) if "status" in status else None


def find_run_directory(run_dir: str | None, job_id: str | None) -> Path:
    """Return the directory the user named, that of an earlier start of this job, or a new name.

    The path is absolute; nothing is created.

    Args:
        run_dir: as the user gave it, or None for `runs/<timestamp>_<launch id>`.
        job_id: the same for every restart of the job, so that a restart finds its unfinished run;
            None if the launcher provides no such name.
    """
    chosen = Path(run_dir).expanduser() if run_dir is not None else _default_path(job_id)
    return chosen.absolute()


def _default_path(job_id: str | None) -> Path:
    runs = Path("runs")
    earlier = {path: match for path in runs.glob("*") if (match := _RUN_NAME.fullmatch(path.name))}
    if job_id is not None:
        of_job = [path for path, match in earlier.items() if match["id"] == job_id]
        unfinished = [path for path in of_job if read_status(path) != "completed"]
        if unfinished:
            return max(unfinished)
    # Runs are sorted by name: a newer one must sort last even if the clock was set back.
    stamp = datetime.now().strftime(_STAMP)
    newest = max((match["stamp"] for match in earlier.values()), default="")
    if newest >= stamp:
        with contextlib.suppress(ValueError, OverflowError):  # a name that is no time
            stamp = (datetime.strptime(newest, _STAMP) + timedelta(seconds=1)).strftime(_STAMP)
    return runs / f"{stamp}_{job_id or f'pid-{os.getpid()}'}"
