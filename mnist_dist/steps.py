"""How a run takes its steps: one by one, by CUDA graphs, or by the manual backward pass."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from mnist_dist.cuda_graphs import GraphSteps, obstacle
from mnist_dist.distributed.ddp import (
    Bfloat16,
    compile_or_explain,
    register_comm_hook,
    settle_buckets,
)
from mnist_dist.distributed.sync import RankSync
from mnist_dist.errors import counted
from mnist_dist.job import Job
from mnist_dist.optimizer import TrainStep
from mnist_dist.run.console import Progress
from mnist_dist.run.profiling import profile_steps
from mnist_dist.run.state import TrainState
from mnist_dist.torch_internals import is_compiled, keep_compiler_out_of_ddp


@dataclass(frozen=True)
class Steps:
    """What takes the steps of a run."""

    train_step: TrainStep
    """Takes one step."""
    graphs: GraphSteps | None
    """Takes many in one launch; None without --cuda-graphs."""
    all_reduce_seconds: Callable[[], float | None]
    """Returns the time this rank has spent in all-reduces so far; None if it is not known."""


def prepare_model(job: Job, model: nn.Module) -> nn.Module:
    """Apply --compile and --precision; return the model to wrap in DDP."""
    config = job.config
    if config.step == "manual":
        return model
    if config.compile:
        model, failure = compile_or_explain(model, job.world)
        if failure:
            job.console.print_field("compile", f"not compiled ({failure})")
    else:
        keep_compiler_out_of_ddp()
    return Bfloat16(model) if config.precision == "bf16" else model


@contextlib.contextmanager
def prepare_steps(
    job: Job, state: TrainState, model: nn.Module, train_step: TrainStep, sync: RankSync
) -> Iterator[Steps]:
    """Choose what takes the steps and what gradients travel over, and print the line `step`.

    Registers the communication hook of `model`, which is what `prepare_model` returned, in DDP if
    there are several ranks; captures `train_step` as CUDA graphs. Every rank must call this.
    """
    config, world = job.config, job.world
    share_memory = config.shared_memory == "auto"
    seconds: Callable[[], float | None]
    if config.step == "manual":
        from mnist_dist.fast import ManualStep

        train_step = manual = ManualStep(
            state.model, state.optimizer, world, share_memory, config.step_timeout
        )
        description, seconds = f"manual backward, {manual.description}", lambda: manual.seconds
    elif isinstance(model, DistributedDataParallel):
        transport, seconds = register_comm_hook(
            model, world, share_memory, config.step_timeout, config.grad_compression
        )
        settle_buckets(model)
        description = ", ".join(["DistributedDataParallel", *_applied(job, model), transport])
    else:
        description, seconds = ", ".join(["single process", *_applied(job, model)]), lambda: None
    graphs, captured = _capture(job, state, model, train_step, sync)
    job.console.print_field("step", description + captured)
    if config.profile and state.step == 0 and world.is_main_process:
        train_step = profile_steps(train_step, job.run.path / "profile")
    world.set_timeout(config.step_timeout)  # compiling and capturing may take longer
    try:
        yield Steps(train_step, graphs, seconds)
    finally:
        if graphs is not None:
            graphs.close()


def _applied(job: Job, model: nn.Module) -> list[str]:
    precision = job.config.precision
    return ["compiled"] * is_compiled(model) + [precision] * (precision != "fp32")


def _capture(
    job: Job, state: TrainState, model: nn.Module, step: TrainStep, sync: RankSync
) -> tuple[GraphSteps | None, str]:
    """Capture `step` as CUDA graphs if all ranks can; return what to add to the description."""
    config, world = job.config, job.world
    if config.cuda_graphs == "off" or world.device.type != "cuda":
        return None, ""
    obstacles = {
        "--profile": config.profile,
        f"--grad-compression {config.grad_compression}": config.grad_compression != "none",
        "gloo works on the CPU": world.backend == "gloo",
    }
    reason = next((text for text, is_there in obstacles.items() if is_there), None)
    reason = reason or obstacle(model, state.optimizer)
    graphs = None
    if reason is None:
        graphs = GraphSteps(
            step,
            model,
            state.optimizer,
            job.dataset.train,
            job.sharding,
            config.random_shift,
            launched=sync.launches.add,
        )
        reasons = world.gather(world.run_on_all(graphs.capture))
        reason = next((text for text in reasons if text is not None), None)
    if graphs is None or reason is not None:
        return None, f", no CUDA graphs: {reason}"
    return graphs, f", CUDA graphs of {counted(graphs.steps_per_launch, 'step')}"


def replay_epoch(
    job: Job,
    graphs: GraphSteps,
    sampler: "DistributedSampler[int]",
    state: TrainState,
    sync: RankSync,
    progress: Progress,
) -> None:
    """Train on the rest of an epoch by CUDA graphs, as train_ddp.py does step by step."""
    graphs.start_epoch(sampler, state.batch)
    while state.batch < job.sharding.steps_per_epoch:
        rates = [state.step_schedule() for _ in range(_steps_until_sync(job, state, sync))]
        losses = graphs.take(rates)
        state.count_steps(losses)
        progress.update(state.step, losses)
        job.sync_if_due(state, sync, len(rates))


def _steps_until_sync(job: Job, state: TrainState, sync: RankSync) -> int:
    """Return the steps until the epoch ends or `Job.sync_if_due` has something to do."""
    every = job.config.checkpoint_every_steps
    until_saved = every - state.step % every if every else sys.maxsize
    return min(job.sharding.steps_per_epoch - state.batch, sync.steps_left, until_saved)
