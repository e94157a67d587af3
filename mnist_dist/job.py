"""One process's part in a run: what it holds, how a run starts, what all ranks decide together.

train_ddp.py is the order in which these functions are called.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config import RECIPES, TrainConfig
from mnist_dist.data import Dataset, find_data, load
from mnist_dist.distributed.ddp import check_compression
from mnist_dist.distributed.devices import set_precision, set_threads
from mnist_dist.distributed.failures import PeerLostError, format_ranks
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.sync import RankSync, SyncResult
from mnist_dist.distributed.world import World
from mnist_dist.errors import JobError, Preempted, UserError, counted
from mnist_dist.evaluation import Evaluation
from mnist_dist.model import build_model, describe
from mnist_dist.run.console import (
    Console,
    next_commands,
    shell_word,
    summary_fields,
    tensorboard_command,
)
from mnist_dist.run.directory import RunDirectory, find_run_directory
from mnist_dist.run.environment import code_digest
from mnist_dist.run.metrics import EpochPlots, should_log_plots
from mnist_dist.run.state import NOT_FINITE_REMEDY, TrainState
from mnist_dist.sampling import Sharding


@dataclass(frozen=True)
class Job:
    """What one process holds while it trains, except the state."""

    config: TrainConfig
    world: World
    console: Console
    dataset: Dataset
    sharding: Sharding
    run: RunDirectory

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.sharding.steps_per_epoch

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The settings that determine every result; a resume must have the same."""
        return self.config.hyperparameters() | {"data": self.dataset.fingerprint}

    def is_save_due(self, state: TrainState) -> bool:
        """Return whether the run gets a checkpoint after the epoch that was just finished."""
        of_epoch = state.epoch % self.config.checkpoint_every_epochs == 0
        return of_epoch or state.epoch == self.config.epochs or self._is_step_due(state)

    def _is_step_due(self, state: TrainState) -> bool:
        every = self.config.checkpoint_every_steps
        return every is not None and state.step % every == 0

    def should_log_plots(self, epoch: int) -> bool:
        """Return whether TensorBoard gets plots of epoch number `epoch` (1 = the first)."""
        return self.config.tensorboard == "full" and should_log_plots(epoch, self.config.epochs)

    def resume(self, state: TrainState) -> None:
        """Open the run directory and load its newest checkpoint, if any, into `state`.

        Nodes need not share a disk: the one with the newest checkpoint sends it to all.

        Raises:
            UserError: the run there cannot be continued with these flags.
        """
        world, run = self.world, self.run
        saved, damaged = world.run_on_all(lambda: self._find_checkpoint(state))
        had_checkpoint = world.on_main(lambda: run.had_checkpoint)
        for line in damaged:
            self.console.warn(f"{line}; using an older checkpoint")
        steps = world.gather(-1 if saved is None else int(saved["step"]))
        if max(steps) >= 0:
            state.load_state_dict(world.broadcast(saved or {}, steps.index(max(steps))), world)
        elif had_checkpoint:
            raise UserError(
                f"--run-dir {run}: the run there has lost its checkpoints; restore them, or use "
                "another --run-dir"
            )
        if state.epoch > self.config.epochs:
            raise UserError(
                f"--epochs {self.config.epochs}: the run in {run} has already completed "
                f"{counted(state.epoch, 'epoch')}; use that many or more, or another --run-dir"
            )
        self._check_best(state)

    def _find_checkpoint(self, state: TrainState) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest sound checkpoint on a node's first rank; and describe damaged ones."""
        is_main = self.world.is_main_process
        if is_main:
            self.run.open()
        if self.world.launch.local_rank != 0:
            return None, []
        return self.run.checkpoints.load_latest(state.find_fault, is_main)

    def _check_best(self, state: TrainState) -> None:
        """Forget the best epoch so far if its weights are missing."""
        epoch, checkpoints = state.best_epoch, self.run.checkpoints
        if epoch and not self.world.on_main(lambda: checkpoints.has_best(epoch)):
            self.console.warn(
                f"best.pt in {self.run} is missing, damaged or not of epoch {epoch}, the best "
                "so far; the best epoch from here on replaces it"
            )
            state.best_loss = float("inf")

    def is_complete(self, state: TrainState) -> bool:
        """Return whether the run has nothing left to do; every rank must call this."""
        is_marked = self.world.on_main(lambda: self.run.status) == "completed"
        is_complete = is_marked and state.epoch == self.config.epochs
        if is_complete:
            self.console.print(f"{self.run}: already complete; --epochs N trains up to N epochs")
        return is_complete

    def start_run(self, state: TrainState) -> RankSync:
        """Check that the ranks' weights agree, then record and print what runs where.

        Returns:
            What the ranks sync by; it catches stop signals from now on.
        """
        config, world, console = self.config, self.world, self.console
        minutes = config.checkpoint_every_minutes
        sync = RankSync(world, minutes * 60 if minutes else None, config.step_timeout)
        world.check_equal({"the weights": state.weights_digest()}, "this is a bug or bad memory")
        data = {"data": self.dataset.description, "data_fingerprint": self.dataset.fingerprint}
        facts = world.facts() | data
        hparams = config.hparams() | {"world_size": world.world_size}
        world.on_main(lambda: self.run.start(state, config.to_json(), facts, hparams))
        self.run.state = state  # on all ranks: their errors name the step
        hosts = f" on {len(facts['hosts'])} hosts" if len(facts["hosts"]) > 1 else ""
        threads = counted(torch.get_num_threads(), "thread")
        each = " each" if world.world_size > 1 else ""
        console.print_field(
            "world", f"{world.description()}{hosts}, {threads}{each}, torch {torch.__version__}"
        )
        console.print_field("data", self.dataset.description)
        console.print_field("model", describe(state.model))
        console.print_field("train", self._plan(state))
        console.print_field("watch", tensorboard_command(str(self.run)))
        console.print_field("run", str(self.run))
        if state.step:
            console.print(f"resume at step {state.step}, {counted(state.epoch, 'epoch')} done")
        return sync

    def _plan(self, state: TrainState) -> str:
        config = self.config
        optimizer = type(state.optimizer).__name__.removeprefix("Lean")
        shifts = f", shifts up to {config.random_shift} px" if config.random_shift else ""
        return (
            f"{counted(config.epochs, 'epoch')} of "
            f"{counted(self.sharding.steps_per_epoch, 'step')}, "
            f"global batch {config.global_batch_size}, {optimizer} lr {config.lr:g} "
            f"{config.schedule}, momentum {config.momentum:g}, "
            f"weight decay {config.weight_decay:g}{shifts}"
        )

    def sync_if_due(self, state: TrainState, sync: RankSync, steps: int = 1) -> None:
        """After one or more steps: exchange stop, checkpoint and NaN flags if it is time to.

        Raises:
            JobError: a loss was not finite, or the run directory is no longer this job's.
            Preempted: a rank was asked to stop; the state is on disk.
        """
        # After an epoch's last step the checkpoint follows with the epoch's validation.
        is_last = state.batch == self.sharding.steps_per_epoch
        save_now = self._is_step_due(state) and not is_last
        sync.launches.add()
        sync.count(steps)
        if sync.is_due or save_now:
            sync.launches.wait()
            result = sync.exchange(bad_step=state.drain_losses(), lost_run=self.run.find_fault())
            self._check(state, result)
            self._save_or_stop(state, sync, result, save_now)

    def sync_epoch(self, state: TrainState, sync: RankSync) -> float:
        """After an epoch's last step: the same, and compare weights; return the mean training loss.

        Raises:
            JobError: a loss was not finite, the weights of a rank have diverged, or the run
                directory is no longer this job's.
            Preempted: a rank was asked to stop; the state is on disk.
        """
        sync.launches.wait()
        bad_step = state.drain_losses()  # before the payload, which holds their sum
        result = sync.exchange(
            bad_step=bad_step,
            payload=state.local_payload(self.world),
            lost_run=self.run.find_fault(),
        )
        self._check(state, result)
        loss_sum, diverged = state.merge_payloads(result.payloads)
        if diverged:
            is_minority = 2 * len(diverged) < self.world.world_size
            nodes = "that node's" if is_minority else "all nodes'"
            raise JobError(
                f"the weights of {format_ranks(diverged)} differ from the other ranks' after step "
                f"{state.step} (bad memory or a bug); check {nodes} memory, and continue from "
                f"{self.run}"
            )
        self._save_or_stop(state, sync, result, save_now=False)
        return loss_sum / self.sharding.samples

    def _check(self, state: TrainState, result: SyncResult) -> None:
        """Raise JobError on all ranks if one has found that the run cannot continue."""
        if result.bad_loss is not None:
            step, rank = result.bad_loss
            raise JobError(
                f"the loss at step {step} (epoch {state.epoch + 1}) on rank {rank} is not finite; "
                f"{NOT_FINITE_REMEDY}"
            )
        if result.lost_run is not None:
            raise JobError(result.lost_run)

    def _save_or_stop(
        self, state: TrainState, sync: RankSync, result: SyncResult, save_now: bool
    ) -> None:
        if result.save or save_now or result.stop:
            sync.mark_saved()
            self.world.on_main(state.check_weights)
            self.save_checkpoint(state, {}, best=False, newest=True)
        if result.stop:
            self.world.on_main(self.run.flush)
            raise Preempted(
                f"{result.stop} at step {state.step}, saved; the same command with "
                f"--run-dir {self.run} continues"
            )

    def save_checkpoint(
        self, state: TrainState, metrics: Mapping[str, float], best: bool, newest: bool
    ) -> None:
        """Start to write the checkpoints asked for, on rank 0; every rank must call this."""
        if best or newest:
            saved = state.state_dict(self.world)
            if self.world.is_main_process:
                self.run.save_checkpoint(saved, metrics, best, newest)

    def build_plots(self, state: TrainState, validation: Evaluation) -> EpochPlots:
        """Collect an epoch's images and histograms for TensorBoard."""
        images = self.dataset.validation.images
        errors = [
            (images[e.index].cpu(), f"{e.label} predicted as {e.predicted}\n{e.probability:.0%}")
            for e in validation.most_confident_errors
        ]
        return EpochPlots("val", validation.confusion, errors, state.model)

    def finish_run(self, state: TrainState, result: Evaluation) -> None:
        """Mark the run as completed, and print its results and the next commands."""
        run, config, console = self.run, self.config, self.console
        results = summary_fields(run.writer.records, state.best_epoch, result)
        self.world.on_main(lambda: run.finish(dict(results)))
        program = self.world.launch.program
        is_script = Path(sys.argv[0]).name == "train_ddp.py"
        script = shell_word(sys.argv[0]) if is_script else "-m mnist_dist train"
        longer = 2 * config.epochs if config.schedule == "constant" else None
        path, train = str(run), f"{program} {script}" if program else ""
        for label, text in [*results, ("run", path), *next_commands(path, train, longer)]:
            console.print_field(label, text)
        if self.dataset.is_bundled and config.lr == RECIPES["baseline"]["lr"]:
            again = train or "the same command with"
            console.print_field("better", f"{again} --recipe tuned  # about 95% on these digits")


@contextlib.contextmanager
def open_job(config: TrainConfig, launch: Launch) -> Iterator[Job]:
    """Set up this rank for a job, and leave the job at the end; an early end is recorded."""
    job = None
    try:
        with init_distributed(launch, config.device, config.backend, config.setup_timeout) as world:
            job = _set_up(config, world)
            yield job
    except BaseException as error:
        if job is None:
            raise
        step = job.run.state.step + 1 if job.run.state else None
        if isinstance(error, PeerLostError) and step:
            error = type(error)(f"{error}; this was at step {step}")
        elif isinstance(error, ConnectionError) and job.world.world_size == 1:
            error = JobError(f"{error} at step {step or 1}; nvidia-smi and dmesg show its state")
        if job.world.is_main_process:
            job.run.end(error)
        raise error


def _set_up(config: TrainConfig, world: World) -> Job:
    """Load the data and name the run's directory, which is not touched yet."""
    if config.step == "manual":
        from mnist_dist.fast import check_manual_step

        check_manual_step(build_model(), world.device, _unsupported_flags(config))
    check_compression(config.grad_compression, world)
    set_precision(config.precision, world.device)
    set_threads(world.launch, -(-config.global_batch_size // world.world_size))
    console = Console(enabled=world.is_main_process)
    if config.grad_compression != "none" and world.world_size == 1:
        console.warn(f"--grad-compression {config.grad_compression}: has no effect in one process")
    path = world.once_per_host(lambda: find_run_directory(config.run_dir, world.launch.job_id))
    run = RunDirectory(path, config.keep_checkpoints, console.warn)
    kept = world.on_main(lambda: run.data)  # on all ranks: flags are compared later
    if config.data == "auto" and kept == "bundled":
        config = replace(config, data="bundled")  # although MNIST may be found by now
    dataset = _load_data(config, world, console)
    if dataset.is_bundled:
        config = replace(config, data="bundled")
    sharding = Sharding(len(dataset.train), config.global_batch_size, world.rank, world.world_size)
    return Job(config, world, console, dataset, sharding, run)


def _unsupported_flags(config: TrainConfig) -> list[str]:
    """Return the flags given that --step manual does not support."""
    given = {
        "--compile": config.compile,
        f"--precision {config.precision}": config.precision != "fp32",
        f"--grad-compression {config.grad_compression}": config.grad_compression != "none",
    }
    return [flag for flag, is_given in given.items() if is_given]


def _load_data(config: TrainConfig, world: World, console: Console) -> Dataset:
    """Load the three splits onto this rank's device; files are converted once per host."""
    location = world.once_per_host(lambda: find_data(config.data, config.cache_dir))
    for warning in location.warnings:
        console.warn(warning)
    dataset = world.run_on_all(lambda: load(location))
    if (samples := config.train_samples) is not None:
        dataset = world.run_on_all(lambda: dataset.first_training_samples(samples))
    world.check_equal(
        config.to_flags() | {"the code": code_digest(), "the data": dataset.fingerprint},
        "use the same flags, code and data for every process",
    )
    return dataset.to(world.device)
