"""Flags, recipes and config files; every mistake is one line that names the flag."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mnist_dist.commands.doctor.config import DoctorConfig
from mnist_dist.commands.evaluate import EvaluateConfig
from mnist_dist.config import RECIPES, TrainConfig, parse_config
from mnist_dist.errors import UserError


def test_defaults_are_the_original_scripts() -> None:
    config = parse_config([])
    assert (config.epochs, config.global_batch_size, config.lr) == (25, 64, 0.001)
    assert (config.momentum, config.weight_decay, config.schedule) == (0.0, 0.0, "constant")
    assert {name: getattr(config, name) for name in RECIPES["baseline"]} == RECIPES["baseline"]


def test_a_recipe_sets_hyperparameters_and_explicit_flags_win_over_it() -> None:
    tuned = RECIPES["tuned"]
    config = parse_config(["--recipe", "tuned"])
    assert {name: getattr(config, name) for name in tuned} == tuned
    before, after = ["--lr", "0.5", "--recipe=tuned"], ["--recipe=tuned", "--lr", "0.5"]
    for argv in (before, after):
        config = parse_config(argv)
        assert (config.lr, config.momentum) == (0.5, tuned["momentum"])


def test_a_saved_config_can_be_given_back_and_flags_win_over_it(tmp_path: Path) -> None:
    first = parse_config(["--recipe=tuned", "--lr=0.5", "--train-samples=100", "--run-dir=a"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(first.to_json()))
    again = parse_config(["--config", str(file)])
    assert again.to_json() == first.to_json()
    assert again.run_dir is None
    changed = parse_config([f"--config={file}", "--lr=0.25", "--train-samples=7"])
    assert (changed.lr, changed.train_samples, changed.momentum) == (0.25, 7, first.momentum)
    assert parse_config([f"--config={file}", "--train-samples=None"]).train_samples is None
    baseline = parse_config([f"--config={file}", "--recipe=baseline"])
    assert (baseline.lr, baseline.momentum) == (0.001, 0.0)


def test_a_recipe_in_a_config_file_yields_to_the_files_own_values(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"recipe": "tuned", "lr": 1}')
    config = parse_config([f"--config={file}"])
    assert config == dataclasses.replace(
        TrainConfig(**RECIPES["tuned"]), recipe="tuned", lr=1.0, config=str(file)
    )
    assert isinstance(config.lr, float)


@pytest.mark.parametrize("backward", ["auto", "autograd"])
def test_backward_in_an_old_config_file_means_the_default_step(
    backward: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"backward": backward, "cuda_graphs": "auto", "lr": 0.5}))
    config = parse_config([f"--config={file}"])
    assert (config.step, config.lr) == ("ddp", 0.5)
    assert "backward" not in config.to_json()
    assert parse_config([f"--config={file}", "--step=manual"]).step == "manual"


def test_flags_may_be_written_with_underscores() -> None:
    config = parse_config(["--run_dir", "a_b", "--global_batch_size=7", "--no-profile"])
    assert (config.run_dir, config.global_batch_size, config.profile) == ("a_b", 7, False)
    assert parse_config(["--profile"]).profile


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--lr", "-1"], ["--lr", "-1", "above 0"]),
        (["--lr=nan"], ["--lr", "nan"]),
        (["--lr=1_0"], ["--lr", "1_0", "number"]),
        (["--epochs=1_0"], ["--epochs", "1_0", "whole number"]),
        (["--lr", "fast"], ["--lr", "'fast'", "number"]),
        (["--global-batch-size", "0"], ["--global-batch-size", "0", "1 or more"]),
        (["--epochs", "x"], ["--epochs", "'x'", "whole number"]),
        (["--epochs"], ["--epochs"]),
        (["--epochs=0"], ["--epochs", "0"]),
        (["--epochs=1000001"], ["--epochs", "1000001", "1000000 or less"]),
        (["--momentum=1"], ["--momentum", "1"]),
        (["--weight-decay=-0.1"], ["--weight-decay", "-0.1"]),
        (["--seed=-1"], ["--seed", "-1"]),
        (["--random-shift=-1"], ["--random-shift", "-1", "0 to 27"]),
        (["--random-shift=28"], ["--random-shift", "28", "0 to 27"]),
        (["--train-samples=0"], ["--train-samples", "0"]),
        (["--keep-checkpoints=0"], ["--keep-checkpoints", "0"]),
        (["--checkpoint-every-epochs=0"], ["--checkpoint-every-epochs", "0"]),
        (["--schedule=cosine"], ["--schedule", "cosine", "onecycle"]),
        (["--recipe=best"], ["--recipe", "best", "tuned"]),
        (["--recipe"], ["--recipe"]),
        (["--backend=nccl", "--device=cpu"], ["--backend", "nccl", "gloo"]),
        (["--sched", "onecycle"], ["--sched", "perhaps you meant --schedule"]),
        (["--epoch", "5"], ["--epoch 5;", "perhaps you meant --epochs;"]),
        (["--datta=x", "--epohs=4"], ["--datta=x", "perhaps you meant --data, --epochs;"]),
        (["--run_dirr=x"], ["--run_dirr=x", "perhaps you meant --run-dir;"]),
        (["--backward=autograd"], ["--backward", "--step ddp"]),
        (["--backward", "auto"], ["--backward", "--step ddp"]),
        (["--step=fast"], ["--step", "fast", "manual"]),
        (["--profile=yes"], ["--profile", "yes"]),
        (["--quick"], ["--quick; --help"]),
        (["stray"], ["stray"]),
        (["--config", ""], ["--config ''", "must not be empty"]),
        (["--data="], ["--data ''", "must not be empty"]),
        (["--config=/nowhere/c.json"], ["--config", "/nowhere/c.json", "No such file"]),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_line_that_names_it(argv: list[str], names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(argv)
    line = str(caught.value)
    assert "\n" not in line
    for name in names:
        assert name in line


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("{", ["not JSON"]),
        ("[1]", ["not a JSON object"]),
        ('{"lrr": 1}', ["'lrr'"]),
        ('{"run_dir": "x"}', ["'run_dir'"]),
        ('{"lr": "quick"}', ["--lr", "quick", "must be a number"]),
        ('{"epochs": -3}', ["--epochs", "-3"]),
        ('{"epochs": 2.5}', ["--epochs", "2.5", "must be a whole number"]),
        ('{"epochs": "25"}', ["--epochs", '"25"', "must be a whole number"]),
        ('{"epochs": true}', ["--epochs", "true", "must be a whole number"]),
        ('{"epochs": null}', ["--epochs", "null", "must be a whole number"]),
        ('{"lr": NaN}', ["--lr", "nan", "above 0"]),
        ('{"lr": 1' + 400 * "0" + "}", ["--lr", "must be a number"]),
        ('{"profile": 1}', ["--profile", "1", "must be true or false"]),
        ('{"schedule": "cosine"}', ["--schedule", "cosine", "use one of constant, onecycle"]),
        ('{"schedule": ["constant"]}', ["--schedule", "use one of constant, onecycle"]),
        ('{"data": 5}', ["--data", "5", "must be a string"]),
        ('{"data": "a\\u0000b"}', ["--data", "a\\u0000b", "null characters"]),
        ('{"data": "\\ud800"}', ["--data", "\\ud800", "lone surrogates"]),
        ('{"epochs": 2, "epochs": 3}', ["'epochs' is given more than once; keep one"]),
        ('{"backward": "by hand"}', ["'backward'"]),
        (10_000 * "[", ["not JSON"]),
    ],
)
def test_a_bad_config_file_is_one_line_that_names_it(
    content: str, names: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        parse_config([f"--config={file}"])
    line = str(caught.value)
    assert "\n" not in line
    for name in [str(file), *names]:
        assert name in line


def test_no_flag_is_a_strict_prefix_of_a_torchrun_flag() -> None:
    """Torchrun takes one, even behind the script, for an ambiguous flag of its own."""
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    kinds = (TrainConfig, EvaluateConfig, DoctorConfig)  # what torchrun starts
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    ours = {f"--{no}{name}" for name in names for no in ("", "no-")}
    ours |= {flag.replace("_", "-") for flag in ours}
    assert len(theirs) > 40
    clashes = [(o, t) for o in ours for t in theirs if t.startswith(o) and t != o]
    assert clashes == []


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name
    assert text.count("(default:") == len(TrainConfig.__dataclass_fields__)
    assert max(map(len, text.splitlines())) <= 80
    groups = ["data", "optimization", "distributed", "checkpoints", "output"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["options", *groups]


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
def test_a_config_file_that_is_no_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"--config {path}: Not a regular file but a FIFO"):
        parse_config([f"--config={path}"])
