"""launch/'s scripts as bash and shellcheck read them, and those that need no cluster as typed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from processes import ROOT, command, metrics

SCRIPTS = sorted(
    script for script in (ROOT / "launch").iterdir() if script.suffix in (".sh", ".sbatch")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_and_shellcheck_find_nothing_wrong(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", "-P", "launch", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_local_sh_trains_and_passes_flags_on(tmp_path: Path) -> None:
    words = ["--data=bundled", "--train-samples=100", "--epochs=1", "--run-dir=run with a blank"]
    ended = command(
        tmp_path, str(ROOT / "launch" / "local.sh"), *words, environment={"PROCESSES": "3"}
    )
    assert ended.code == 0, ended.err
    assert "world  3 processes (torchrun)" in ended.out
    assert metrics(tmp_path / "run with a blank")[0]["epoch"] == 1


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["n1:65536", "1", "0"], "port 65536: must be 1 to 65535"),
        (["n1:29400", "0", "0"], "NODES 0: must be 1 or more"),
        (["n1:29400", "3:2", "0"], "NODES 3:2: must be 1 or more"),
        (["n1:29400", "2", "2"], "NODE_RANK 2: must be 0 to 1"),
        (["n1:29400", "1:2", "02"], "NODE_RANK 02: must be 0 to 1"),
        (["n1:29400", "2", "1"], "PROCESSES=two: must be a number above 0"),
    ],
)
def test_numbers_that_host_sh_cannot_use_are_one_line(
    words: list[str], fault: str, tmp_path: Path
) -> None:
    script = str(ROOT / "launch" / "host.sh")
    ended = command(tmp_path, script, *words, environment={"PROCESSES": "two"})
    (line,) = ended.err.splitlines()
    assert ended.code == 2
    assert line.startswith(f"mnist-dist: error: {fault}")


def test_local_sh_refuses_a_number_of_processes_that_is_none(tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "local.sh")
    ended = command(tmp_path, script, environment={"PROCESSES": "0"})
    assert ended.code == 2
    assert ended.err.startswith("mnist-dist: error: PROCESSES=0: must be a number above 0")


@pytest.mark.parametrize("words", [[], ["n1:29400"], ["n1", "2", "0"], ["n1:29400", "two", "0"]])
def test_host_sh_says_its_usage_for_arguments_that_are_none(
    words: list[str], tmp_path: Path
) -> None:
    ended = command(tmp_path, str(ROOT / "launch" / "host.sh"), *words)
    assert ended.code == 2
    assert ended.err.startswith("launch/host.sh HEAD:PORT NODES NODE_RANK")
