"""One run as it is written down: its directory, checkpoints and metrics, in rank 0's hands."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mnist_dist.distributed.failures import LostContactError
from mnist_dist.errors import JobError, ReportedError
from mnist_dist.run.checkpoint import CheckpointStore
from mnist_dist.run.console import Console
from mnist_dist.run.directory import RunDirectory, Status, environment_facts
from mnist_dist.run.metrics import EpochPlots, MetricsWriter
from mnist_dist.run.state import TrainState


class Record:
    """Everything a run leaves behind. Every rank may name it; only rank 0 opens it and writes."""

    def __init__(self, path: Path, keep: int, console: Console) -> None:
        """Name the run's directory, the number of checkpoints to keep, where to say warnings."""
        self.directory = RunDirectory(path)
        self.store = CheckpointStore(path / "checkpoints", keep)
        self._metrics = MetricsWriter(path, console.warn)
        self._console = console
        self._begun = False

    def __str__(self) -> str:
        """The directory, as a person would type it."""
        return str(self.directory)

    def open(self) -> None:
        """Make the directory, or take over that of an earlier start; sweep what a kill left."""
        self.directory.open()
        self.store.open()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was recorded of the run so far, also by earlier starts; empty if not open here."""
        return self._metrics.records

    def begin(
        self,
        state: TrainState,
        config: Mapping[str, Any],
        world: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        """Write down what runs where with what. Raises JobError if that cannot be written.

        Args:
            state: as the run is begun or continued.
            config: every setting.
            world: the processes.
            settings: by which to tell runs apart.
        """
        environment = environment_facts() | dict(world)
        with self._reported():
            # First the status: it marks the directory as a run's, whenever this process dies.
            self._write_status("running", state.epoch, state.step, "training")
            self.directory.write_json("config.json", config)
            self.directory.write_json("environment.json", environment)
            self._begun = True
            texts = {"config": config, "environment": environment}
            self._metrics.open(state.step, texts, settings)

    def log_metrics(
        self,
        state: TrainState,
        metrics: Mapping[str, float],
        details: Mapping[str, Sequence[float]] | None = None,
        plots: EpochPlots | None = None,
    ) -> None:
        """Record metrics at the state's step; a disk that cannot take them is a warning."""
        for tag, value in metrics.items():
            self._metrics.add_scalar(tag, value, state.step)
        if plots:
            self._metrics.add_plots(plots, state.step)
        self._metrics.commit(state.epoch, state.step, details)

    def save(
        self,
        saved: dict[str, Any],
        state: TrainState,
        figures: Mapping[str, float],
        best: bool,
        newest: bool,
    ) -> None:
        """Begin to write the checkpoints asked for. Failing is a warning: `flush` insists."""
        with self._warned("a checkpoint"):
            self.store.save(saved, state.step, figures, best, newest)
            if newest:
                status = partial(self._write_status, "running", state.epoch, state.step, "training")
                self.store.afterwards(status)

    def flush(self) -> None:
        """Wait until every checkpoint is on disk. Raises JobError if one cannot be."""
        with self._reported():
            self.store.flush()

    def finish(self, state: TrainState, results: Mapping[str, Any]) -> None:
        """Close the record of a run that has done all its epochs; `results` are for a person."""
        with self._reported():
            self._metrics.close(state.step, {"results": results})
            self._write_status("completed", state.epoch, state.step, "all epochs done", False)

    def end(self, state: TrainState, error: BaseException) -> None:
        """Write down why the run ended early, as far as there still is a disk to write to."""
        if not self._begun:
            return
        explained = isinstance(error, ReportedError | LostContactError)
        status = error.status if isinstance(error, ReportedError) else "failed"
        with contextlib.suppress(OSError):
            reason = str(error) if explained else repr(error)
            with contextlib.suppress(OSError):
                self.store.flush()
            resumable = status == "preempted" or isinstance(error, LostContactError)
            self._write_status(status, state.epoch, state.step, reason, resumable)

    def _write_status(
        self, status: Status, epoch: int, step: int, reason: str, resumable: bool = True
    ) -> None:
        saved = self.store.newest_step
        self.directory.write_status(status, epoch, step, saved, resumable, reason)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            intact = self.store.newest_step is not None
            kept = "; the checkpoints in it are intact" if intact else ""
            raise JobError(
                f"{self} cannot be written ({_why(error)}){kept}: mend that and run the same "
                "command again"
            ) from error

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._console.warn(f"{what} could not be written ({_why(error)}); training goes on")


def _why(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)
