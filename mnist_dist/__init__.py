"""Distributed MNIST training that gives the same numbers at every world size.

What one does with a trained model is here as functions; importing this package is quick, since
they, and torch with them, are imported when they are first used.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_dist.commands.evaluate import evaluate as evaluate
    from mnist_dist.commands.export import export as export
    from mnist_dist.commands.predict import predict as predict
    from mnist_dist.commands.preprocessing import prepare as prepare
    from mnist_dist.commands.runs import list_runs as list_runs
    from mnist_dist.commands.trained_model import load_model as load_model
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
    "load_model": "commands.trained_model",
    "predict": "commands.predict",
    "prepare": "commands.preprocessing",
}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS])
