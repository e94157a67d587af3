"""Edges that a stranger found: closed pipes, half an environment, lost files, tiny data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, Ended, command, completed_run, run_job

from mnist_dist.data import find_data, load

SCRIPT = str(ROOT / "train_ddp.py")
SMALL = ["--data=bundled", "--train-samples=300", "--epochs=3"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run and a copy of it."""
    directory = tmp_path_factory.mktemp("runs")
    shutil.copytree(completed_run(directory, 1, *SMALL), directory / "two")
    return directory


def test_the_first_bundled_samples_hold_every_digit() -> None:
    for split in (find_data("bundled", None), find_data("bundled", None)):
        labels = load(split).first_training_samples(30).train.labels
        assert torch.bincount(labels, minlength=10).tolist() == [3] * 10


def test_fewer_samples_than_processes_train_too(tmp_path: Path) -> None:
    completed_run(tmp_path, 3, "--data=bundled", "--train-samples=1", "--epochs=1")


def test_training_goes_on_when_its_reader_leaves(tmp_path: Path) -> None:
    words = [sys.executable, SCRIPT, *SMALL, "--run-dir=run"]
    with subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.readline()
        job.stdout.close()
        errors = job.stderr.read().decode()
    assert '"completed"' in (tmp_path / "run" / "status.json").read_text(), errors
    assert "Traceback" not in errors


def test_training_completes_without_a_standard_output(tmp_path: Path) -> None:
    ended = shell(tmp_path, f"mnist-dist train {' '.join(SMALL)} --run-dir=run >&-")
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert '"completed"' in (tmp_path / "run" / "status.json").read_text()


def test_help_whose_reader_leaves_is_silent(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        ended = subprocess.run(
            [sys.executable, "-u", SCRIPT, "--help"],
            cwd=tmp_path,
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_half_a_launchers_environment_is_refused_by_name(tmp_path: Path) -> None:
    half = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ended = command(tmp_path, "python", SCRIPT, *SMALL, environment=half)
    assert ended.code == 2
    assert "LOCAL_WORLD_SIZE" in ended.err


@pytest.mark.parametrize("status", ["completed", "running", None])
def test_a_run_without_its_checkpoints_is_not_begun_anew(
    status: str | None, tmp_path: Path
) -> None:
    """Whether it ended, was killed, or lost its status too."""
    run = completed_run(tmp_path, 1, *SMALL)
    for path in (run / "checkpoints").glob("step_*"):
        path.unlink()
    file = run / "status.json"
    file.write_text(file.read_text().replace("completed", status) if status else "{")
    kept = [run / "checkpoints" / "best.pt", run / "metrics.jsonl", file]
    before = [path.read_bytes() for path in kept]
    (ended,) = run_job(tmp_path, 1, f"--run-dir={run}", *SMALL)
    assert ended.code == 2
    assert "has lost its checkpoints" in ended.err
    assert [path.read_bytes() for path in kept] == before


def test_a_lost_best_checkpoint_is_said_at_the_start_and_made_anew(tmp_path: Path) -> None:
    run = completed_run(tmp_path, 2, *SMALL)
    (run / "checkpoints" / "best.pt").unlink()
    more = [*SMALL[:-1], "--epochs=4", f"--run-dir={run}"]
    first, second = run_job(tmp_path, 2, *more)
    assert (first.code, second.code) == (0, 0), first.err
    assert "best.pt" in first.err
    assert torch.load(run / "checkpoints" / "best.pt", weights_only=True)["epoch"] == 4


def test_a_cache_whose_bytes_changed_is_made_anew(tmp_path: Path) -> None:
    import numpy as np
    from data_files import digits, write_npz

    source = write_npz(tmp_path / "mnist.npz", digits(train=600, test=20))
    first = find_data(str(source), tmp_path / "cache")
    images = load(first).train.images.clone()
    assert first.cache_file is not None
    content = np.fromfile(first.cache_file, dtype=np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(first.cache_file)
    again = load(find_data(str(source), tmp_path / "cache"))
    assert torch.equal(again.train.images, images)


def test_a_file_in_the_run_directorys_place_is_named_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    (ended,) = run_job(tmp_path, 1, f"--run-dir={file}", *SMALL)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert f"--run-dir {file}: is a file; use a writable directory" in line
    assert file.read_text() == "mine"


def shell(directory: Path, line: str, **environment: str) -> Ended:
    """A line of the shell, in which `mnist-dist` is this checkout's."""
    function = f'mnist-dist() {{ "{sys.executable}" -m mnist_dist "$@"; }}'
    ended = subprocess.run(
        ["bash", "-c", f"{function}\n{line}"],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("words", "target"),
    [("runs .", "> /dev/full"), ("runs --help", ">&-"), ("--help", "1< /dev/null")],
)
def test_a_result_that_cannot_be_written_is_one_line_and_exit_code_1(
    words: str, target: str, tmp_path: Path
) -> None:
    ended = shell(tmp_path, f"mnist-dist {words} {target}")
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: the result cannot be written to standard output")


@pytest.mark.parametrize(
    ("words", "target"),
    [("compare run-1 two", "> /dev/full"), ("compare run-1 two --json", ">&-")],
)
def test_a_comparison_that_cannot_be_written_is_no_difference_and_no_traceback(
    words: str, target: str, two_runs: Path
) -> None:
    ended = shell(two_runs, f"mnist-dist {words} {target}")
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: the result cannot be written to standard output")


def test_a_link_loop_in_place_of_a_run_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    ended = shell(tmp_path, "mnist-dist compare loop .")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "loop" in line


def test_a_comparison_whose_reader_leaves_is_silent(two_runs: Path) -> None:
    ended = shell(two_runs, "mnist-dist compare run-1 two | true; exit ${PIPESTATUS[0]}")
    assert (ended.code, ended.err) == (0, "")


def test_files_never_get_the_descriptor_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    """Otherwise what a library writes to standard error ends in a checkpoint."""
    code = (
        "import os; from mnist_dist.errors import prepare_streams; prepare_streams();"
        "fd = os.open('file', os.O_CREAT | os.O_WRONLY); os.write(1, b'x'); os.write(2, b'x');"
        "os._exit(fd)"
    )
    line = f'"{sys.executable}" -c "{code}" >&- 2>&- <&-; [ $? -gt 2 ] && [ ! -s file ]'
    assert shell(tmp_path, line).code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_output_cannot_encode_are_printed_as_escapes(
    encoding: str, tmp_path: Path
) -> None:
    directory = tmp_path / "дом\udce9\n\x1b[2J"
    directory.mkdir()
    words = [sys.executable, "-m", "mnist_dist", "runs", str(directory)]
    ended = subprocess.run(
        words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    (line,) = ended.stdout.splitlines()
    assert b"\x1b" not in line
    assert b"\\u0434" in line
