"""Train the MNIST classifier with DistributedDataParallel on any number of processes.

python train_ddp.py                            one process, no process group
torchrun --nproc_per_node=4 train_ddp.py       four on this host
srun python train_ddp.py                       one per Slurm task
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Before torch, whose import takes seconds: it notes the parent that we are to end with.
from mnist_dist.launcher import Launch  # isort: skip

import torch
from torch.optim.lr_scheduler import OneCycleLR

from mnist_dist import process, summary
from mnist_dist.clock import EpochClock
from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.console import Console, Course, Progress
from mnist_dist.data import Dataset, load, locate
from mnist_dist.engine import Evaluation, evaluate, train_epoch
from mnist_dist.errors import JobError, Preempted, UserError
from mnist_dist.failures import LostContactError
from mnist_dist.gradients import require_compression
from mnist_dist.interruption import Agreement, StopRequest
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD
from mnist_dist.profiling import profiled
from mnist_dist.record import Record
from mnist_dist.run_directory import code_digest, find_run_directory
from mnist_dist.sharding import Sharding
from mnist_dist.state import TrainState
from mnist_dist.steps import Choice, build_step
from mnist_dist.tracking import Look, is_looked_at
from mnist_dist.world import World, join

_DRAWN_MISTAKES = 24


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


def train(config: TrainConfig, launch: Launch) -> None:
    """The whole job, in order. Every rank runs all of it; rank 0 alone writes and speaks."""
    job = None
    try:
        with join(launch, config.device, config.backend, config.setup_timeout) as world:
            job = set_up(config, world)
            if resume(job):
                job.console.say(f"{job.record}: already complete; --epochs N goes on to N epochs")
                return
            begin(job)
            fit(job)
            test(job)
    except BaseException as error:
        if job is None:
            raise
        if isinstance(error, LostContactError):
            error = LostContactError(f"{error}; this was at step {job.state.step + 1}")
        if job.world.is_main:
            job.record.end(job.state, error)
        raise error


def set_up(config: TrainConfig, world: World) -> Job:
    """Data, model and the name of the run's record; nothing is written."""
    require_compression(config.grad_compression, world.backend)
    console = Console(speaks=world.is_main)
    dataset = load_data(config, world, console)
    sharding = Sharding(
        len(dataset.train), config.global_batch_size, world.rank, world.world_size, config.seed
    )
    state = build_state(config, dataset, sharding, world.device)
    path = world.once_per_host(lambda: find_run_directory(config.run_dir, world.launch.job_id))
    record = Record(path, config.keep_checkpoints, console)
    return Job(config, world, console, dataset, sharding, state, record)


def load_data(config: TrainConfig, world: World, console: Console) -> Dataset:
    """The three splits on this rank's device; found, and converted if need be, once per host."""
    located = world.once_per_host(lambda: locate(config.data, config.cache_dir))
    for warning in located.warnings:
        console.warn(warning)
    dataset = world.agree(lambda: load(located))
    if (samples := config.train_samples) is not None:
        dataset = world.agree(lambda: dataset.first_training_samples(samples))
    world.require_same(
        config.to_flags() | {"the code": code_digest(), "the data": dataset.fingerprint},
        "give every process the same flags, code and data",
    )
    return dataset.to(world.device)


def build_state(
    config: TrainConfig, dataset: Dataset, sharding: Sharding, device: torch.device
) -> TrainState:
    """Model, optimizer and schedule at step 0."""
    torch.manual_seed(config.seed)
    model = MLP().to(device)
    optimizer = FlatSGD(model, config.lr, config.momentum, config.weight_decay)
    scheduler = None
    if config.schedule == "onecycle":
        steps = config.epochs * sharding.steps_per_epoch
        scheduler = OneCycleLR(optimizer, config.lr, steps, cycle_momentum=False)
    identity = config.maths() | {"data": dataset.fingerprint}
    return TrainState(model, optimizer, scheduler, identity)


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
    status = world.on_main(lambda: record.directory.status)
    for line in damaged:
        job.console.warn(f"{line}; using an older checkpoint")
    steps = world.gather(-1 if saved is None else int(saved["step"]))
    if max(steps) >= 0:
        state.load_state_dict(world.broadcast(saved or {}, steps.index(max(steps))), world)
    elif status in ("completed", "preempted"):
        raise UserError(
            f"--run-dir {record}: the run there is {status}, but its checkpoints are gone; "
            "give another --run-dir"
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
    compared = config.compared() | {"world_size": world.world_size}
    world.on_main(lambda: job.record.begin(state, config.to_json(), facts, compared))
    parameters = sum(p.numel() for p in state.model.parameters())
    hosts = f" on {len(facts['hosts'])} hosts" if len(facts["hosts"]) > 1 else ""
    fact = job.console.fact
    fact("world", f"{world.description()}{hosts}, torch {torch.__version__}")
    fact("data", job.dataset.description)
    fact("model", f"784-128-256-10, {parameters:,} parameters")
    fact(
        "train",
        f"{config.epochs} epochs of {job.sharding.steps_per_epoch} steps, global batch "
        f"{config.global_batch_size}, SGD lr {config.lr:g} {config.schedule}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}"
        f"{f', shifts up to {config.random_shift} px' if config.random_shift else ''}",
    )
    fact("watch", summary.view(str(job.record)))
    fact("run", str(job.record))
    if state.step:
        job.console.say(f"resume at step {state.step}, {state.epoch} epochs done")
    world.begin_steps(config.step_timeout)


def fit(job: Job) -> None:
    """Train and validate epoch by epoch, from where the state stands."""
    config, state, sharding, world = job.config, job.state, job.sharding, job.world
    split = job.dataset.train
    choice = Choice(
        autograd=config.backward == "autograd",
        share_memory=config.shared_memory == "auto",
        compression=config.grad_compression,
        compile=config.compile,
        timeout=config.step_timeout,
    )
    step = build_step(state.model, state.optimizer, world, choice)
    job.console.fact("step", step.way)
    minutes = config.checkpoint_every_minutes
    stop = StopRequest()
    stop.listen()
    agreement = Agreement(world, stop, minutes * 60 if minutes else None)
    course = Course(
        config.epochs, sharding.steps_per_epoch, sharding.samples, world.world_size, state.step
    )
    with job.console.progress(course) as progress:
        while state.epoch < config.epochs:
            clock = EpochClock(step, sharding, first := state.batch)
            steps = train_epoch(
                step, state.scheduler, split, sharding, state.epoch, first, config.random_shift
            )
            if config.profile and state.epoch == 0 and world.is_main:
                steps = profiled(steps, job.record.directory.path / "profile")
            for loss_sum in steps:
                state.count_step(loss_sum)
                progress.step(state.step, loss_sum)
                save_now = state.step % (config.checkpoint_every_steps or sys.maxsize) == 0
                if agreement.due() or save_now:
                    compare_notes(job, agreement, save_now)
            compare_notes(job, agreement, save_now=False)
            train_loss = sum(note[0] for note in world.gather_numbers([state.loss_sum]))
            trained = {"train/loss": train_loss / sharding.samples, **clock.figures()}
            finish_epoch(job, trained, progress)


def finish_epoch(job: Job, trained: dict[str, float], progress: Progress) -> None:
    """Validate, record, say and save an epoch whose training gave the figures `trained`."""
    config, state = job.config, job.state
    drawn = config.tensorboard == "full" and is_looked_at(state.epoch + 1, config.epochs)
    validation = evaluate(
        state.model, job.dataset.validation, job.world, _DRAWN_MISTAKES if drawn else 0
    )
    require_same_weights(job)
    improved = state.finish_epoch(validation.loss)
    figures = {
        **trained,
        "val/loss": validation.loss,
        "val/accuracy": validation.accuracy,
        "lr": state.optimizer.param_groups[0]["lr"],
    }
    # Recorded before it is saved: dying in between repeats the epoch and cuts its record off.
    if job.world.is_main:
        job.record.figures(state, figures, look=look_at(job, validation) if drawn else None)
    progress.epoch(state.epoch, state.step, figures, improved)
    due = state.epoch % config.checkpoint_every_epochs == 0 or state.epoch == config.epochs
    save(job, figures, best=improved, newest=due)


def look_at(job: Job, validation: Evaluation) -> Look:
    """What TensorBoard draws of an epoch."""
    images = job.dataset.validation.images
    mistakes = [
        (images[m.index].cpu(), f"{m.label}>{m.predicted} {m.probability:.0%}")
        for m in validation.mistakes
    ]
    return Look("val", validation.confusion, mistakes, job.state.model)


def compare_notes(job: Job, agreement: Agreement, save_now: bool) -> None:
    """Stop, save or give up, all ranks at this same step.

    Raises:
        JobError: a loss was not finite.
        Preempted: a rank was asked to stop; the state is on disk.
    """
    state = job.state
    verdict = agreement.compare(state.settle())
    if verdict.bad_rank is not None:
        raise JobError(
            f"the loss at step {verdict.bad_step} (epoch {state.epoch + 1}) on rank "
            f"{verdict.bad_rank} is not finite; nothing was saved after it: look at the data, or "
            "lower --lr and begin in another --run-dir"
        )
    if verdict.save or save_now or verdict.stop:
        agreement.saved()
        save(job, {}, best=False, newest=True)
    if verdict.stop:
        job.world.on_main(job.record.flush)
        raise Preempted(
            f"{verdict.stop} at step {state.step}, saved; the same command with "
            f"--run-dir {job.record} continues"
        )


def require_same_weights(job: Job) -> None:
    """Compare all ranks' weights, bit by bit.

    Raises:
        JobError: a rank's weights went their own way, by a fault of its memory or of the code.
    """
    apart = job.state.ranks_apart(job.world)
    if apart:
        raise JobError(
            f"the weights of rank(s) {', '.join(map(str, apart))} differ from those of the others "
            f"after step {job.state.step}; suspect that host's memory, and start again from "
            f"{job.record}"
        )


def save(job: Job, figures: dict[str, float], best: bool, newest: bool) -> None:
    """Begin to write the checkpoints that are asked for; every rank must take part."""
    if best or newest:
        saved = job.state.state_dict(job.world)
        if job.world.is_main:
            job.record.save(saved, job.state, figures, best, newest)


def test(job: Job) -> None:
    """Evaluate the weights of best.pt on the test split, which nothing else looks at."""
    state, world, record = job.state, job.world, job.record
    world.on_main(record.flush)
    state.model.load_state_dict(world.on_main(record.store.load_best)["model"])
    result = evaluate(state.model, job.dataset.test, world)
    figures = {"test/loss": result.loss, "test/accuracy": result.accuracy}
    look = Look("test", result.confusion) if job.config.tensorboard == "full" else None
    if world.is_main:
        details = {"test/accuracy_by_digit": result.accuracy_by_class}
        record.figures(state, figures, details, look)
    results = [*summary.validation(record.records, state.best_epoch), *tested(job, result)]
    world.on_main(lambda: record.finish(state, dict(results)))
    for label, text in [*results, *next_steps(job)]:
        job.console.fact(label, text)


def tested(job: Job, result: Evaluation) -> list[summary.Fact]:
    """How good the best weights are on the test split, and where they err."""
    right = f"accuracy {result.accuracy:.2%} of {result.count:,} digits"
    weights = f"best.pt: weights of epoch {job.state.best_epoch}"
    return [
        ("test", f"loss {result.loss:.4f}, {right} ({weights})"),
        ("digits", summary.digits(result.accuracy_by_class)),
        ("errors", summary.confusions(result.confusions)),
    ]


def next_steps(job: Job) -> list[summary.Fact]:
    """Where the run is, and the commands to look at it, evaluate it and go on with it."""
    path, config, program = str(job.record), job.config, job.world.launch.program
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_ddp.py" else "-m mnist_dist train"
    longer = 2 * config.epochs if config.schedule == "constant" else None
    train = f"{program} {script}" if program else ""
    return [("run", path), *summary.next_commands(path, train, longer)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the process's exit code."""
    words = sys.argv[1:] if argv is None else argv
    return process.attempt(lambda launch: train(parse_config(words), launch))


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own."""
    process.run(lambda: main(argv))


if __name__ == "__main__":
    run()
