"""The flags of `mnist-dist doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mnist_dist.errors import UserError
from mnist_dist.flags import parse_flags


@dataclass(frozen=True)
class DoctorConfig:
    """Check whether processes that are started like this can train together.

    Start it the way you start training: by itself, with `torchrun ... -m mnist_dist doctor` or with
    `srun ... python -m mnist_dist doctor`. Exits with 0 if they can; with 1 if they cannot, and the
    last line of rank 0 gives the reason and the remedy.
    """

    run_dir: str = "runs"
    """Directory that holds your runs. Its disk is measured; nothing is left there."""

    timeout: float = 25.0
    """Seconds for all checks, of which the rendezvous may take three fifths."""

    json: bool = False
    """Print one JSON object instead of text."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As for training."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """As for training."""


def parse(argv: Sequence[str]) -> DoctorConfig:
    """Parse the flags.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
    """
    config = parse_flags(DoctorConfig, argv, "mnist-dist doctor")
    if not 5 <= config.timeout <= 3600:
        raise UserError(f"--timeout {config.timeout:g}: give 5 to 3600 seconds")
    if not config.run_dir:
        raise UserError("--run-dir: give a path, or leave the flag out")
    if config.backend == "nccl" and config.device == "cpu":
        raise UserError("--backend nccl: NCCL needs GPUs; use gloo with --device cpu")
    return config
