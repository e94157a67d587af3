"""`mnist-dist evaluate`: the figures that training reported, whoever computes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_files import digits, write_npz, write_pickle
from processes import Ended, command, completed_run, metrics, run_main, run_ranks

import mnist_dist

DOOR = "mnist_dist.commands.evaluate"


def evaluate(directory: Path, world_size: int, *words: str) -> list[Ended]:
    """The command in each of `world_size` processes of one job."""
    return run_ranks(run_main, world_size, str(directory), list(words), DOOR)


def figures(directory: Path, world_size: int, *words: str) -> dict[str, Any]:
    first, *others = evaluate(directory, world_size, *words, "--json")
    assert first.code == 0, first.err
    assert [other.out + other.err for other in others] == [""] * len(others), "one rank speaks"
    found: dict[str, Any] = json.loads(first.out)
    return found


def assert_as_reported(found: dict[str, Any], run: Path) -> None:
    """The figures are those that training wrote down of the test split."""
    reported = metrics(run)[-1]
    assert found["correct"] / found["count"] == found["accuracy"] == reported["test/accuracy"]
    assert found["loss"] == pytest.approx(reported["test/loss"], rel=1e-6)
    pairs = zip(found["correct_by_digit"], found["count_by_digit"], strict=True)
    assert [right / count for right, count in pairs] == reported["test/accuracy_by_digit"]
    assert sum(found["correct_by_digit"]) == found["correct"]
    assert sum(found["count_by_digit"]) == found["count"]
    assert [sum(row) for row in found["confusion"]] == found["count_by_digit"]
    assert [found["confusion"][n][n] for n in range(10)] == found["correct_by_digit"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_counts_are_those_that_training_reported(
    world_size: int, trained: Path, tmp_path: Path
) -> None:
    found = figures(tmp_path, world_size, str(trained))
    assert_as_reported(found, trained)
    assert (found["count"], found["world_size"]) == (500, world_size)
    assert found["trained_on_this_data"] is True


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_on_full_mnist_the_counts_are_those_that_training_reported(
    world_size: int, trained_on_all: Path, tmp_path: Path
) -> None:
    found = figures(tmp_path, world_size, str(trained_on_all))
    assert_as_reported(found, trained_on_all)
    assert found["count"] == 10_000


def test_under_torchrun_one_process_prints_what_a_person_reads(
    trained: Path, tmp_path: Path
) -> None:
    words = ["torchrun", "--nproc_per_node=2", "-m", "mnist_dist", "evaluate", str(trained)]
    ended = command(tmp_path, *words)
    assert ended.code == 0, ended.err
    model, data, world, test, counts = ended.out.splitlines()
    reported = metrics(trained)[-1]
    right = round(reported["test/accuracy"] * 500)
    assert str(trained / "checkpoints" / "best.pt") in model
    assert "bundled 5,000-digit subset" in data
    assert "2 processes (torchrun), cpu, gloo" in world
    assert f"accuracy {reported['test/accuracy']:.2%}: {right} of 500 digits right" in test
    assert f"0: {round(reported['test/accuracy_by_digit'][0] * 50)}/50" in counts


def test_other_splits_can_be_evaluated_and_train_is_what_the_run_trained_on(
    tmp_path: Path,
) -> None:
    flags = ["--data=bundled", "--train-samples=300", "--epochs=1"]
    run = completed_run(tmp_path, 1, *flags)
    train = figures(tmp_path, 1, str(run), "--split=train")
    assert train["count"] == 300
    assert train["trained_on_this_data"] is True
    validation = figures(tmp_path, 1, str(run), "--split=validation")
    assert validation["accuracy"] == metrics(run)[0]["val/accuracy"]
    assert validation["loss"] == pytest.approx(metrics(run)[0]["val/loss"], rel=1e-6)


def test_any_checkpoint_of_a_run_can_be_named(trained: Path, tmp_path: Path) -> None:
    newest = max((trained / "checkpoints").glob("step_*.pt"))
    saved = json.loads(newest.with_suffix(".json").read_text())
    found = figures(tmp_path, 1, str(newest), "--split=validation")
    assert found["accuracy"] == saved["val/accuracy"]


def test_a_checkpoint_that_was_copied_away_is_as_good_where_its_data_is_named(
    trained: Path, tmp_path: Path
) -> None:
    copy = shutil.copy(trained / "checkpoints" / "best.pt", tmp_path / "mine.pt")
    found = figures(tmp_path, 2, str(copy), "--data=bundled")
    assert_as_reported(found, trained)
    assert mnist_dist.evaluate(copy, data="bundled").accuracy == found["accuracy"]


def test_the_function_gives_the_same_figures(trained: Path) -> None:
    result = mnist_dist.evaluate(trained)
    assert result.accuracy == metrics(trained)[-1]["test/accuracy"]
    assert [sum(row) for row in result.confusion] == [50] * 10


def test_other_data_is_never_taken_for_the_runs_without_a_word(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "mine.npz", digits(train=600, test=20))
    flags = [f"--data={source}", "--epochs=1"]
    run = completed_run(tmp_path, 1, *flags)
    assert figures(tmp_path, 1, str(run))["count"] == 20
    (named,) = evaluate(tmp_path, 1, str(run), "--data=bundled", "--json")
    assert named.code == 0
    (warning,) = named.err.splitlines()
    assert "--data bundled: not the data that" in warning
    assert json.loads(named.out)["trained_on_this_data"] is False
    write_npz(source, digits(train=600, test=30, seed=8))  # now other digits, under the same name
    for ended in evaluate(tmp_path, 2, str(run)):
        assert ended.code == 2
        assert ended.out == ""
        if ended.err:
            (line,) = ended.err.splitlines()
            assert "was trained on other data than what was found" in line
            assert "--data" in line


def test_a_run_keeps_the_bundled_digits_when_other_data_is_found_later(tmp_path: Path) -> None:
    flags = ["--train-samples=100", f"--cache-dir={tmp_path / 'cache'}"]
    run = completed_run(tmp_path, 1, *flags, "--epochs=1")
    write_pickle(tmp_path / "data" / "mnist" / "mnist.pkl.gz", digits(train=600, test=20))
    assert completed_run(tmp_path, 1, *flags, "--epochs=2") == run
    assert_as_reported(figures(tmp_path, 2, str(run)), run)
    assert completed_run(tmp_path, 2, *flags, "--epochs=1") != run
    assert figures(tmp_path, 1, str(tmp_path / "run-2"))["count"] == 20


def test_the_data_of_a_run_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was given a relative path, today and by an older version."""
    source = write_npz(tmp_path / "data" / "mine.npz", digits(train=600, test=20))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = completed_run(tmp_path, 1, "--data=data/mine.npz", "--epochs=1")
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == str(source)
    monkeypatch.chdir(elsewhere)
    today = mnist_dist.evaluate(run)
    assert today.count == 20
    config["data"] = "data/mine.npz"
    (run / "config.json").write_text(json.dumps(config))
    assert mnist_dist.evaluate(run).confusion == today.confusion
    with pytest.raises(
        mnist_dist.UserError, match="split 'tset': use one of train, validation, test"
    ):
        mnist_dist.evaluate(run, split="tset")  # type: ignore[arg-type]
    source.unlink()
    with pytest.raises(
        mnist_dist.UserError, match=r"data/mine\.npz: no such file .*\(the --data in config\.json"
    ):
        mnist_dist.evaluate(run)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such file or directory; use a run directory"),
        (["RUN", "--data=nowhere.npz"], "nowhere.npz"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_from_one_of_two_processes(
    words: list[str], says: str, trained: Path, tmp_path: Path
) -> None:
    given = [str(trained) if word == "RUN" else word for word in words]
    first, second = evaluate(tmp_path, 2, *given)
    assert (first.code, second.code) == (2, 2)
    (line,) = first.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    assert says in line
    assert first.out + second.out + second.err == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN", "--split=all"], "--split"),
        (["RUN", "--jsn"], "--json"),
        ([], "RUN_OR_CHECKPOINT is missing"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    words: list[str], says: str, trained: Path, tmp_path: Path
) -> None:
    given = [str(trained) if word == "RUN" else word for word in words]
    (ended,) = evaluate(tmp_path, 1, *given)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    assert says in line
