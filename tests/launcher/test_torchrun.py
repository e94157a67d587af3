"""The job under its real launchers: `torchrun` and plain `python`, as a user types them."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_files import digits, write_npz
from processes import ROOT, Ended, command, free_port, metrics, run_job

SCRIPT = str(ROOT / "train_ddp.py")
SMALL = ["--data=bundled", "--train-samples=300", "--epochs=2"]


def torchrun(
    directory: Path, processes: int, *flags: str, environment: dict[str, str] | None = None
) -> Ended:
    words = ["torchrun", f"--nproc_per_node={processes}", SCRIPT, *flags]
    return command(directory, *words, environment=environment)


def said(ended: Ended) -> list[str]:
    """The lines that are ours, not torchrun's."""
    return [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]


def test_torchrun_trains_to_the_end_and_one_rank_speaks(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 4, *SMALL)
    assert ended.code == 0, ended.err
    assert "4 processes (torchrun), cpu, gloo" in ended.out
    assert ended.out.count("epoch 2/2 ") == 1
    assert said(ended) == []
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "status.json").read_text())["status"] == "completed"
    assert f"run    runs/{run.name}" in ended.out.splitlines()


def test_plain_python_trains_without_a_process_group(tmp_path: Path) -> None:
    ended = command(tmp_path, "python", SCRIPT, *SMALL, "--run-dir=run")
    assert ended.code == 0, ended.err
    assert "1 process, cpu" in ended.out
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("program", ["train_ddp.py", "mnist-dist"])
def test_ctrl_c_while_torch_is_imported_ends_at_once_without_a_word(
    program: str, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).parent / "mnist-dist"), "train"]
    words = [sys.executable, SCRIPT] if program == "train_ddp.py" else command
    with subprocess.Popen(
        [*words, "--data=bundled", "--run-dir=run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as job:
        while "libtorch_cpu" not in Path(f"/proc/{job.pid}/maps").read_text():
            assert job.poll() is None
        job.send_signal(signal.SIGINT)
        output, _ = job.communicate(timeout=60)
    assert (job.returncode, output) == (-signal.SIGINT, b"")
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_is_the_same_job(tmp_path: Path) -> None:
    ended = command(tmp_path, "mnist-dist", "train", *SMALL, "--run-dir=run")
    assert ended.code == 0, ended.err
    assert len(metrics(tmp_path / "run")) == 3
    module = command(tmp_path, "torchrun", "-m", "mnist_dist", "train", *SMALL, "--run-dir=two")
    assert module.code == 0, module.err
    assert command(tmp_path, "mnist-dist", "trian").code == 2


def test_without_full_data_and_network_the_bundled_digits_are_used_and_said_once(
    tmp_path: Path,
) -> None:
    here = {"MNIST_DIST_CACHE": str(tmp_path / "cache")}
    ended = torchrun(tmp_path, 2, "--train-samples=100", "--epochs=1", environment=here)
    assert ended.code == 0, ended.err
    (line,) = said(ended)
    assert "warning" in line
    assert "--data" in line
    assert "bundled 5,000-digit subset" in ended.out
    (better,) = re.findall(r"^better (.*) # ", ended.out, re.MULTILINE)
    assert better.split()[::3] == ["torchrun", "--recipe"]
    assert better.split()[-1] == "tuned"


@pytest.mark.parametrize(
    ("processes", "flags", "names"),
    [
        (4, ["--lr", "-1"], ["--lr", "-1"]),
        (2, ["--data", "/nowhere/mnist.npz"], ["/nowhere/mnist.npz"]),
        (2, ["--data=bundled", "--run-dir=/proc/mnist"], ["--run-dir", "/proc/mnist"]),
    ],
)
def test_a_users_mistake_is_one_line_from_one_of_all_ranks(
    processes: int, flags: list[str], names: list[str], tmp_path: Path
) -> None:
    ended = torchrun(tmp_path, processes, *flags)
    assert ended.code != 0
    (line,) = said(ended)
    for name in names:
        assert name in line
    assert "exitcode  : 2" in ended.err, "torchrun's own report has the code"
    assert 'train_ddp.py", line' not in ended.err, "no traceback through our code"
    assert [p.name for p in tmp_path.iterdir()] == [], "nothing was created"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--global-batch-size", "0"], ["--global-batch-size", "0"]),
        (["--epochs", "x"], ["--epochs", "x"]),
        (["--quick"], ["--quick"]),
        (["--data=bundled", "--run-dir", "file/run"], ["--run-dir", "file/run"]),
        (["--data", "empty"], ["empty"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    flags: list[str], names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    (ended,) = run_job(tmp_path, 1, *flags)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    for name in names:
        assert name in line
    assert ended.out == ""
    assert {p.name for p in tmp_path.iterdir()} == {"file", "empty"}


def test_two_jobs_of_two_ranks_at_once_convert_a_cold_source_once(tmp_path: Path) -> None:
    write_npz(tmp_path / "mnist.npz", digits(train=300, test=20))
    cache = tmp_path / "cache"
    flags = ["--data=mnist.npz", f"--cache-dir={cache}", "--epochs=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    started = time.time()
    jobs = [
        subprocess.Popen(
            [sys.executable, *torchrun, SCRIPT, *flags],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert len(list((tmp_path / "runs").iterdir())) == 2
    (entry,) = cache.glob("*.pt")
    assert entry.stat().st_mtime >= started


DIES_ONCE = """
import os, signal
import train_ddp

end_epoch = train_ddp.end_epoch

def end_epoch_and_die_once(job, *rest):
    improved = end_epoch(job, *rest)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        job.run.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return improved

train_ddp.end_epoch = end_epoch_and_die_once
train_ddp.run()
"""


@pytest.mark.parametrize("has_run_id", [True, False])
def test_a_restart_by_torchrun_finds_its_run_without_a_flag(
    has_run_id: bool, tmp_path: Path
) -> None:
    """Given a port, torchrun has no run id; in torch 2.11 it has none by default."""
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    rendezvous = "--standalone" if has_run_id else f"--master-port={free_port()}"
    launcher = ["torchrun", "--nproc_per_node=1", "--max-restarts=1", rendezvous]
    ended = command(tmp_path, *launcher, str(script), *SMALL)
    assert ended.code == 0, ended.err
    (run,) = (tmp_path / "runs").iterdir()
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 2]
    assert "resume" in ended.out


def test_help_starts_no_process_group_and_names_every_flag(tmp_path: Path) -> None:
    """With the address of a store that does not exist, joining would fail."""
    nowhere = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    nowhere |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "TORCHELASTIC_RUN_ID": "x"}
    ended = command(tmp_path, "python", SCRIPT, "--help", environment=nowhere, timeout=60)
    assert ended.code == 0
    assert "--global-batch-size" in ended.out
    assert list(tmp_path.iterdir()) == []
