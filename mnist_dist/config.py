"""TrainConfig: one frozen dataclass is the command line, the help and the saved config.json."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.errors import UserError
from mnist_dist.files import read_regular
from mnist_dist.flags import check_device, check_value, flag, given_flags

# Where a run lives, not what it computes.
_LARGEST_FILE = 1 << 20  # bytes
_NOT_SAVED = frozenset({"config", "run_dir"})

# Settings of version 0.1.0 with the values that its config.json may hold.
_REMOVED = {"backward": ("auto", "autograd")}

RECIPES: dict[str, dict[str, Any]] = {
    # The hyperparameters of the original single-process script.
    "baseline": {
        "epochs": 25,
        "global_batch_size": 64,
        "lr": 0.001,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "random_shift": 0,
    },
    # The same model, measured by `python -m benchmarks.recipe` (table in docs/performance.md).
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
    """Train the MNIST digit classifier on one or more processes.

    Start it with `python train_ddp.py`, `torchrun --nproc_per_node=N train_ddp.py`
    or `srun python train_ddp.py`. Every flag means the same under all three.
    """

    config: str | None = flag(
        None,
        metavar="FILE",
        help="JSON file with defaults for the flags below, such as the config.json of an earlier "
        "run; --recipe and explicit flags override it, and the value None unsets an optional flag",
    )
    data: str = flag(
        "auto",
        group="data",
        metavar="SOURCE",
        help="training data: an mnist.pkl.gz, an mnist.npz, a directory or zip of IDX files "
        "(MNIST, Fashion-MNIST, KMNIST, QMNIST, EMNIST's digits), `bundled` (5,000 MNIST digits "
        "in the package), or `auto` (the cache, data/mnist/mnist.pkl.gz, a download, or the "
        "bundled digits, in this order)",
    )
    cache_dir: str | None = flag(
        None,
        metavar="DIR",
        unset="$MNIST_DIST_CACHE, or ~/.cache/mnist-dist",
        help="directory for converted data",
    )
    train_samples: int | None = flag(
        None, unset="all", help="number of training samples to use, from the first"
    )
    random_shift: int = flag(
        0,
        metavar="PIXELS",
        help="maximum random shift of the training images, drawn once per global batch",
    )
    recipe: Literal["baseline", "tuned"] = flag(
        "baseline",
        group="optimization",
        help="preset of epochs, global batch size, lr, momentum, weight decay, schedule and random "
        "shift: the original script's (baseline), or one that reaches at least 98.5% test accuracy "
        "on full MNIST (tuned); explicit flags override it",
    )
    epochs: int = flag(25, help="number of passes over the training split")
    global_batch_size: int = flag(
        64,
        help="samples per optimizer step, summed over all processes; the number of processes does "
        "not change the result",
    )
    lr: float = flag(
        0.001, help="learning rate of SGD (the peak learning rate with --schedule onecycle)"
    )
    momentum: float = flag(0.0, help="momentum of SGD, at least 0 and below 1")
    weight_decay: float = flag(0.0, help="weight decay (L2 penalty) of SGD")
    schedule: Literal["constant", "onecycle"] = flag(
        "constant", help="learning rate schedule: constant, or OneCycleLR over the whole run"
    )
    seed: int = flag(0, help="random seed of the initial weights and of the order of samples")
    step: Literal["ddp", "manual"] = flag(
        "ddp",
        help="implementation of the training step: DistributedDataParallel (ddp), or the MLP's "
        "hand-written backward pass on CPUs (manual, see mnist_dist/fast)",
    )
    precision: Literal["fp32", "tf32", "bf16"] = flag(
        "fp32",
        help="precision of matrix products: tf32 (GPUs only) also applies to evaluation, bf16 only "
        "to training; weights and losses stay float32; reduced precision increases the differences "
        "between numbers of processes",
    )
    compile: bool = flag(
        False,
        help="torch.compile the model (with --step ddp; needs a C++ compiler on CPUs); training "
        "continues uncompiled, with a message, if compilation fails",
    )
    cuda_graphs: Literal["auto", "off"] = flag(
        "auto",
        help="launch many training steps on a GPU as one CUDA graph where that works (auto), or "
        "every step separately (off)",
    )
    device: str = flag(
        "auto",
        group="distributed",
        metavar="DEVICE",
        help="device to train on: `cuda` (one GPU per process), `cuda:N` (GPU N, shared by all "
        "processes of a node), `cpu`, or `auto` (cuda if every process has a GPU, else cpu)",
    )
    backend: Literal["auto", "gloo", "nccl"] = flag(
        "auto", help="torch.distributed backend: nccl on GPUs and gloo on CPUs by default"
    )
    shared_memory: Literal["auto", "off"] = flag(
        "auto",
        help="all-reduce between the CPU processes of one node: in shared memory where possible "
        "(auto), or over gloo (off)",
    )
    grad_compression: Literal["none", "bf16", "powersgd"] = flag(
        "none",
        help="gradient compression for slow networks: bf16 (GPUs only) or powersgd; both are "
        "lossy, so results depend on the number of processes and a resume is not exact",
    )
    setup_timeout: float = flag(
        600.0,
        metavar="SECONDS",
        help="abort if the processes cannot connect, or the data is not ready, within this time",
    )
    step_timeout: float = flag(
        120.0,
        metavar="SECONDS",
        help="abort if another process does not respond for this many seconds during training",
    )
    checkpoint_every_epochs: int = flag(
        1, group="checkpoints", help="epochs between checkpoints; the last epoch always has one"
    )
    checkpoint_every_steps: int | None = flag(
        None, help="optimizer steps between additional checkpoints within epochs"
    )
    checkpoint_every_minutes: float | None = flag(
        None, metavar="MINUTES", help="minutes between additional checkpoints within epochs"
    )
    keep_checkpoints: int = flag(
        3, help="number of most recent checkpoints to keep, in addition to best.pt"
    )
    run_dir: str | None = flag(
        None,
        group="output",
        metavar="DIR",
        unset="runs/<timestamp>_<launch id>",
        help="run directory; an unfinished run in it is continued, a finished one is never "
        "overwritten",
    )
    tensorboard: Literal["minimal", "full"] = flag(
        "full",
        help="TensorBoard output: curves, settings and text (minimal), plus plots of the confusion "
        "matrix, the most confident errors and the first-layer weights in epochs 1, 2, 4, 8, ... "
        "and the last (full)",
    )
    profile: bool = flag(
        False,
        help="write a profiler trace of steps 10 to 30 of the first epoch to the run directory",
    )

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json: every setting of the computation, in plain types.

        Paths are absolute, so that a command finds the data of the run from any directory.
        """
        paths = {name: getattr(self, name) for name in ("data", "cache_dir")}
        absolute = {
            name: str(Path(path).expanduser().absolute())
            for name, path in paths.items()
            if path not in (None, "auto", "bundled")
        }
        return self._saved() | absolute

    def to_flags(self) -> dict[str, Any]:
        """Return the values that must be equal on all ranks, by flag."""
        equal = {name: value for name, value in self._saved().items() if name != "cache_dir"}
        return {f"--{name.replace('_', '-')}": value for name, value in equal.items()}

    def _saved(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_SAVED}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings that determine a run's numbers, which a resume must not change.

        More epochs only extend a constant schedule, but change one that depends on the length.
        """
        names = ["global_batch_size", "lr", "momentum", "weight_decay", "schedule", "random_shift"]
        names += ["seed", "train_samples", "grad_compression", "precision"]
        names += ["epochs"] if self.schedule != "constant" else []
        return {name: getattr(self, name) for name in names}

    def hparams(self) -> dict[str, Any]:
        """Return the settings that TensorBoard's table of runs compares."""
        names = ("epochs", "recipe", "data")
        return self.hyperparameters() | {name: getattr(self, name) for name in names}


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line. Precedence: explicit flag, --recipe, --config file, default.

    Raises:
        UserError: one line that names the flag or file, the value and the remedy.
        SystemExit: with code 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--backward" for word in argv):
        raise UserError("--backward: replaced by --step; use --step ddp or --step manual")
    given = given_flags(TrainConfig, argv, "train_ddp.py")
    defaults = _read_config_file(given["config"]) if given.get("config") else {}
    if "recipe" in given:
        defaults |= RECIPES[given["recipe"]]
    config = TrainConfig(**(defaults | given))
    _validate(config)
    return config


def _read_config_file(path: str) -> dict[str, Any]:
    """Read settings from a JSON file and check them as if they were flags.

    Raises:
        UserError: names the file, the setting, its value and the remedy.
    """
    try:
        content = read_regular(Path(path), _LARGEST_FILE)
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}; use the config.json of a run"
        ) from error
    try:
        settings = {
            name: _check_setting(name, value)
            for name, value in _parse_object(content).items()
            if value not in _REMOVED.get(name, ())
        }
        _validate(TrainConfig(**settings))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    return RECIPES.get(settings.get("recipe", ""), {}) | settings


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); use the config.json of a run") from error
    if not isinstance(values, dict):
        raise UserError("not a JSON object; use the config.json of a run")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{max(names, key=names.count)!r} is given more than once; keep one")
    return settings


def _check_setting(name: str, value: Any) -> Any:
    if name not in TrainConfig.__dataclass_fields__.keys() - _NOT_SAVED:
        raise UserError(f"unknown setting {name!r}; remove it from the file")
    try:
        return check_value(TrainConfig, name, value)
    except ValueError as error:
        raise UserError(f"{_flag(name)} {json.dumps(value)}: {error}") from None


def _validate(config: TrainConfig) -> None:
    for name in ("epochs", "global_batch_size", "keep_checkpoints", "checkpoint_every_epochs"):
        _require(config, name, getattr(config, name) >= 1, "must be 1 or more")
    _require(config, "epochs", config.epochs <= 10**6, "must be 1000000 or less")
    _require(config, "lr", 0 < config.lr < math.inf, "must be finite and above 0, such as 0.001")
    _require(config, "momentum", 0 <= config.momentum < 1, "must be at least 0 and less than 1")
    _require(config, "weight_decay", 0 <= config.weight_decay < math.inf, "must be 0 or more")
    _require(config, "random_shift", 0 <= config.random_shift < IMAGE_SIDE, "must be 0 to 27")
    _require(config, "seed", 0 <= config.seed < 2**63, "must be from 0 to 2^63 - 1")
    for name in ("train_samples", "checkpoint_every_steps"):
        value = getattr(config, name)
        _require(config, name, value is None or value >= 1, "must be 1 or more")
    minutes = config.checkpoint_every_minutes
    _require(config, "checkpoint_every_minutes", minutes is None or minutes > 0, "must be above 0")
    for name in ("setup_timeout", "step_timeout"):
        _require(config, name, 1 <= getattr(config, name) < 1e6, "must be 1 to 1000000 seconds")
    for name in ("data", "run_dir", "cache_dir"):
        _require(config, name, getattr(config, name) != "", "give a path or omit the flag")
    check_device(config.device)
    wrong_backend = config.backend == "nccl" and config.device == "cpu"
    _require(config, "backend", not wrong_backend, "nccl needs GPUs; use gloo with --device cpu")


def _require(config: TrainConfig, name: str, ok: bool, remedy: str) -> None:
    if not ok:
        raise UserError(f"{_flag(name)} {getattr(config, name)}: {remedy}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
