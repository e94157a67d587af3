"""TrainConfig: one frozen dataclass is the command line, the help and the saved config.json."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mnist_dist.errors import UserError
from mnist_dist.flags import parse_flags

# Flags that say where a run lives, not what it computes: they stay out of config.json.
_NOT_SAVED = frozenset({"config", "run_dir"})

RECIPES: dict[str, dict[str, Any]] = {
    # The original single-process script, number for number.
    "baseline": {
        "epochs": 25,
        "global_batch_size": 64,
        "lr": 0.001,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "random_shift": 0,
    },
    # Same model, found by `python -m benchmarks.recipe` (docs/performance.md has its table).
    "tuned": {
        "epochs": 15,
        "global_batch_size": 128,
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "onecycle",
        "random_shift": 1,
    },
}


@dataclass(frozen=True)
class TrainConfig:
    """Train the MNIST digit classifier on as many processes as it is started with.

    Start it with `python train_ddp.py`, `torchrun --nproc_per_node=N train_ddp.py` or
    `srun python train_ddp.py`; every flag means the same under all three.
    """

    data: str = "auto"
    """Digits to train on. auto: the cache, else data/mnist/mnist.pkl.gz, else one download, else
    the 5,000 digits in the package. bundled: those 5,000. Or the path of a mnist.pkl.gz, of a
    mnist.npz, or of a directory of IDX files (MNIST, Fashion-MNIST, KMNIST)."""

    cache_dir: str | None = None
    """Directory for converted data. None: $MNIST_DIST_CACHE, else ~/.cache/mnist-dist."""

    train_samples: int | None = None
    """Train on the first N samples of the training split only. None: all of them."""

    epochs: int = 25
    """Passes over the training split."""

    global_batch_size: int = 64
    """Samples in one optimizer step, summed over all processes: the number of processes does not
    change what is computed."""

    lr: float = 0.001
    """Learning rate of SGD (with --schedule onecycle: its peak)."""

    momentum: float = 0.0
    """Momentum of SGD, from 0 up to but not including 1."""

    weight_decay: float = 0.0
    """L2 penalty of SGD."""

    schedule: Literal["constant", "onecycle"] = "constant"
    """Learning rate over the run: constant, or one rise and fall (OneCycleLR)."""

    random_shift: int = 0
    """Largest shift of the training images, in pixels: each global batch is moved up or down and
    left or right by a random amount up to this. 0: images as they are."""

    seed: int = 0
    """Seed of the initial weights and of every epoch's order."""

    recipe: Literal["baseline", "tuned"] = "baseline"
    """Values for epochs, batch, lr, momentum, weight decay, schedule and random shift. baseline:
    the original script's. tuned: 98.5 percent right on full MNIST, or better. Flags given beside
    it win over it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: one GPU per process where there are GPUs, else the CPU."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """How processes talk. auto: nccl on GPUs, gloo on CPUs."""

    shared_memory: Literal["auto", "off"] = "auto"
    """How CPU processes of one host add up their gradients. auto: in memory they share, where they
    can. off: by the backend, as between hosts."""

    step: Literal["ddp", "manual"] = "ddp"
    """Training step."""

    cuda_graphs: Literal["auto", "off"] = "auto"
    """Launch the kernels of a step's gradients on a GPU as one. auto: with --backward auto, if a
    trial gives autograd's gradients; else says why not. off: one by one, by autograd."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products. tf32 (on GPUs, also in the run's own validation and test) rounds their
    factors to 10 bits, bf16 (in training, by autograd) to 7; weights, losses and sums stay float32.
    The numbers are then less alike at different numbers of processes."""

    compile: bool = False
    """Let torch.compile turn the model into code of its own (with --backward autograd; needs a C++
    compiler on CPUs). Falls back, and says why, where that fails."""

    grad_compression: Literal["none", "bf16", "powersgd"] = "none"
    """What processes send each other, for slow networks. bf16 (on GPUs) and powersgd lose digits:
    the numbers then depend on the number of processes, and a resume is no longer exact."""

    profile: bool = False
    """Write a trace of the first epoch's steps 10 to 30 to the run directory, for TensorBoard's
    profiler plugin or Perfetto."""

    run_dir: str | None = None
    """Directory of this run. An unfinished run there is continued, a finished one is kept. None:
    runs/<timestamp>_<launch id>."""

    tensorboard: Literal["minimal", "full"] = "full"
    """What to write for TensorBoard. minimal: curves, settings and texts. full: also plots of the
    confusion matrix, the most confident errors and the weights, in epochs 1, 2, 4, 8 ... and the
    last."""

    checkpoint_every_epochs: int = 1
    """Epochs between checkpoints (the last epoch always has one)."""

    checkpoint_every_steps: int | None = None
    """Optimizer steps between checkpoints within an epoch. None: at ends of epochs only."""

    checkpoint_every_minutes: float | None = None
    """Minutes between checkpoints, whatever the step. None: at ends of epochs only."""

    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside best.pt."""

    setup_timeout: float = 600.0
    """Seconds for the processes to meet, and for one to prepare data while the others wait."""

    step_timeout: float = 120.0
    """Seconds after which a process that waits for another in training gives it up."""

    config: str | None = None
    """JSON file with values for these flags, such as config.json of an earlier run. Flags given
    beside it win over it."""

    def to_json(self) -> dict[str, Any]:
        """What config.json holds: every setting that says what is computed, in plain types."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_SAVED}

    def to_flags(self) -> dict[str, Any]:
        """What every process must have been given alike, by the flag's name."""
        alike = {name: value for name, value in self.to_json().items() if name != "cache_dir"}
        return {f"--{name.replace('_', '-')}": value for name, value in alike.items()}

    def hyperparameters(self) -> dict[str, Any]:
        """The settings that decide every number of a run: a resume must have the same.

        More epochs only extend a constant schedule, but stretch one that depends on the length.
        """
        names = ["global_batch_size", "lr", "momentum", "weight_decay", "schedule", "random_shift"]
        names += ["seed", "train_samples", "grad_compression", "precision"]
        names += ["epochs"] if self.schedule != "constant" else []
        return {name: getattr(self, name) for name in names}

    def hparams(self) -> dict[str, Any]:
        """The settings by which a table of runs tells one from another."""
        return self.hyperparameters() | {
            name: getattr(self, name) for name in ("epochs", "recipe", "data")
        }


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Read the command line. Precedence: flag, --recipe, --config file, default.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
        SystemExit: with code 0 after --help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--recipe")
    try:
        known, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:  # a flag without its value: the full parser says it better
        known = argparse.Namespace(config=None, recipe=None)
    earlier = _flags_of_file(Path(known.config)) if known.config else []
    if known.recipe in RECIPES:
        earlier += _as_flags(RECIPES[known.recipe])
    config = parse_flags(TrainConfig, [*earlier, *argv], "train_ddp.py")
    _validate(config)
    return config


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags


def _flags_of_file(path: Path) -> list[str]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; give the config.json of a run"
        ) from error
    except ValueError as error:
        raise UserError(
            f"--config {path}: not JSON ({error}); give the config.json of a run"
        ) from error
    allowed = {field.name for field in dataclasses.fields(TrainConfig)} - _NOT_SAVED
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: not a JSON object; give the config.json of a run")
    if unknown := sorted(set(values) - allowed):
        raise UserError(f"--config {path}: unknown setting {unknown[0]!r}; remove it from the file")
    for field in dataclasses.fields(TrainConfig):
        if values.get(field.name, 0) is None and field.default is not None:
            raise UserError(f"--config {path}: {field.name} is null; give it a value or remove it")
    try:
        flags = _as_flags(values)
        _validate(parse_flags(TrainConfig, flags, "train_ddp.py"))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    return flags


def _validate(config: TrainConfig) -> None:
    for name in ("epochs", "global_batch_size", "keep_checkpoints", "checkpoint_every_epochs"):
        _require(config, name, getattr(config, name) >= 1, "give 1 or more")
    _require(config, "epochs", config.epochs <= 10**6, "give 1000000 or fewer")
    _require(config, "lr", 0 < config.lr < math.inf, "give a number above 0, such as 0.001")
    _require(config, "momentum", 0 <= config.momentum < 1, "give a number from 0 up to below 1")
    _require(config, "weight_decay", 0 <= config.weight_decay < math.inf, "give 0 or more")
    _require(config, "random_shift", 0 <= config.random_shift < 28, "give 0 to 27 pixels")
    _require(config, "seed", 0 <= config.seed < 2**63, "give a whole number from 0 to 2^63 - 1")
    for name in ("train_samples", "checkpoint_every_steps"):
        value = getattr(config, name)
        _require(config, name, value is None or value >= 1, "give 1 or more")
    minutes = config.checkpoint_every_minutes
    _require(config, "checkpoint_every_minutes", minutes is None or minutes > 0, "give more than 0")
    for name in ("setup_timeout", "step_timeout"):
        _require(config, name, 1 <= getattr(config, name) < 1e6, "give 1 to 1000000 seconds")
    for name in ("data", "run_dir", "cache_dir"):
        _require(config, name, getattr(config, name) != "", "give a path, or leave the flag out")
    wrong_backend = config.backend == "nccl" and config.device == "cpu"
    _require(config, "backend", not wrong_backend, "nccl needs GPUs; use gloo with --device cpu")


def _require(config: TrainConfig, name: str, ok: bool, remedy: str) -> None:
    if not ok:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {getattr(config, name)}: {remedy}")
