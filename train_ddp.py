"""Train the MNIST classifier with DistributedDataParallel on any number of processes.

python train_ddp.py                            one process, no process group
torchrun --nproc_per_node=4 train_ddp.py       four processes on this machine
srun python train_ddp.py                       one process per Slurm task

Every rank runs all of this file; only rank 0 prints and writes files.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

# Before torch, which takes seconds to import: records the parent process to exit with.
from mnist_dist.distributed.launcher import Launch  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from mnist_dist.config import TrainConfig, parse_config
from mnist_dist.distributed.process import run_process, run_rank
from mnist_dist.distributed.sync import RankSync
from mnist_dist.evaluation import evaluate
from mnist_dist.job import Job, open_job
from mnist_dist.model import build_model
from mnist_dist.optimizer import build_optimizer
from mnist_dist.run.console import EpochTimer, Progress
from mnist_dist.run.metrics import EpochPlots
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import global_batches
from mnist_dist.steps import prepare_model, prepare_steps, replay_epoch


def train(config: TrainConfig, launch: Launch) -> None:
    """Run the whole job: set up, train and validate, test."""
    with open_job(config, launch) as job:
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        model = build_model().to(job.world.device)
        optimizer, scheduler = build_optimizer(
            model, config.lr, config.momentum, config.weight_decay, config.schedule, job.total_steps
        )
        state = TrainState(model, optimizer, scheduler, job.hyperparameters)
        job.resume(state)
        if job.is_complete(state):
            return
        sync = job.start_run(state)  # catches signals from here on
        fit(job, state, sync)
        test(job, state, sync)


def fit(job: Job, state: TrainState, sync: RankSync) -> None:
    """Train and validate epoch by epoch, from where the state stands."""
    config, world, split, sharding = job.config, job.world, job.dataset.train, job.sharding
    model = prepare_model(job, state.model)  # --compile, --precision
    if world.world_size > 1 and config.step == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    sampler = DistributedSampler[int](split, world.world_size, world.rank, seed=config.seed)
    with (
        prepare_steps(job, state, model, train_step, sync) as steps,  # DDP's hook, CUDA graphs
        Progress(job.console, config.epochs, sharding, state.step, sync.launches.wait) as progress,
    ):
        while state.epoch < config.epochs:
            sampler.set_epoch(state.epoch)  # a new permutation, the same on every rank
            timer = EpochTimer(sharding, state.batch, steps.all_reduce_seconds)
            if steps.graphs is None:
                batches = global_batches(split, sampler, sharding, state.batch, config.random_shift)
                for images, labels, global_size in batches:
                    scale = torch.full((), world.world_size / global_size, device=world.device)
                    loss = steps.train_step(model, state.optimizer, images, labels, scale)
                    state.step_schedule()
                    state.count_steps(loss)
                    progress.update(state.step, loss)
                    job.sync_if_due(state, sync)  # to stop, save, or fail on a loss of nan
            else:  # --cuda-graphs: many times train_step in one launch
                replay_epoch(job, steps.graphs, sampler, state, sync, progress)
            metrics = {"train/loss": job.sync_epoch(state, sync), **timer.metrics(model)}
            improved = end_epoch(job, state, sync, metrics)
            progress.epoch(state.epoch, state.step, metrics, improved)


def train_step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, scale: Tensor
) -> Tensor:
    """Take one optimizer step on this rank's part of a global batch; return its summed loss.

    DDP averages gradients over the ranks. With `scale` = world size / samples in the global batch,
    the average of the scaled sums is the gradient of the mean loss over the global batch, however
    unequal the parts are; a rank with an empty part contributes zeros.
    """
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    optimizer.zero_grad()
    (scale * loss).backward()
    optimizer.step()
    return loss.detach()


def end_epoch(job: Job, state: TrainState, sync: RankSync, metrics: dict[str, float]) -> bool:
    """Validate on all ranks and return whether this is best.pt; log and save on rank 0."""
    worst = 16 if job.should_log_plots(state.epoch + 1) else 0  # errors to show
    # All-reduces float64 sums without padding, so that every sample counts exactly once.
    validation = evaluate(state.model, job.dataset.validation, job.world, worst, sync.launches.wait)
    improved = state.finish_epoch(validation.loss)
    metrics |= {"val/loss": validation.loss, "val/accuracy": validation.accuracy, "lr": state.lr}
    # Logged before it is saved: a kill in between repeats the epoch and drops its record.
    log(job, state, metrics, job.build_plots(state, validation) if worst else None)
    job.save_checkpoint(state, metrics, best=improved, newest=job.is_save_due(state))
    return improved


def test(job: Job, state: TrainState, sync: RankSync) -> None:
    """Evaluate the weights of best.pt once on the test split, which is used for nothing else."""
    state.model.load_state_dict(job.world.on_main(job.run.load_best)["model"])
    result = evaluate(state.model, job.dataset.test, job.world, wait=sync.launches.wait)
    metrics = {"test/loss": result.loss, "test/accuracy": result.accuracy}
    plots = EpochPlots("test", result.confusion) if job.config.tensorboard == "full" else None
    log(job, state, metrics, plots, {"test/accuracy_by_digit": result.accuracy_by_class})
    job.finish_run(state, result)


def log(
    job: Job,
    state: TrainState,
    metrics: Mapping[str, float],
    plots: EpochPlots | None,
    details: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write one record to TensorBoard and metrics.jsonl, on rank 0."""
    if job.world.is_main_process:
        for tag, value in metrics.items():
            job.run.writer.add_scalar(tag, value, state.step)
        if plots is not None:
            job.run.writer.add_plots(plots, state.step)
        job.run.writer.commit(state.epoch, state.step, details)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns this process's exit code."""
    return run_rank(lambda launch: train(parse_config(argv), launch))


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main` as a process of its own."""
    run_process(lambda: main(argv))


if __name__ == "__main__":
    run()
