"""A run of version 0.1.0 is listed, evaluated, exported, continued and extended."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from processes import Ended, command, metrics, run_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mnist_dist

ARCHIVE = Path(__file__).parent / "run-0.1.0.tar.xz"

# Training and validation loss of each epoch: the first from the run, the others from 0.1.0 as it
# continued the run.
LOSSES = [
    (2.3251676321029664, 2.2944590039253234),
    (2.2635645389556887, 2.2721072273254395),
    (2.2095746278762816, 2.2345175137519835),
    (2.089863860607147, 2.1813396186828613),
    (1.9045198082923889, 2.061762922942638),
    (1.5779655933380128, 1.9133965960741044),
]
TEST_LOSS_AFTER_4_EPOCHS, TEST_LOSS_AFTER_6_EPOCHS = 2.1691422448158266, 1.880373094201088


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def successful(ended: Ended) -> str:
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def mnist_dist_command(directory: Path, *words: str) -> str:
    return successful(command(directory, "python", "-m", "mnist_dist", *words))


def assert_recorded(run: Path, epochs: int, test_loss: float) -> None:
    """Every epoch once, with the losses of 0.1.0, in metrics.jsonl and TensorBoard; a test."""
    recorded = [record for record in metrics(run) if "val/loss" in record]
    assert [record["epoch"] for record in recorded] == list(range(1, epochs + 1))
    losses = [(record["train/loss"], record["val/loss"]) for record in recorded]
    assert losses == [pytest.approx(pair, rel=1e-5) for pair in LOSSES[:epochs]]
    points = EventAccumulator(str(run)).Reload().Scalars("val/loss")
    assert [point.step for point in points] == [record["step"] for record in recorded]
    assert [point.value for point in points] == pytest.approx([v for _, v in losses], rel=1e-5)
    assert metrics(run)[-1]["test/loss"] == pytest.approx(test_loss, rel=1e-5)
    assert json.loads((run / "status.json").read_text())["status"] == "completed"


def test_the_archive_is_a_run_interrupted_in_its_second_epoch(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert (config["backward"], config["cuda_graphs"]) == ("auto", "auto")
    saved = torch.load(run / "checkpoints" / "step_00000012.pt", weights_only=True)
    assert (saved["epoch"], saved["batch"]) == (1, 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_continued_to_its_end_and_extended_with_the_losses_of_its_own_version(
    world_size: int, run: Path
) -> None:
    flags = ["--config=run/config.json", "--run-dir=run"]
    first = run_job(run.parent, world_size, *flags)[0]
    assert "resume at step 12, 1 epoch done" in successful(first)
    assert_recorded(run, 4, TEST_LOSS_AFTER_4_EPOCHS)
    first = run_job(run.parent, world_size, *flags, "--epochs=6")[0]
    assert "resume at step 40, 4 epochs done" in successful(first)
    assert_recorded(run, 6, TEST_LOSS_AFTER_6_EPOCHS)
    config = json.loads((run / "config.json").read_text())
    assert (config["step"], config["epochs"], "backward" in config) == ("ddp", 6, False)


def test_it_is_continued_by_the_manual_step_too(run: Path) -> None:
    flags = ["--config=run/config.json", "--run-dir=run", "--step=manual"]
    successful(run_job(run.parent, 1, *flags)[0])
    assert_recorded(run, 4, TEST_LOSS_AFTER_4_EPOCHS)


def test_other_hyperparameters_are_refused_by_the_name_of_the_flag(run: Path) -> None:
    flags = ["--config=run/config.json", "--run-dir=run", "--momentum=0.5"]
    (ended,) = run_job(run.parent, 1, *flags)
    assert ended.code == 2
    assert "--momentum" in ended.err


def test_it_is_listed(run: Path) -> None:
    (listed,) = json.loads(mnist_dist_command(run.parent, "runs", "run", "--json"))
    assert listed == {
        "path": "run",
        "status": "preempted",
        "data": "bundled, first 20",
        "world_size": 1,
        "epoch": 1,
        "epochs": 4,
        "best_validation_loss": LOSSES[0][1],
        "test_accuracy": None,
    }


def test_it_is_evaluated_on_its_own_data(run: Path) -> None:
    words = ["evaluate", "run", "--split=validation", "--json"]
    found = json.loads(mnist_dist_command(run.parent, *words))
    assert found["loss"] == pytest.approx(LOSSES[0][1], rel=1e-5)
    assert (found["correct"], found["count"], found["trained_on_this_data"]) == (57, 500, True)


def test_it_is_exported(run: Path) -> None:
    mnist_dist_command(run.parent, "export", "run", "--format=torch")
    exported = torch.export.load(run / "checkpoints" / "best.pt2").module()
    images = torch.rand(3, 784)
    expected = mnist_dist.load_model(run)(images)
    torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
