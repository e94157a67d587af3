"""Train the MNIST classifier with DistributedDataParallel on any number of processes.

python train_ddp.py                            one process, no process group
torchrun --nproc_per_node=4 train_ddp.py       four on this host
srun python train_ddp.py                       one per Slurm task
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

# Before torch, whose import takes seconds: it notes the parent that we are to end with.
from mnist_dist.distributed.launcher import Launch  # isort: skip

import torch
from torch.optim.lr_scheduler import OneCycleLR

from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.data import Dataset
from mnist_dist.distributed import process
from mnist_dist.evaluation import evaluate, train_epoch
from mnist_dist.job import Job, Meetings, begin, look_at, opened, report, resume, save
from mnist_dist.model import build_model
from mnist_dist.optimizer import FlatSGD
from mnist_dist.run.clock import EpochClock
from mnist_dist.run.console import Course, Progress
from mnist_dist.run.metrics import Look, is_looked_at
from mnist_dist.run.profiling import profiled
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding
from mnist_dist.steps import Choice, build_step

_DRAWN_MISTAKES = 24


def train(config: TrainConfig, launch: Launch) -> None:
    """The whole job, in order. Every rank runs all of it; rank 0 alone writes and speaks."""
    with opened(config, launch, build_state) as job:
        if resume(job):
            job.console.say(f"{job.record}: already complete; --epochs N goes on to N epochs")
            return
        meetings = Meetings(job)  # a stop asked for from here on is saved
        begin(job)
        fit(job, meetings)
        test(job)


def build_state(
    config: TrainConfig, dataset: Dataset, sharding: Sharding, device: torch.device
) -> TrainState:
    """Model, optimizer and schedule at step 0."""
    torch.manual_seed(config.seed)
    model = build_model().to(device)
    optimizer = FlatSGD(model, config.lr, config.momentum, config.weight_decay)
    scheduler = None
    if config.schedule == "onecycle":
        steps = config.epochs * sharding.steps_per_epoch
        scheduler = OneCycleLR(optimizer, config.lr, steps, cycle_momentum=False)
    identity = config.hyperparameters() | {"data": dataset.fingerprint}
    return TrainState(model, optimizer, scheduler, identity)


def fit(job: Job, meetings: Meetings) -> None:
    """Train and validate epoch by epoch, from where the state stands."""
    config, world, state, sharding = job.config, job.world, job.state, job.sharding
    choice = Choice(
        autograd=config.step == "ddp",
        share_memory=config.shared_memory == "auto",
        compression=config.grad_compression,
        compile=config.compile,
        cuda_graphs=config.cuda_graphs == "auto",
        precision=config.precision,
        timeout=config.step_timeout,
    )
    step = build_step(state.model, state.optimizer, world, choice)
    job.console.fact("step", step.way)
    course = Course(
        config.epochs, sharding.steps_per_epoch, sharding.samples, world.world_size, state.step
    )
    with job.console.progress(course) as progress:
        while state.epoch < config.epochs:
            epoch, first = state.epoch, state.batch
            clock = EpochClock(step, sharding, first)
            steps = train_epoch(
                step,
                state.scheduler,
                job.dataset.train,
                sharding,
                epoch,
                first,
                config.random_shift,
            )
            if config.profile and epoch == 0 and world.is_main:
                steps = profiled(steps, job.record.directory.path / "profile")
            for loss_sum in steps:
                state.count_step(loss_sum)
                progress.step(state.step, loss_sum)
                meetings.after_step()
            trained = {"train/loss": meetings.end_epoch(), **clock.figures()}
            finish_epoch(job, trained, progress)


def finish_epoch(job: Job, trained: dict[str, float], progress: Progress) -> None:
    """Validate, record, say and save an epoch whose training gave the figures `trained`."""
    config, state = job.config, job.state
    drawn = config.tensorboard == "full" and is_looked_at(state.epoch + 1, config.epochs)
    validation = evaluate(
        state.model, job.dataset.validation, job.world, _DRAWN_MISTAKES if drawn else 0
    )
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
    report(job, result)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the process's exit code."""
    words = sys.argv[1:] if argv is None else argv
    return process.attempt(lambda launch: train(parse_config(words), launch))


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own."""
    process.run(lambda: main(argv))


if __name__ == "__main__":
    run()
