"""`mnist-dist compare`: how far the losses of real runs differ, and why."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_files import digits, write_pickle
from processes import completed_run, metrics

from mnist_dist.__main__ import main
from mnist_dist.commands.compare import HYPERPARAMETERS
from mnist_dist.config import TrainConfig

SMALL = ["--data=bundled", "--train-samples=200", "--epochs=3", "--lr=0.05"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 1, 2 and 4 processes, of another seed, and of other data. To be read only."""
    directory = tmp_path_factory.mktemp("runs")
    for count in (1, 2, 4):
        completed_run(directory, count, *SMALL)
    own = directory / "own.pkl.gz"
    write_pickle(own, digits(train=300, test=60))
    others = {"seed": [*SMALL, "--seed=1"], "data": [*SMALL[1:], f"--data={own}"]}
    for name, flags in others.items():
        completed_run(directory / "other", 1, *flags).rename(directory / name)
    return directory


def compare(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["compare", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def edited(run: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a run with other values in one of its files."""
    shutil.copytree(run, copy)
    content = json.loads((copy / file).read_text()) | values
    (copy / file).write_text(json.dumps(content))
    return copy


def with_losses(run: Path, copy: Path, change: Any) -> Path:
    """A copy of a run whose metrics.jsonl is what `change` makes of its objects."""
    shutil.copytree(run, copy)
    lines = [json.dumps(record) for record in change(metrics(run))]
    (copy / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return copy


def off(by: float, epoch: int) -> Any:
    """Change the validation loss of one epoch by a relative amount."""

    def change(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for record in records:
            if record["epoch"] == epoch and "val/loss" in record:
                record["val/loss"] *= 1 + by
        return records

    return change


def test_runs_of_1_2_and_4_processes_are_within_the_tolerance(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = compare(capsys, *(runs / f"run-{count}" for count in (1, 2, 4)))
    assert (code, report["within"]) == (0, True)
    assert len(report["pairs"]) == 3
    first = report["pairs"][0]
    assert first["epochs"] == [1, 2, 3]
    assert first["differing"]["world_size"] == [1, 2]
    assert (first["causes"], first["possible_causes"]) == ([], [])
    losses = [[r["val/loss"] for r in metrics(runs / f"run-{n}")[:3]] for n in (1, 2)]
    expected = max(abs(a - b) / max(a, b) for a, b in zip(*losses, strict=True))
    assert first["largest"]["val/loss"]["difference"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("other", "cause"), [("seed", "seed"), ("data", "data")])
def test_another_seed_or_other_data_is_beyond_and_named_as_the_cause(
    other: str, cause: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = compare(capsys, runs / "run-1", runs / other)
    (pair,) = report["pairs"]
    assert (code, pair["first_beyond"], pair["causes"]) == (1, 1, [cause])
    assert main(["compare", str(runs / "run-1"), str(runs / other)]) == 1
    head, _, _, last = capsys.readouterr().out.splitlines()
    assert head == (
        f"{runs / 'run-1'} and {runs / other}: beyond 1e-05 from epoch 1 on, of 3 epochs"
    )
    assert last.split() == ["cause", cause]


@pytest.mark.parametrize(
    "fact", [{"torch": "2.99.0"}, {"git_commit": "a" * 40}, {"gpu": "H100"}, {"code": "b" * 64}]
)
def test_another_version_code_or_device_is_a_possible_cause(
    fact: dict[str, str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_losses(runs / "run-1", tmp_path / "changed", off(1e-3, epoch=2))
    other = edited(changed, tmp_path / "other", "environment.json", **fact)
    code, report = compare(capsys, runs / "run-1", other)
    (pair,) = report["pairs"]
    assert (code, pair["first_beyond"]) == (1, 2)
    assert (pair["causes"], pair["possible_causes"]) == ([], [*fact])
    assert pair["largest"]["val/loss"]["epoch"] == 2


def test_losses_that_differ_without_a_recorded_reason_point_to_the_machine(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_losses(runs / "run-2", tmp_path / "other", off(2e-5, epoch=3))
    assert main(["compare", str(runs / "run-1"), str(other)]) == 1
    assert "mnist-dist doctor --train" in capsys.readouterr().out.splitlines()[-1]
    assert main(["compare", str(runs / "run-1"), str(other), "--rtol=1e-4"]) == 0


def test_settings_that_change_no_number_are_listed_but_no_cause(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"keep_checkpoints": 9, "epochs": 7, "cache_dir": "/elsewhere"}
    changed = with_losses(runs / "run-1", tmp_path / "changed", off(1e-3, epoch=2))
    other = edited(changed, tmp_path / "other", "config.json", **settings)
    _, report = compare(capsys, runs / "run-1", other)
    (pair,) = report["pairs"]
    assert pair["differing"] == {"epochs": [3, 7], "keep_checkpoints": [3, 9]}
    assert pair["causes"] == []
    onecycle = edited(other, tmp_path / "onecycle", "config.json", schedule="onecycle")
    _, report = compare(capsys, runs / "run-1", onecycle)
    assert set(report["pairs"][0]["causes"]) == {"epochs", "schedule"}


def test_every_hyperparameter_counts_as_a_cause() -> None:
    assert {*HYPERPARAMETERS} == {*TrainConfig().hyperparameters(), "data"}


def test_unfinished_and_damaged_runs_are_compared_as_far_as_they_go(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = runs / "run-1"
    cut = with_losses(whole, tmp_path / "cut", lambda records: records[:2])
    (cut / "status.json").write_text(json.dumps({"status": "preempted", "epoch": 2}))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write(f'{{"epoch": 1{"0" * 12}, "val/loss": 1}}\n')
        file.write('{"epoch": 3, "val/lo')
    hole = with_losses(whole, tmp_path / "hole", lambda records: [records[0], records[2]])
    (hole / "config.json").write_text("{")
    (hole / "environment.json").unlink()
    code, report = compare(capsys, whole, cut, hole)
    assert code == 0
    assert [pair["epochs"] for pair in report["pairs"]] == [[1, 2], [1, 3], [1]]
    assert [each["notes"] for each in report["runs"]] == [
        [],
        ["preempted, 2 of 3 epochs", "unreadable lines in metrics.jsonl: 1"],
        ["no losses of epoch 2", "no readable config.json", "no readable environment.json"],
    ]
    assert report["pairs"][1]["differing"] == {}, "nothing is known"
    assert main(["compare", str(whole), str(cut)]) == 0
    assert capsys.readouterr().out.startswith(f"note: {cut}: preempted, 2 of 3 epochs; ")


def test_a_loss_that_is_not_finite_in_one_run_only_is_beyond(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records[1]["val/loss"] = 10**400
        return records

    lost = with_losses(runs / "run-1", tmp_path / "lost", lose)
    also_lost = with_losses(runs / "run-1", tmp_path / "also-lost", lose)
    code, report = compare(capsys, runs / "run-1", lost)
    assert code == 1
    assert report["pairs"][0]["largest"]["val/loss"] == {"difference": None, "epoch": 2}
    assert compare(capsys, lost, also_lost)[0] == 0


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["RUN"]),
        (["one"], ["two or more"]),
        (["one", "one/"], ["one: given twice"]),
        (["one", "gone"], ["gone", "no such directory"]),
        (["one", "file"], ["file", "not a run directory"]),
        (["one", "empty"], ["empty", "not a run directory"]),
        (["one", "young"], ["young", "no finished epoch", "running"]),
        (["one", "later"], ["one and later", "no epoch in common"]),
        (["one", "two", "--rtol=-1"], ["--rtol -1"]),
        (["one", "two", "--rtol=nan"], ["--rtol nan"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str],
    names: list[str],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").symlink_to(runs / "run-1")
    Path("two").symlink_to(runs / "run-2")
    Path("file").touch()
    Path("empty").mkdir()
    Path("young").mkdir()
    Path("young", "status.json").write_text('{"status": "running"}')
    with_losses(runs / "run-1", Path("later"), lambda records: [records[1] | {"epoch": 9}])
    assert main(["compare", *words]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    assert said.out == ""
    for name in names:
        assert name in line


def test_text_out_of_files_cannot_play_tricks_on_the_terminal(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = edited(
        runs / "run-1", tmp_path / "o\x1b[2Jther", "environment.json", torch="\x1b[31m" + "x" * 99
    )
    (other / "status.json").write_text('{"status": "\\u001b[2J"}')
    assert main(["compare", str(runs / "run-1"), str(other)]) == 0
    assert "\x1b" not in capsys.readouterr().out
