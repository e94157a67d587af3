"""The flags of `mnist-dist doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mnist_dist.errors import UserError
from mnist_dist.flags import flag, parse_flags

_TRAIN_S = 35.0


@dataclass(frozen=True)
class DoctorConfig:
    """Check whether the processes started with this command can train together.

    Start it as you start training: on its own, with
    `torchrun ... -m mnist_dist doctor` or with `srun ... python -m mnist_dist doctor`.
    Exit code 0: they can train together. Exit code 1: they cannot; the last line
    of rank 0 names the problem and the remedy.
    """

    run_dir: str = flag(
        "runs", metavar="DIR", help="directory for runs, whose disk is measured and left unchanged"
    )
    timeout: float = flag(
        25.0,
        metavar="SECONDS",
        help="time limit of all checks, of which the rendezvous may use three fifths; --train adds "
        "35 s",
    )
    train: bool = flag(
        False,
        help="after the checks, train on the bundled digits for a few seconds and compare every "
        "loss with a reference curve",
    )
    precision: Literal["fp32", "tf32", "bf16"] = flag("fp32", help="precision of --train")
    json: bool = flag(False, help="print one JSON object instead of text")
    device: str = flag("auto", metavar="DEVICE", help="device, as for training")
    backend: Literal["auto", "gloo", "nccl"] = flag("auto", help="backend, as for training")


def parse(argv: Sequence[str]) -> DoctorConfig:
    """Parse the flags.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
    """
    config = parse_flags(DoctorConfig, argv, "mnist-dist doctor")
    if not 5 <= config.timeout <= 3600:
        raise UserError(f"--timeout {config.timeout:g}: must be from 5 to 3600 seconds")
    if config.backend == "nccl" and config.device == "cpu":
        raise UserError("--backend nccl: NCCL needs GPUs; use gloo with --device cpu")
    if config.precision == "tf32" and config.device == "cpu":
        raise UserError("--precision tf32: needs a GPU; use fp32, or bf16")
    return replace(config, timeout=config.timeout + _TRAIN_S) if config.train else config
