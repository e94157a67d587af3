"""Load a trained model by the path of its run or checkpoint."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnist_dist.errors import UserError, printable
from mnist_dist.files import read_json_object
from mnist_dist.model import build_model, state_dict_mismatch
from mnist_dist.run.checkpoint import load_checkpoint

_REMEDY = "use a run directory or a checkpoint of this project"


@dataclass(frozen=True)
class TrainedModel:
    """A model and the metadata of its training. Picklable."""

    model: nn.Module
    """In evaluation mode, on the CPU."""
    checkpoint: Path
    epoch: int | None
    """Epochs of training; None if the file has only weights."""
    data_fingerprint: str | None
    """`Dataset.fingerprint` of the training data."""
    train_samples: int | None
    """Number of training samples; None: all."""
    data: str | None = None
    """The run's --data, if its config.json is found and sound."""
    cache_dir: str | None = None
    """The run's --cache-dir, if its config.json is found."""

    @property
    def description(self) -> str:
        """The checkpoint's path and epoch."""
        age = "" if self.epoch is None else f" (weights of epoch {self.epoch})"
        return f"{self.checkpoint}{age}"


def load_model(path: str | Path) -> nn.Module:
    """Load the model of a checkpoint, or of a run's best epoch.

    Args:
        path: a run directory (its `checkpoints/best.pt` is used) or a checkpoint, with or without
            its sidecar. Nothing in the file is executed.

    Returns:
        The plain model in evaluation mode, on the CPU: (N, 784) float32, byte/256, to (N, 10)
        float32 logits.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is of another model.
    """
    return load_trained(path).model


def load_trained(path: str | Path) -> TrainedModel:
    """Load a model as `load_model`, with the metadata of its training."""
    checkpoint = find_checkpoint(Path(path))
    try:
        saved = load_checkpoint(checkpoint, needs_sidecar=False)
    except UserError as error:
        raise UserError(f"{error}; {_REMEDY}") from error
    # The original script saved only the weights.
    weights = saved.get("model", saved) if isinstance(saved, dict) else None
    identity = saved.get("identity") if isinstance(saved, dict) else None
    identity = identity if isinstance(identity, dict) else {}
    return TrainedModel(
        _model(weights, checkpoint),
        checkpoint,
        _typed(saved, "epoch", int),
        _typed(identity, "data", str),
        _typed(identity, "train_samples", int),
        **_data_of_run(checkpoint),
    )


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a file, or best.pt of the run directory `path`.

    Raises:
        UserError: it is neither.
    """
    path = path.expanduser() if path.parts[:1] == ("~",) else path
    if path.is_file():
        if path.suffix == ".json":
            raise UserError(f"{path}: not a checkpoint (*.pt); {_REMEDY}")
        return path
    if not path.is_dir():
        fault = "not a regular file" if path.exists() else "no such file or directory"
        raise UserError(f"{path}: {fault}; {_REMEDY}")
    for best in (path / "checkpoints" / "best.pt", path / "best.pt"):
        if os.path.lexists(best):
            return best
    steps = sorted((path / "checkpoints").glob("step_*.pt"))
    if steps:
        raise UserError(
            f"{path}: the run has no best.pt yet: no epoch is finished; use a checkpoint, such as "
            f"{steps[-1]}"
        )
    if (path / "status.json").exists() and (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the run has no best.pt: no epoch was finished; use another run")
    raise UserError(f"{path}: not a run directory: it has no checkpoints/best.pt; {_REMEDY}")


def _model(weights: Any, checkpoint: Path) -> nn.Module:
    """Load `weights` into the model. Raises UserError if they do not match."""
    model = build_model()
    weights = _without_prefix(weights, next(iter(model.state_dict())))
    if mismatch := state_dict_mismatch(weights, model):
        raise UserError(
            f"{checkpoint}: does not hold weights of this project's model, {type(model).__name__}: "
            f"{printable(mismatch)}; {_REMEDY}"
        )
    for name, weight in weights.items():
        if weight.layout != torch.strided or weight.is_quantized or weight.is_meta:
            raise UserError(f"{checkpoint}: its {name} is not a dense tensor; {_REMEDY}")
        if not torch.isfinite(weight.float()).all():
            raise UserError(f"{checkpoint}: its {name} has values that are not finite; {_REMEDY}")
    model.load_state_dict(weights)
    return model.eval()


def _without_prefix(weights: Any, name: str) -> Any:
    """Remove a wrapper's prefix, such as DDP's ``module.``, if all names have it.

    Args:
        weights: a state dict, or any other object that a file contained.
        name: one that the model's own state dict has.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        return weights
    prefixes = {key.removesuffix(name) for key in weights if key.endswith(f".{name}")}
    if len(prefixes) != 1 or not all(key.startswith(tuple(prefixes)) for key in weights):
        return weights
    (prefix,) = prefixes
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def _data_of_run(checkpoint: Path) -> dict[str, Any]:
    """Return the data flags in the run's config.json, if it is found."""
    run = checkpoint.absolute().parent.parent
    config = read_json_object(run / "config.json")
    flags = {name: _typed(config, name, str) for name in ("data", "cache_dir")}
    with contextlib.suppress(OSError, ValueError):  # what no path can be
        return {name: _from_run(value, run) for name, value in flags.items() if value}
    return {}


def _from_run(path: str, run: Path) -> str:
    """Find a relative path of an older config.json: from here, or from a directory above the run.

    The data that is found is compared with the run's later.
    """
    places = (place / path for place in (Path(), *run.parents))
    return next((str(found) for found in places if found.exists()), path)


def _typed(values: Any, name: str, kind: type) -> Any:
    """Return the value of `name` if it has the type `kind`, else None."""
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, kind) else None
