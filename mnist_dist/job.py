"""One process's part in a run: what it holds, how it begins and ends, what all ranks do together.

`train_ddp.py` is the order in which these are called.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config import TrainConfig
from mnist_dist.data import Dataset, find_data, load
from mnist_dist.distributed.ddp import require_compression
from mnist_dist.distributed.failures import LostContactError
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.sync import Agreement, StopRequest, Verdict
from mnist_dist.distributed.world import World, join
from mnist_dist.errors import JobError, Preempted, UserError
from mnist_dist.evaluation import Evaluation
from mnist_dist.model import describe
from mnist_dist.run import summary
from mnist_dist.run.console import Console
from mnist_dist.run.directory import code_digest, find_run_directory
from mnist_dist.run.metrics import Look
from mnist_dist.run.record import Record
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding
from mnist_dist.steps import use_precision


@dataclass(frozen=True)
class Job:
    """What one process holds while it trains."""

    config: TrainConfig
    world: World
    console: Console
    dataset: Dataset
    sharding: Sharding
    state: TrainState
    record: Record


Build = Callable[[TrainConfig, Dataset, Sharding, torch.device], TrainState]
"""Model, optimizer and schedule at step 0."""


@contextlib.contextmanager
def opened(config: TrainConfig, launch: Launch, build_state: Build) -> Iterator[Job]:
    """Join the other ranks for the length of a job; if it ends early, the record says why."""
    job = None
    try:
        with join(launch, config.device, config.backend, config.setup_timeout) as world:
            job = _set_up(config, world, build_state)
            yield job
    except BaseException as error:
        if job is None:
            raise
        if isinstance(error, LostContactError):
            error = LostContactError(f"{error}; this was at step {job.state.step + 1}")
        if job.world.is_main:
            job.record.end(job.state, error)
        raise error


def _set_up(config: TrainConfig, world: World, build_state: Build) -> Job:
    """Data, model and the name of the run's record; nothing is written."""
    require_compression(config.grad_compression, world.backend)
    use_precision(config.precision, world.device)
    console = Console(speaks=world.is_main)
    dataset = _load_data(config, world, console)
    sharding = Sharding(
        len(dataset.train), config.global_batch_size, world.rank, world.world_size, config.seed
    )
    state = build_state(config, dataset, sharding, world.device)
    path = world.once_per_host(lambda: find_run_directory(config.run_dir, world.launch.job_id))
    record = Record(path, config.keep_checkpoints, console)
    return Job(config, world, console, dataset, sharding, state, record)


def _load_data(config: TrainConfig, world: World, console: Console) -> Dataset:
    """The three splits on this rank's device; found, and converted if need be, once per host."""
    location = world.once_per_host(lambda: find_data(config.data, config.cache_dir))
    for warning in location.warnings:
        console.warn(warning)
    dataset = world.agree(lambda: load(location))
    if (samples := config.train_samples) is not None:
        dataset = world.agree(lambda: dataset.first_training_samples(samples))
    world.require_same(
        config.to_flags() | {"the code": code_digest(), "the data": dataset.fingerprint},
        "give every process the same flags, code and data",
    )
    return dataset.to(world.device)


def resume(job: Job) -> bool:
    """Open the run and continue from its newest checkpoint, if any; True if nothing is left.

    Hosts need not share a disk: the one with the newest checkpoint gives it to all.
    """
    config, world, state, record = job.config, job.world, job.state, job.record

    def find() -> tuple[dict[str, Any] | None, list[str]]:
        if world.is_main:
            record.open()
        first_on_host = world.launch.local_rank == 0
        return record.store.load_latest(world.is_main) if first_on_host else (None, [])

    saved, damaged = world.agree(find)
    status, had_checkpoint = world.on_main(
        lambda: (record.directory.status, record.directory.had_checkpoint)
    )
    for line in damaged:
        job.console.warn(f"{line}; using an older checkpoint")
    steps = world.gather(-1 if saved is None else int(saved["step"]))
    if max(steps) >= 0:
        state.load_state_dict(world.broadcast(saved or {}, steps.index(max(steps))), world)
    elif had_checkpoint:
        raise UserError(
            f"--run-dir {record}: a run is there, but its checkpoints are gone; bring them back, "
            "or give another --run-dir"
        )
    if state.epoch > config.epochs:
        raise UserError(
            f"--epochs {config.epochs}: the run in {record} has {state.epoch} behind it; "
            "give that many or more, or another --run-dir"
        )
    if state.best_epoch and not world.on_main(record.store.has_best):
        job.console.warn(
            f"best.pt in {record} is gone or damaged: the best epoch from here is kept"
        )
        state.best_loss = float("inf")
    return status == "completed" and state.epoch == config.epochs


def begin(job: Job) -> None:
    """Compare the ranks' weights, say and write down what runs where with what."""
    config, world, state = job.config, job.world, job.state
    world.require_same({"the weights": state.weights_digest()}, "this is a bug, or bad memory")
    data = {"data": job.dataset.description, "data_fingerprint": job.dataset.fingerprint}
    facts = world.facts() | data
    hparams = config.hparams() | {"world_size": world.world_size}
    world.on_main(lambda: job.record.begin(state, config.to_json(), facts, hparams))
    hosts = f" on {len(facts['hosts'])} hosts" if len(facts["hosts"]) > 1 else ""
    fact = job.console.fact
    fact("world", f"{world.description()}{hosts}, torch {torch.__version__}")
    fact("data", job.dataset.description)
    fact("model", describe(state.model))
    fact(
        "train",
        f"{_counted(config.epochs, 'epoch')} of "
        f"{_counted(job.sharding.steps_per_epoch, 'step')}, global batch "
        f"{config.global_batch_size}, SGD lr {config.lr:g} {config.schedule}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}"
        f"{f', shifts up to {config.random_shift} px' if config.random_shift else ''}",
    )
    fact("watch", summary.view(str(job.record)))
    fact("run", str(job.record))
    if state.step:
        job.console.say(f"resume at step {state.step}, {_counted(state.epoch, 'epoch')} done")
    world.begin_steps(config.step_timeout)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


class Meetings:
    """Where all ranks compare notes after the same step: when to stop, to save, to give up."""

    def __init__(self, job: Job) -> None:
        """Listen to signals from now on."""
        stop = StopRequest()
        stop.listen()
        minutes = job.config.checkpoint_every_minutes
        self._agreement = Agreement(job.world, stop, minutes * 60 if minutes else None)
        self._save_every = job.config.checkpoint_every_steps or sys.maxsize
        self._job = job

    def after_step(self) -> None:
        """Meet if it is time to.

        Raises:
            JobError: a loss was not finite.
            Preempted: a rank was asked to stop; the state is on disk.
        """
        save_now = self._job.state.step % self._save_every == 0
        if self._agreement.due() or save_now:
            verdict, _ = self._agreement.compare(self._job.state.settle())
            self._require_finite(verdict)
            self._save_or_stop(verdict, save_now)

    def end_epoch(self) -> float:
        """Meet when an epoch's steps are done; the mean loss over its samples.

        Raises:
            JobError: a loss was not finite, or a rank's weights went their own way, by a fault of
                its memory or of the code.
            Preempted: a rank was asked to stop; the state is on disk.
        """
        job, state = self._job, self._job.state
        bad_step = state.settle()
        verdict, notes = self._agreement.compare(bad_step, state.notes(job.world))
        self._require_finite(verdict)
        loss_sum, apart = state.compare(notes)
        if apart:
            raise JobError(
                f"the weights of rank(s) {', '.join(map(str, apart))} differ from those of the "
                f"others after step {state.step}; suspect that host's memory, and start again from "
                f"{job.record}"
            )
        self._save_or_stop(verdict, save_now=False)
        return loss_sum / job.sharding.samples

    def _require_finite(self, verdict: Verdict) -> None:
        if verdict.bad_rank is not None:
            raise JobError(
                f"the loss at step {verdict.bad_step} (epoch {self._job.state.epoch + 1}) on rank "
                f"{verdict.bad_rank} is not finite; nothing was saved after it: look at the data, "
                "or lower --lr and begin in another --run-dir"
            )

    def _save_or_stop(self, verdict: Verdict, save_now: bool) -> None:
        job = self._job
        if verdict.save or save_now or verdict.stop:
            self._agreement.saved()
            save(job, {}, best=False, newest=True)
        if verdict.stop:
            job.world.on_main(job.record.flush)
            raise Preempted(
                f"{verdict.stop} at step {job.state.step}, saved; the same command with "
                f"--run-dir {job.record} continues"
            )


def save(job: Job, figures: dict[str, float], best: bool, newest: bool) -> None:
    """Begin to write the checkpoints that are asked for; every rank must take part."""
    if best or newest:
        saved = job.state.state_dict(job.world)
        if job.world.is_main:
            job.record.save(saved, job.state, figures, best, newest)


def look_at(job: Job, validation: Evaluation) -> Look:
    """What TensorBoard draws of an epoch."""
    images = job.dataset.validation.images
    mistakes = [
        (images[m.index].cpu(), f"{m.label}>{m.predicted} {m.probability:.0%}")
        for m in validation.mistakes
    ]
    return Look("val", validation.confusion, mistakes, job.state.model)


def report(job: Job, result: Evaluation) -> None:
    """Say and write down how good the best weights are on the test split, and what to do next."""
    state, record, config = job.state, job.record, job.config
    right = f"accuracy {result.accuracy:.2%} of {result.count:,} digits"
    results = [
        *summary.validation(record.records, state.best_epoch),
        ("test", f"loss {result.loss:.4f}, {right} (best.pt: weights of epoch {state.best_epoch})"),
        ("digits", summary.digits(result.accuracy_by_class)),
        ("errors", summary.confusions(result.confusions)),
    ]
    job.world.on_main(lambda: record.finish(state, dict(results)))
    program = job.world.launch.program
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_ddp.py" else "-m mnist_dist train"
    longer = 2 * config.epochs if config.schedule == "constant" else None
    path, train = str(record), f"{program} {script}" if program else ""
    for label, text in [*results, ("run", path), *summary.next_commands(path, train, longer)]:
        job.console.fact(label, text)
