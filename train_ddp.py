"""Train the MNIST classifier with DistributedDataParallel on any number of processes.

python train_ddp.py                            one process, no process group
torchrun --nproc_per_node=4 train_ddp.py       four on this host
srun python train_ddp.py                       one per Slurm task
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

from mnist_dist.checkpoint import CheckpointStore
from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.data import Dataset, load, locate
from mnist_dist.engine import evaluate, train_epoch
from mnist_dist.errors import UserError
from mnist_dist.model import MLP
from mnist_dist.run_directory import RunDirectory, environment_facts, find_run_directory
from mnist_dist.sharding import Sharding
from mnist_dist.state import TrainState
from mnist_dist.tracking import Console, Tracker
from mnist_dist.world import Launch, World, exit_with_user_error, join, read_launch


@dataclass(frozen=True)
class Job:
    """What one process holds while it trains."""

    config: TrainConfig
    world: World
    console: Console
    dataset: Dataset
    sharding: Sharding
    state: TrainState
    run: RunDirectory
    store: CheckpointStore
    tracker: Tracker


def train(config: TrainConfig, launch: Launch) -> None:
    """The whole job, in order. Every rank runs all of it; rank 0 alone writes and speaks."""
    with join(launch, config.device, config.backend) as world:
        job = set_up(config, world)
        if resume(job):
            job.console.say(f"{job.run}: already complete; --epochs N goes on to N epochs")
            return
        if world.is_main:
            open_record(job)
        try:
            fit(job)
            results = test(job)
        except BaseException as error:
            if world.is_main:
                job.run.write_status("failed", job.state.epoch, job.state.step, repr(error))
            raise
        job.tracker.close(config.to_json() | {"world_size": world.world_size}, results)
        if world.is_main:
            job.run.write_status("completed", job.state.epoch, job.state.step, "all epochs done")
        job.console.say(f"run    {job.run}")


def set_up(config: TrainConfig, world: World) -> Job:
    """Data, model and the names of the run's files, equal on every rank; nothing is written."""
    console = Console(speaks=world.is_main)
    dataset = load_data(config, world, console)
    sharding = Sharding(
        len(dataset.train), config.global_batch_size, world.rank, world.world_size, config.seed
    )
    state = build_state(config, dataset, sharding, world.device)
    path = world.on_main(lambda: find_run_directory(config.run_dir, world.launch.job_id))
    store = CheckpointStore(path / "checkpoints", config.keep_checkpoints)
    return Job(
        config, world, console, dataset, sharding, state, RunDirectory(path), store, Tracker(path)
    )


def load_data(config: TrainConfig, world: World, console: Console) -> Dataset:
    """The three splits on this rank's device; found, and converted if need be, once per host."""
    located = world.once_per_host(lambda: locate(config.data, config.cache_dir))
    for warning in located.warnings:
        console.warn(warning)
    dataset = world.agree(lambda: load(located))
    if (samples := config.train_samples) is not None:
        dataset = world.agree(lambda: dataset.first_training_samples(samples))
    world.require_same("--data", dataset.fingerprint, "give every host the same files")
    return dataset.to(world.device)


def build_state(
    config: TrainConfig, dataset: Dataset, sharding: Sharding, device: torch.device
) -> TrainState:
    """Model, optimizer and schedule at step 0."""
    torch.manual_seed(config.seed)
    model = MLP().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    scheduler = None
    if config.schedule == "onecycle":
        steps = config.epochs * sharding.steps_per_epoch
        scheduler = OneCycleLR(optimizer, config.lr, steps, cycle_momentum=False)
    identity = config.maths() | {"data": dataset.fingerprint}
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    return TrainState(model, optimizer, scheduler, identity, loss_sum)


def resume(job: Job) -> bool:
    """Open the run and continue from its newest checkpoint, if any; True if nothing is left."""

    def open_and_load() -> tuple[dict[str, Any] | None, list[str], bool]:
        job.run.open()
        job.store.open()
        return (*job.store.load_latest(), job.run.status == "completed")

    saved, damaged, completed = job.world.on_main(open_and_load)
    for line in damaged:
        job.console.warn(f"{line}; using an older checkpoint")
    if saved is not None:
        job.state.load_state_dict(saved, job.world)
        job.console.say(f"resume after epoch {job.state.epoch}, step {job.state.step}")
    if job.state.epoch > job.config.epochs:
        raise UserError(
            f"--epochs {job.config.epochs}: the run in {job.run} has {job.state.epoch} behind "
            "it; give that many or more, or another --run-dir"
        )
    return completed and job.state.epoch == job.config.epochs


def open_record(job: Job) -> None:
    """Say, and write down, what runs where with what."""
    config, state, run = job.config, job.state, job.run
    environment = environment_facts() | job.world.facts()
    run.write_json("config.json", config.to_json())
    run.write_json("environment.json", environment)
    run.write_status("running", state.epoch, state.step, "training")
    job.tracker.open(state.step, {"config": config.to_json(), "environment": environment})
    parameters = sum(p.numel() for p in state.model.parameters())
    job.console.say(f"world  {job.world.description()}, torch {torch.__version__}")
    job.console.say(f"data   {job.dataset.description}")
    job.console.say(f"model  784-128-256-10, {parameters:,} parameters")
    job.console.say(
        f"train  {config.epochs} epochs of {job.sharding.steps_per_epoch} steps, global batch "
        f"{config.global_batch_size}, SGD lr {config.lr:g} {config.schedule}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}"
    )
    job.console.say(f"run    {run}")


def fit(job: Job) -> None:
    """Train and validate epoch by epoch, from where the state stands."""
    config, state, sharding, world = job.config, job.state, job.sharding, job.world
    model = DistributedDataParallel(state.model) if world.world_size > 1 else state.model
    while state.epoch < config.epochs:
        name = f"epoch {state.epoch + 1:{len(str(config.epochs))}}/{config.epochs}"
        started, first = time.perf_counter(), state.batch
        steps = train_epoch(
            model, state.optimizer, state.scheduler, job.dataset.train, sharding, state.epoch, first
        )
        for loss_sum in job.console.progress(steps, sharding.steps_per_epoch, first, name):
            state.count_step(loss_sum)
        train_loss = world.sum(state.loss_sum).item() / sharding.samples
        seconds = time.perf_counter() - started

        validation = evaluate(state.model, job.dataset.validation, world)
        improved = state.finish_epoch(validation.loss)
        figures = {
            "train/loss": train_loss,
            "val/loss": validation.loss,
            "val/accuracy": validation.accuracy,
            "lr": state.optimizer.param_groups[0]["lr"],
            "perf/samples_per_second": sharding.samples_from(first) / seconds,
        }
        # Recorded before it is saved: dying in between repeats the epoch and cuts its record off.
        job.tracker.record(state.epoch, state.step, figures)
        job.console.epoch(name, figures, seconds)
        save(job, improved, figures)


def save(job: Job, improved: bool, figures: dict[str, float]) -> None:
    """Write the checkpoints that are due at the end of an epoch."""
    config, state = job.config, job.state
    due = state.epoch % config.checkpoint_every_epochs == 0 or state.epoch == config.epochs
    if improved or due:
        saved = state.state_dict(job.world)
        if job.world.is_main and improved:
            job.store.save_best(saved, state.step, figures)
        if job.world.is_main and due:
            job.store.save(saved, state.step, figures)


def test(job: Job) -> dict[str, float]:
    """Evaluate the weights of best.pt on the test split, which nothing else looks at."""
    state, world = job.state, job.world
    state.model.load_state_dict(world.on_main(job.store.load_best)["model"])
    result = evaluate(state.model, job.dataset.test, world)
    figures = {"test/loss": result.loss, "test/accuracy": result.accuracy}
    by_digit = {"test/accuracy_by_digit": result.accuracy_by_class}
    job.tracker.record(state.epoch, state.step, figures, by_digit)
    job.console.say(
        f"test   loss {result.loss:.4f}, accuracy {result.accuracy:.2%} of {result.count:,} digits "
        f"(best.pt: weights of epoch {state.best_epoch})"
    )
    shares = "  ".join(f"{digit}: {s:.1%}" for digit, s in enumerate(result.accuracy_by_class))
    job.console.say(f"       {shares}")
    return figures


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the process's exit code."""
    launch = Launch("alone")
    try:
        launch = read_launch()
        train(parse_config(sys.argv[1:] if argv is None else argv), launch)
    except UserError as error:
        return exit_with_user_error(launch, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
