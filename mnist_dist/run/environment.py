"""Describe what the results of a run may depend on in addition to its configuration."""

import contextlib
import hashlib
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from mnist_dist import __version__


def code_digest() -> str:
    """Return the SHA-256 (hex) of this package's sources: equal on hosts that run the same code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def environment_facts() -> dict[str, Any]:
    """Describe code, libraries, hardware and command for environment.json."""
    return {
        "mnist_dist": __version__,
        "git_commit": _git_commit(),
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "gpu": _gpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
    }


def _gpu_name() -> str | None:
    """Return the model of this process's GPU; None without one that the driver lets torch use."""
    with contextlib.suppress(RuntimeError):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return None


def _git_commit() -> str | None:
    """Return this checkout's commit, "-dirty" if it was changed; None outside a checkout.

    An installed package or an unpacked archive may lie inside the repository of something else,
    which does not track it.
    """
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git(*describe) or None
    return None


def _git(*words: str) -> str:
    """Run git in this directory. Raises OSError or SubprocessError if it fails."""
    done = subprocess.run(
        ["git", *words],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
