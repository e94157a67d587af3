"""Distributed MNIST training with the same results at every world size.

The functions for trained models are imported, with torch, when they are first used, so that
importing this package is fast.
"""

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_dist.commands.evaluate import evaluate as evaluate
    from mnist_dist.commands.export import export as export
    from mnist_dist.commands.loading import load_model as load_model
    from mnist_dist.commands.predict import predict as predict
    from mnist_dist.commands.preprocessing import preprocess_image as preprocess_image
    from mnist_dist.commands.runs import list_runs as list_runs
    from mnist_dist.errors import UserError as UserError

try:
    __version__ = version("mnist-dist")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "unknown"

_FUNCTIONS = {
    "UserError": "errors",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "list_runs": "commands.runs",
    "load_model": "commands.loading",
    "predict": "commands.predict",
    "preprocess_image": "commands.preprocessing",
}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name == "prepare":
        warnings.warn("mnist_dist.prepare is now preprocess_image", DeprecationWarning, 2)
        name = "preprocess_image"
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS])
