"""`mnist-dist evaluate`: exact metrics of a trained model, on any number of processes."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

# Before torch, which takes seconds to import: it records the parent to exit with.
from mnist_dist.distributed.launcher import Launch  # isort: skip

import torch

from mnist_dist import evaluation as engine
from mnist_dist.commands.loading import TrainedModel, load_trained
from mnist_dist.data import DataError, DataLocation, Dataset, find_data, load
from mnist_dist.distributed import process
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError, print_result
from mnist_dist.evaluation import Evaluation
from mnist_dist.flags import argument, flag, parse_flags
from mnist_dist.run.console import Console
from mnist_dist.run.environment import code_digest

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained model on a split, every sample exactly once.

    Any number of processes gives the same results:
    `torchrun --nproc_per_node=2 -m mnist_dist evaluate ...` or
    `srun python -m mnist_dist evaluate ...`.
    """

    model: str = argument(
        metavar="RUN_OR_CHECKPOINT", help="run directory (its best.pt is used) or checkpoint"
    )
    data: str | None = flag(
        None,
        metavar="SOURCE",
        unset="the run's data",
        help="data to evaluate on: `auto`, `bundled` or a path, as for training",
    )
    split: SplitName = flag("test", help="split of the data to evaluate on")
    json: bool = flag(False, help="print one JSON object")
    cache_dir: str | None = flag(
        None,
        metavar="DIR",
        unset="the run's, $MNIST_DIST_CACHE, or ~/.cache/mnist-dist",
        help="directory for converted data",
    )
    device: str = flag(
        "auto", metavar="DEVICE", help="device to evaluate on: auto, cpu, cuda or cuda:N"
    )


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    split: SplitName = "test",
    cache_dir: str | Path | None = None,
) -> Evaluation:
    """Evaluate a trained model on a whole split, in this process, on the CPU.

    The result has no `most_confident_errors`.

    Args:
        model: a run directory (its best.pt is used) or a checkpoint.
        data: "auto", "bundled" or a path, as for training. None: the data of the run, and no other.
        split: "train", "validation" or "test".
        cache_dir: directory for converted data. None: that of the run, or the user's.

    Raises:
        UserError: the model or the data cannot be used, or `data` is None and the data that was
            found is not that of the run.
    """
    if split not in get_args(SplitName):
        raise UserError(f"split {split!r}: use one of {', '.join(get_args(SplitName))}")
    source, cache = (None if path is None else str(path) for path in (data, cache_dir))
    config = EvaluateConfig(str(model), source, split, cache_dir=cache)
    world = World(Launch("none"), torch.device("cpu"), "none")
    return _evaluate(config, world, warnings.warn)[2]


def main(flags: Sequence[str]) -> int:
    """Run the command as one rank of a job; returns the exit code."""
    return process.run_rank(lambda launch: _command(flags, launch))


def run(flags: Sequence[str]) -> NoReturn:
    """Run `main` and exit the process."""
    process.run_process(lambda: main(flags))


def _command(flags: Sequence[str], launch: Launch) -> None:
    config = parse_flags(EvaluateConfig, flags, "mnist-dist evaluate")
    with init_distributed(launch, config.device, "auto") as world:
        console = Console(enabled=world.is_main_process)
        trained, dataset, result = _evaluate(config, world, console.warn)
        if world.is_main_process and config.json:
            print_result(json.dumps(_as_json(trained, dataset, config.split, result, world)))
        elif world.is_main_process:
            print_result(_as_text(trained, dataset, config.split, result, world))


def _as_text(
    trained: TrainedModel, dataset: Dataset, split: str, result: Evaluation, world: World
) -> str:
    counts = zip(result.correct_by_class, result.count_by_class, strict=True)
    return "\n".join(
        [
            f"model  {trained.description}",
            f"data   {dataset.description}",
            f"world  {world.description()}",
            f"{split:6} loss {result.loss:.4f}, accuracy {result.accuracy:.2%}: "
            f"{sum(result.correct_by_class):,} of {result.count:,} digits right",
            "       " + "  ".join(f"{d}: {correct}/{n}" for d, (correct, n) in enumerate(counts)),
        ]
    )


def _evaluate(
    config: EvaluateConfig, world: World, warn: Callable[[str], None]
) -> tuple[TrainedModel, Dataset, Evaluation]:
    """Evaluate on every rank. Only rank 0 needs the checkpoint, every node needs the data."""
    trained = world.on_main(lambda: load_trained(config.model))
    location = world.once_per_host(lambda: _find_data(config, trained))
    for warning in location.warnings:
        warn(warning)
    dataset = world.run_on_all(lambda: load(location))
    if trained.data_fingerprint is not None:
        part = _as_trained(dataset, trained)
        if part.fingerprint == trained.data_fingerprint:
            dataset = part
        else:
            _handle_other_data(config, trained, dataset, warn)
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(config).items()}
    world.check_equal(
        flags | {"the code": code_digest(), "the data": dataset.fingerprint},
        "use the same flags, code and data for every process",
    )
    split = getattr(dataset.to(world.device), config.split)
    return trained, dataset, engine.evaluate(trained.model.to(world.device), split, world)


def _find_data(config: EvaluateConfig, trained: TrainedModel) -> DataLocation:
    cache_dir = trained.cache_dir if config.cache_dir is None else config.cache_dir
    if config.data is not None:
        return find_data(config.data, cache_dir)
    try:
        return find_data(trained.data or "auto", cache_dir)
    except DataError as error:
        raise UserError(
            f"{error.problem} (the --data in config.json of the run of {trained.checkpoint}); "
            "use --data with the path of that data"
        ) from error


def _as_trained(dataset: Dataset, trained: TrainedModel) -> Dataset:
    """Return the data with as many training samples as the run used, if it has that many."""
    samples = trained.train_samples
    usable = samples is not None and 1 <= samples <= len(dataset.train)
    return dataset.first_training_samples(samples) if samples and usable else dataset


def _handle_other_data(
    config: EvaluateConfig, trained: TrainedModel, dataset: Dataset, warn: Callable[[str], None]
) -> None:
    """Warn if the user named data that is not the run's. Raises UserError if none was named."""
    if config.data is not None:
        warn(f"--data {config.data}: not the data that {trained.checkpoint} was trained on")
        return
    cause = "" if trained.data else ": the run's config.json, which names it, is missing or damaged"
    raise UserError(
        f"{trained.checkpoint} was trained on other data than what was found "
        f"({dataset.description}){cause}; use --data with the path of the data to "
        "evaluate on, or bundled"
    )


def _as_json(
    trained: TrainedModel, dataset: Dataset, split: str, result: Evaluation, world: World
) -> dict[str, Any]:
    trained_on = trained.data_fingerprint
    return {
        "checkpoint": str(trained.checkpoint),
        "epoch": trained.epoch,
        "data": dataset.description,
        "data_fingerprint": dataset.fingerprint,
        "trained_on_this_data": trained_on == dataset.fingerprint if trained_on else None,
        "split": split,
        "world_size": world.world_size,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "correct": sum(result.correct_by_class),
        "count": result.count,
        "correct_by_digit": result.correct_by_class,
        "count_by_digit": result.count_by_class,
        "confusion": result.confusion,
    }
