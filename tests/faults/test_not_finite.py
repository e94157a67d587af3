"""Weights that are not finite never become a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from processes import Ended, run_job, run_main, run_ranks
from sabotage import FAULTS

SMALL = ["--data=bundled", "--train-samples=192", "--run-dir=run"]


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints, all of which have finite weights."""
    paths = sorted((directory / "run" / "checkpoints").glob("*.pt"))
    states = [torch.load(path, weights_only=True) for path in paths]
    assert all(tensor.isfinite().all() for state in states for tensor in state["model"].values())
    return sorted({state["step"] for state in states})


def assert_failed(directory: Path, ended: Ended, reason: str) -> None:
    assert ended.code == 1
    (line,) = [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]
    assert reason in line
    assert "--lr" in line
    status = json.loads((directory / "run" / "status.json").read_text())
    assert (status["status"], status["resumable"]) == ("failed", False)


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_that_blow_up_in_the_last_step_end_the_run(processes: int, tmp_path: Path) -> None:
    """The loss of that step is of the weights before it, and finite."""
    flags = [*SMALL, "--global-batch-size=192", "--epochs=1", "--lr=1e30"]
    ended, *_ = run_job(tmp_path, processes, *flags)
    assert_failed(tmp_path, ended, "the validation loss after step 1 (epoch 1) is not finite")
    assert saved_steps(tmp_path) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


def test_the_newest_checkpoint_stays_the_one_before(tmp_path: Path) -> None:
    (first,) = run_job(tmp_path, 1, *SMALL, "--epochs=1", "--lr=0.05")
    assert first.code == 0, first.err
    (ended,) = run_ranks(sabotaged, 1, str(tmp_path), [*SMALL, "--epochs=2", "--lr=0.05"])
    assert_failed(tmp_path, ended, "a weight of hidden1.bias after step 6 (epoch 2)")
    assert saved_steps(tmp_path) == [3]


def test_a_checkpoint_within_an_epoch_has_finite_weights(tmp_path: Path) -> None:
    flags = [*SMALL, "--epochs=2", "--global-batch-size=16", "--checkpoint-every-steps=3"]
    (ended,) = run_ranks(sabotaged, 1, str(tmp_path), flags)
    assert_failed(tmp_path, ended, "a weight of hidden1.bias after step 6 (epoch 1)")
    assert saved_steps(tmp_path) == [3]


def sabotaged(directory: str, flags: list[str]) -> Ended:
    FAULTS["infinite_bias"](flags)
    return run_main(directory, flags)
