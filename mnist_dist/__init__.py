"""Distributed MNIST training that gives the same numbers at every world size."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mnist-dist")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "unknown"
