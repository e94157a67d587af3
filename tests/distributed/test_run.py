"""The files of a run, and how an interrupted run continues."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, completed_run, metrics, run_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from mnist_dist.config import TrainConfig
from mnist_dist.data import find_data, load

SMALL = ["--data=bundled", "--train-samples=400", "--lr=0.05"]
EPOCH_TAGS = {"train/loss", "train/gradient_norm", "val/loss", "val/accuracy", "lr"}
EPOCH_TAGS |= {"perf/samples_per_second", "perf/step_ms", "perf/communication_share"}
TEST_TAGS = {"test/loss", "test/accuracy"}


class Original(nn.Module):
    """The single-process script's own class, as far as its names go."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 128)
        self.hidden2 = nn.Linear(128, 256)
        self.out = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden2(self.hidden1(x).relu()).relu())
        return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three epochs on two processes."""
    directory = tmp_path_factory.mktemp("finished")
    return completed_run(directory, 2, *SMALL, "--epochs=3", "--keep-checkpoints=2")


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def comparable(run: Path) -> list[dict[str, float]]:
    """The records without what depends on the clock."""
    return [
        {k: v for k, v in r.items() if k != "time" and not k.startswith("perf/")}
        for r in metrics(run)
    ]


def newest_model(run: Path) -> dict[str, Tensor]:
    path = max((run / "checkpoints").glob("step_*.pt"))
    model: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return model


def test_metrics_has_an_object_per_epoch_and_one_for_the_test(finished: Path) -> None:
    *epochs, last = metrics(finished)
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 7), (2, 14), (3, 21)]
    for record in epochs:
        assert set(record) == {"epoch", "step", "time", *EPOCH_TAGS}
    assert set(last) >= {"epoch", "step", "time", *TEST_TAGS}
    assert len(last["test/accuracy_by_digit"]) == 10
    times = [r["time"] for r in metrics(finished)]
    assert times == sorted(times)
    assert all(r["lr"] == 0.05 for r in epochs)


def test_tensorboard_and_metrics_agree_point_by_point(finished: Path) -> None:
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= EPOCH_TAGS | TEST_TAGS
    *epochs, last = metrics(finished)
    for tag in EPOCH_TAGS:
        points = [(p.step, p.value) for p in events.Scalars(tag)]
        assert [step for step, _ in points] == [r["step"] for r in epochs]
        assert [value for _, value in points] == pytest.approx([r[tag] for r in epochs], rel=1e-6)
    for tag in TEST_TAGS:
        ((step, value),) = [(p.step, p.value) for p in events.Scalars(tag)]
        assert (step, value) == (last["step"], pytest.approx(last[tag], rel=1e-6))


def test_tensorboard_has_hparams_config_and_environment(finished: Path) -> None:
    events = EventAccumulator(str(finished))
    events.Reload()
    tensors = set(events.Tags()["tensors"])
    assert {"config", "environment", "results", "custom_scalars__config__"} <= tensors
    (environment,) = events.Tensors("environment")
    commit = read(finished / "environment.json")["git_commit"]
    assert f"| git_commit | {commit} |" in environment.tensor_proto.string_val[0].decode()
    metadata = set(events.summary_metadata)
    hparams = {"experiment", "session_start_info", "session_end_info"}
    assert {f"_hparams_/{part}" for part in hparams} <= metadata
    assert len(list(finished.glob("events.out.tfevents.*"))) == 1, "one run, not one per writer"


def test_the_run_directory_says_what_was_run_where_and_how_it_ended(finished: Path) -> None:
    config = read(finished / "config.json")
    assert config["epochs"] == 3
    assert set(config) == set(TrainConfig.__dataclass_fields__) - {"config", "run_dir"}
    environment = read(finished / "environment.json")
    assert (environment["world_size"], environment["backend"]) == (2, "gloo")
    assert environment["torch"] == torch.__version__
    if (ROOT / ".git").exists():
        assert len(environment["git_commit"].removesuffix("-dirty")) == 40
    status = read(finished / "status.json")
    assert (status["status"], status["epoch"], status["step"]) == ("completed", 3, 21)


def test_checkpoints_are_named_by_step_and_pruned(finished: Path) -> None:
    names = {p.name for p in (finished / "checkpoints").iterdir()}
    steps = {"step_00000014.pt", "step_00000014.json", "step_00000021.pt", "step_00000021.json"}
    assert names == steps | {"best.pt", "best.json"}
    saved = torch.load(finished / "checkpoints" / "step_00000021.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (3, 21)
    assert {"model", "optimizer"} <= set(saved)


def test_best_loads_into_the_original_class_and_has_the_reported_accuracy(finished: Path) -> None:
    saved = torch.load(finished / "checkpoints" / "best.pt", weights_only=True)
    model = Original()
    model.load_state_dict(saved["model"], strict=True)
    test = load(find_data("bundled", None)).test
    right = model(test.images.float() / 256).argmax(1) == test.labels
    assert right.double().mean().item() == pytest.approx(metrics(finished)[-1]["test/accuracy"])
    best = min(metrics(finished)[:-1], key=lambda r: r["val/loss"])
    assert saved["epoch"] == best["epoch"]


def test_a_config_given_back_repeats_the_run_exactly(finished: Path, tmp_path: Path) -> None:
    again = completed_run(tmp_path, 2, f"--config={finished / 'config.json'}")
    assert comparable(again) == comparable(finished)
    for name, weight in newest_model(finished).items():
        assert torch.equal(newest_model(again)[name], weight), name


@pytest.mark.parametrize("recipe", ["baseline", "tuned"])
def test_an_interrupted_run_continues_to_the_same_bits(recipe: str, tmp_path: Path) -> None:
    """The second start finds two of four epochs done, as after a crash in the third."""
    flags = [*SMALL, f"--recipe={recipe}", "--epochs=4", "--global-batch-size=50"]
    whole = completed_run(tmp_path / "whole", 2, *flags)
    run = completed_run(tmp_path / "broken", 2, *flags)
    forget_after(run, step=16)
    (ended, _) = run_job(tmp_path, 2, f"--run-dir={run}", *flags)
    assert ended.code == 0, ended.err
    assert "resume at step 16, 2 epochs done" in ended.out
    assert comparable(run) == comparable(whole)
    for name, weight in newest_model(whole).items():
        assert torch.equal(newest_model(run)[name], weight), name
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    assert [p.step for p in events.Scalars("val/loss")] == [8, 16, 24, 32]


def forget_after(run: Path, step: int) -> None:
    """Put a run back to where a crash just before its next checkpoint would have left it.

    metrics.jsonl and the event file keep their later records: the crash came after those.
    """
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    status = read(run / "status.json")
    (run / "status.json").write_text(json.dumps({**status, "status": "running"}))


def test_a_run_continues_at_another_world_size_to_rounding(tmp_path: Path) -> None:
    whole = completed_run(tmp_path, 1, *SMALL, "--epochs=3")
    run = tmp_path / "moved"
    for world_size, epochs in ((3, 1), (1, 2), (2, 3)):
        for ended in run_job(
            tmp_path, world_size, f"--run-dir={run}", *SMALL, f"--epochs={epochs}"
        ):
            assert ended.code == 0, ended.err
    expected = [r["val/loss"] for r in metrics(whole) if "val/loss" in r]
    assert [r["val/loss"] for r in metrics(run) if "val/loss" in r] == pytest.approx(
        expected, rel=1e-5
    )


def test_the_same_command_on_a_finished_run_changes_nothing(finished: Path, tmp_path: Path) -> None:
    def snapshot() -> dict[str, int]:
        files = [p for p in finished.rglob("*") if p.is_file() and p.name != ".lock"]
        return {str(p): p.stat().st_mtime_ns for p in files}

    before = snapshot()
    flags = [*SMALL, "--epochs=3", "--keep-checkpoints=2", f"--run-dir={finished}"]
    (ended,) = run_job(tmp_path, 1, *flags)
    assert ended.code == 0
    assert "already complete" in ended.out
    assert snapshot() == before


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--lr=0.1"], "--lr 0.1"),
        (["--seed=1"], "--seed 1"),
        (["--global-batch-size=32"], "--global-batch-size 32"),
        (["--train-samples=300"], "--train-samples 300"),
        (["--schedule=onecycle"], "--schedule onecycle"),
        (["--random-shift=1"], "--random-shift 1"),
        (["--epochs=2"], "--epochs 2"),
    ],
)
def test_a_run_is_not_continued_with_other_maths(
    flags: list[str], names: str, finished: Path, tmp_path: Path
) -> None:
    before = (finished / "status.json").read_text()
    common = [*SMALL, "--epochs=4", "--keep-checkpoints=2", f"--run-dir={finished}"]
    first, second = run_job(tmp_path, 2, *common, *flags)
    assert (first.code, second.code) == (2, 2)
    (line,) = first.err.splitlines()
    assert names in line
    assert "--run-dir" in line
    assert second.err == ""
    assert (finished / "status.json").read_text() == before


def test_a_failure_is_written_to_status(tmp_path: Path) -> None:
    run = completed_run(tmp_path, 1, *SMALL, "--epochs=1")
    (run / "checkpoints" / "best.pt").unlink()
    (ended,) = run_job(tmp_path, 1, *SMALL, "--epochs=1", f"--run-dir={run}")
    assert ended.code == 0, "a finished run has nothing left to do"
    forget_after(run, step=7)
    (ended,) = run_job(tmp_path, 1, *SMALL, "--epochs=1", f"--run-dir={run}")
    assert ended.code == 2
    assert "best.pt" in ended.err
    assert read(run / "status.json")["status"] == "failed"
    assert "best.pt" in read(run / "status.json")["reason"]


def test_without_a_name_the_run_goes_to_a_new_directory_each_time(tmp_path: Path) -> None:
    for count in (1, 2):
        for ended in run_job(tmp_path, 2, *SMALL, "--epochs=1"):
            assert ended.code == 0, ended.err
        assert len(list((tmp_path / "runs").iterdir())) == count


def test_only_rank_0_speaks(tmp_path: Path) -> None:
    first, second, third = run_job(tmp_path, 3, *SMALL, "--epochs=2")
    assert second.out + second.err + third.out + third.err == ""
    lines = first.out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert "3 processes (torchrun), cpu, gloo" in lines[0]
    assert "bundled 5,000-digit subset" in first.out
    assert any(line.startswith("test ") for line in lines)
    assert first.err == "", "no progress bar where there is no terminal"


def test_losses_in_the_record_are_finite_numbers(finished: Path) -> None:
    for record in metrics(finished):
        for name, value in record.items():
            if not isinstance(value, list):
                assert math.isfinite(value), name
