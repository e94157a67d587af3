"""`mnist-dist evaluate`: exact figures of a trained model, in any number of processes."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

# Before torch, whose import takes seconds: it notes the parent that we are to end with.
from mnist_dist.distributed.launcher import Launch  # isort: skip

import torch
from tyro.conf import FlagCreatePairsOff, Positional, arg

from mnist_dist import evaluation as engine
from mnist_dist.commands.trained_model import TrainedModel, load_trained
from mnist_dist.data import Dataset, load, locate
from mnist_dist.distributed import process
from mnist_dist.distributed.world import World, init_distributed
from mnist_dist.errors import UserError
from mnist_dist.evaluation import Evaluation
from mnist_dist.flags import parse_flags
from mnist_dist.run.console import Console
from mnist_dist.run.environment import code_digest

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained model on every digit of a split, exactly once each.

    Alone, or with the same numbers on more processes: `torchrun --nproc_per_node=2 -m mnist_dist
    evaluate ...`, `srun python -m mnist_dist evaluate ...`.
    """

    model: Annotated[str, Positional, arg(metavar="RUN_OR_CHECKPOINT")]
    """A run's directory (its best.pt is meant), or a checkpoint."""

    data: str | None = None
    """Digits to evaluate on: auto, bundled or a path, as for training. None: those of the run, and
    no others."""

    split: SplitName = "test"
    """Which digits of the data."""

    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object."""

    cache_dir: str | None = None
    """Directory for converted data. None: the run's, else $MNIST_DIST_CACHE, else
    ~/.cache/mnist-dist."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: one GPU per process where there are GPUs, else the CPU."""


@dataclass(frozen=True)
class _Report:
    """Figures, and what they are of."""

    trained: TrainedModel
    dataset: Dataset
    split: SplitName
    evaluation: Evaluation


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    split: SplitName = "test",
    cache_dir: str | Path | None = None,
) -> Evaluation:
    """Evaluate a trained model on a whole split, in this process, on the CPU.

    Args:
        model: a run's directory (its best.pt is meant) or a checkpoint.
        data: "auto", "bundled" or a path, as for training. None: the data of the run, and no other.
        split: "train", "validation" or "test".
        cache_dir: for converted data; None for the run's, else the user's.

    Raises:
        UserError: model or data cannot be used, or without `data` other data than the run's were
            found.
    """
    config = EvaluateConfig(
        str(model), None if data is None else str(data), split, False, _text(cache_dir)
    )
    world = World(Launch("none"), torch.device("cpu"), "none")
    return _evaluate(config, world, warnings.warn).evaluation


def main(flags: Sequence[str]) -> int:
    """The command, as this process's part of a job; returns the process's exit code."""
    return process.run_rank(lambda launch: _command(flags, launch))


def run(flags: Sequence[str]) -> NoReturn:
    """`main` as a process of its own."""
    process.run_process(lambda: main(flags))


def _command(flags: Sequence[str], launch: Launch) -> None:
    config = parse_flags(EvaluateConfig, flags, "mnist-dist evaluate")
    with init_distributed(launch, config.device, "auto") as world:
        console = Console(enabled=world.is_main_process)
        report = _evaluate(config, world, console.warn)
        if config.json:
            console.print(json.dumps(_as_json(report, world)))
            return
        result = report.evaluation
        right, of = _correct_by_digit(result), _count_by_digit(result)
        console.print(f"model  {report.trained.description}")
        console.print(f"data   {report.dataset.description}")
        console.print(f"world  {world.description()}")
        console.print(
            f"{config.split:6} loss {result.loss:.4f}, accuracy {result.accuracy:.2%}: "
            f"{sum(right):,} of {result.count:,} digits right"
        )
        console.print("       " + "  ".join(f"{n}: {right[n]}/{of[n]}" for n in range(len(of))))


def _evaluate(config: EvaluateConfig, world: World, warn: Callable[[str], None]) -> _Report:
    """Every rank's part. Rank 0 alone needs the checkpoint, each host needs the data."""
    trained = world.on_main(lambda: load_trained(config.model))
    data = trained.data if config.data is None else config.data
    cache_dir = trained.cache_dir if config.cache_dir is None else config.cache_dir
    located = world.once_per_host(lambda: locate(data, cache_dir))
    for warning in located.warnings:
        warn(warning)
    dataset = world.run_on_all(lambda: load(located))
    if trained.data_fingerprint is not None:
        whole, dataset = dataset, _as_trained(dataset, trained)
        if dataset.fingerprint != trained.data_fingerprint:
            dataset = whole
            _other_data(config, trained, dataset, warn)
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(config).items()}
    world.check_equal(
        flags | {"the code": code_digest(), "the data": dataset.fingerprint},
        "give every process the same flags, code and data",
    )
    split = getattr(dataset.to(world.device), config.split)
    result = engine.evaluate(trained.model.to(world.device), split, world)
    return _Report(trained, dataset, config.split, result)


def _as_trained(dataset: Dataset, trained: TrainedModel) -> Dataset:
    """With as many training samples as the run used, where there are so many."""
    samples = trained.train_samples
    usable = samples is not None and 1 <= samples <= len(dataset.train)
    return dataset.first_training_samples(samples) if samples and usable else dataset


def _other_data(
    config: EvaluateConfig, trained: TrainedModel, dataset: Dataset, warn: Callable[[str], None]
) -> None:
    """Data that the user named may be others than the run's; ours to find are only those."""
    if config.data is not None:
        warn(f"--data {config.data}: not the data that {trained.checkpoint} was trained on")
        return
    raise UserError(
        f"{trained.checkpoint} was trained on other data than what was found "
        f"({dataset.description}); give --data with the path of its data, or of others on purpose"
    )


def _as_json(report: _Report, world: World) -> dict[str, Any]:
    result, trained = report.evaluation, report.trained
    same = trained.data_fingerprint and trained.data_fingerprint == report.dataset.fingerprint
    return {
        "checkpoint": str(trained.checkpoint),
        "epoch": trained.epoch,
        "data": report.dataset.description,
        "data_fingerprint": report.dataset.fingerprint,
        "trained_on_this_data": None if same is None else bool(same),
        "split": report.split,
        "world_size": world.world_size,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "correct": sum(_correct_by_digit(result)),
        "count": result.count,
        "correct_by_digit": _correct_by_digit(result),
        "count_by_digit": _count_by_digit(result),
        "confusion": result.confusion,
    }


def _correct_by_digit(result: Evaluation) -> list[int]:
    return [row[digit] for digit, row in enumerate(result.confusion)]


def _count_by_digit(result: Evaluation) -> list[int]:
    return [sum(row) for row in result.confusion]


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
