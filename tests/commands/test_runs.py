"""`mnist-dist runs`: a true table of what lies in a directory, whatever lies there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, command, completed_run, metrics

import mnist_dist
from mnist_dist.__main__ import main

SMALL = ["--data=bundled", "--train-samples=200"]


def listed(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["runs", str(directory), "--json"]) == 0
    return {Path(run["path"]).name: run for run in json.loads(capsys.readouterr().out)}


def test_a_completed_run_is_listed_with_what_it_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = completed_run(tmp_path / "runs", 2, *SMALL, "--epochs=3")
    *epochs, last = metrics(run)
    best = min(record["val/loss"] for record in epochs)
    assert listed(tmp_path / "runs", capsys) == {
        "run-2": {
            "path": str(run),
            "status": "completed",
            "data": "bundled, first 200",
            "world_size": 2,
            "epoch": 3,
            "epochs": 3,
            "best_validation_loss": best,
            "test_accuracy": last["test/accuracy"],
        }
    }
    assert main(["runs", str(tmp_path / "runs")]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "run",
        "status",
        "data",
        "processes",
        "epochs",
        "best",
        "val",
        "loss",
        "test",
        "accuracy",
    ]
    assert row.split() == [
        str(run), "completed", "bundled,", "first", "200", "2", "3/3", f"{best:.4f}",
        f"{last['test/accuracy']:.2%}",
    ]  # fmt: skip
    assert mnist_dist.list_runs(run) == mnist_dist.list_runs(tmp_path / "runs")


def test_running_and_killed_runs_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--epochs=100000", f"--run-dir={tmp_path / 'runs' / 'long'}"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train_ddp.py"), *words], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        try:
            next(line for line in job.stdout if line.startswith("epoch"))
            deadline = time.monotonic() + 60
            while not (found := listed(tmp_path / "runs", capsys)["long"])["best_validation_loss"]:
                assert time.monotonic() < deadline
            assert found["status"] == "running"
            assert (found["epochs"], found["test_accuracy"]) == (100_000, None)
        finally:
            job.send_signal(signal.SIGKILL)
    assert listed(tmp_path / "runs", capsys)["long"]["status"] == "killed"


BROKEN = {
    "status-cut": {"status.json": '{"status": "comp'},
    "status-list": {"status.json": "[1, 2]"},
    "status-number": {"status.json": '{"status": 7, "epoch": "many"}'},
    "status-binary": {"status.json": "\x00\xff"},
    "deep": {"status.json": "[" * 100_000},
    "metrics-junk": {
        "status.json": '{"status": "failed", "epoch": 1}',
        "metrics.jsonl": 'junk\n{"val/loss": null}\n{"val/loss": 0.5}\n[3]\n{"val/loss": tru',
        "config.json": '{"epochs": true, "data": 5}',
    },
}


def test_broken_runs_are_listed_and_foreign_things_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, files in BROKEN.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content.encode("latin-1"))
    (tmp_path / "no-status" / "checkpoints").mkdir(parents=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    found = listed(tmp_path, capsys)
    assert set(found) == {*BROKEN, "no-status"}
    junk = found.pop("metrics-junk")
    assert (junk["status"], junk["epoch"], junk["best_validation_loss"]) == ("failed", 1, 0.5)
    assert (junk["epochs"], junk["data"]) == (None, None)
    assert {run["status"] for run in found.values()} == {"unreadable"}
    assert main(["runs", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(BROKEN) + 1


def test_text_out_of_files_cannot_play_tricks_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\x1b[31m\nb").mkdir()
    (tmp_path / "a\x1b[31m\nb" / "status.json").write_text('{"status": "\\u001b[2Jgone\\n"}')
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_an_empty_directory_and_none_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "mnist-dist: error: runs: No such file or directory; use the directory that contains your "
        "runs"
    )
    (tmp_path / "runs").mkdir()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"a-run-with-a-long-name-{number}" / "checkpoints").mkdir(parents=True)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        words = [sys.executable, "-m", "mnist_dist", "runs", str(tmp_path)]
        done = subprocess.run(words, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_usage_names_every_command(tmp_path: Path) -> None:
    said = command(tmp_path, "python", "-m", "mnist_dist", "--help").out
    for name in ("train", "evaluate", "predict", "export", "runs", "compare"):
        assert f"\n  {name} " in said
