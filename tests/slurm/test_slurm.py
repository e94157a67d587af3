"""launch/'s sbatch scripts on a real Slurm of two nodes."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from private_slurm import Cluster, missing
from processes import ROOT, completed_run, metrics
from slurm_jobs import Job

SHORT = ["--data=bundled", "--train-samples=800", "--lr=0.02", "--epochs=2"]
LONG = ["--data=bundled", "--train-samples=2000", "--lr=0.001", "--global-batch-size=4"]
LONG += ["--epochs=4", "--checkpoint-every-steps=50"]
SCRIPTS = ["slurm_single_node.sbatch", "slurm_multi_node.sbatch", "slurm_srun.sbatch"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        started = Cluster(Path(directory))
        try:
            yield started
        finally:
            started.stop()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project as a user has it: jobs run in it and leave their runs there."""
    for name in ("mnist_dist", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", tmp_path)
    return tmp_path


@cache
def undisturbed(*flags: str) -> float:
    """The final validation loss of one process that nobody disturbs."""
    run = completed_run(Path(tempfile.mkdtemp()), 1, *flags)
    return float([r["val/loss"] for r in metrics(run) if "val/loss" in r][-1])


def require_undisturbed_end(job: Job, *flags: str) -> None:
    """It completed, in one run directory, with every step once and the loss of one process."""
    assert job.status["status"] == "completed", job.output
    assert job.final_loss() == pytest.approx(undisturbed(*flags), rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_completes_with_the_loss_of_one_process(
    script: str, cluster: Cluster, checkout: Path
) -> None:
    job = Job(cluster, checkout, script, *SHORT)
    job.until("COMPLETED")
    require_undisturbed_end(job, *SHORT)
    assert len(list((checkout / "runs").iterdir())) == 1
    assert len(list(job.run.glob("events.out.tfevents.*"))) == 1
    processes = 2 if script == "slurm_single_node.sbatch" else 4
    assert f"world  {processes} processes" in job.output


@pytest.mark.parametrize("script", ["slurm_multi_node.sbatch", "slurm_srun.sbatch"])
def test_the_time_limits_warning_saves_and_the_requeued_job_completes(
    script: str, cluster: Cluster, checkout: Path
) -> None:
    job = Job(cluster, checkout, script, *LONG)
    job.until_saved()
    cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.until("COMPLETED")
    assert "stopped: SIGTERM at step" in job.output
    assert "requeued: restart 1 of at most 10" in job.output
    assert job.restarts == 1
    require_undisturbed_end(job, *LONG)


def test_an_administrators_requeue_continues_the_same_run(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", *LONG)
    job.until_saved()
    cluster.ask("scontrol", "requeue", job.id)
    job.until("COMPLETED")
    assert "stopped: SIGTERM at step" in job.output
    assert job.restarts == 1
    require_undisturbed_end(job, *LONG)


@pytest.mark.parametrize("script", ["slurm_single_node.sbatch", "slurm_srun.sbatch"])
def test_a_preempted_job_saves_in_its_grace_and_continues_when_the_other_is_done(
    script: str, cluster: Cluster, checkout: Path
) -> None:
    job = Job(cluster, checkout, script, *LONG, sbatch="--partition=low --exclusive --nodes=2")
    job.until_saved()
    urgent = cluster.ask(
        *["sbatch", "--parsable", "--exclusive", "--nodes=2", "--output=/dev/null"],
        *["--partition=main", "--wrap=sleep 1"],
    )
    assert urgent
    job.until("COMPLETED")
    assert "stopped: SIGTERM at step" in job.output
    assert job.restarts >= 1
    require_undisturbed_end(job, *LONG)


def test_scancel_leaves_no_process_on_any_node(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_multi_node.sbatch", *LONG)
    job.until_saved()
    assert cluster.processes("train_ddp.py")
    cluster.ask("scancel", job.id)
    job.until("CANCELLED")
    deadline = time.monotonic() + 10
    while (left := cluster.processes("train_ddp.py")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert job.status["status"] == "preempted", job.output
    assert "not requeued from here" in job.output or "requeued" not in job.output


def test_requeues_are_bounded(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", *LONG, MAX_REQUEUES="0")
    job.until_saved()
    cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.until("FAILED")
    assert "requeued 0 times already (MAX_REQUEUES=0)" in job.output
    assert job.status["status"] == "preempted"


def test_a_node_set_down_moves_the_job_and_it_continues(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", *LONG)
    job.until_saved()
    cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.until(lambda: job.restarts == 1)
    cluster.ask("scontrol", "update", "nodename=n2", "state=resume")
    job.until("COMPLETED")
    require_undisturbed_end(job, *LONG)


@pytest.mark.parametrize("with_its_processes", [False, True])
def test_a_node_whose_slurmd_is_killed_is_survived(
    with_its_processes: bool, cluster: Cluster, checkout: Path
) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", *LONG)
    job.until_saved()
    os.kill(cluster.pid("slurmd.n2"), signal.SIGKILL)
    if with_its_processes:
        for pid in cluster.processes("train_ddp.py"):
            if b"SLURMD_NODENAME=n2\0" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, signal.SIGKILL)
        cluster.until(lambda: job.restarts == 1)  # before the controller has missed the node
    else:  # its job steps live on, and end well unless the controller gives the node up first
        cluster.until(lambda: job.state != "RUNNING")
    cluster.start_node("n2")
    job.until("COMPLETED", timeout=120)
    require_undisturbed_end(job, *LONG)


def test_an_array_of_three_seeds_is_three_runs(cluster: Cluster, checkout: Path) -> None:
    wrapped = checkout / "launch" / "seeds.sbatch"
    script = (checkout / "launch" / "slurm_srun.sbatch").read_text()
    wrapped.write_text(script.replace('"$@"', '--seed="$SLURM_ARRAY_TASK_ID" "$@"'))
    job = Job(cluster, checkout, "seeds.sbatch", *SHORT, sbatch="--array=1-3 --nodes=1")
    job.until("COMPLETED")
    runs = sorted((checkout / "runs").iterdir())
    assert [run.name.partition("_")[2] for run in runs] == [
        f"slurm-{job.id}-{n}" for n in (1, 2, 3)
    ]
    finals = [[r["val/loss"] for r in metrics(run) if "val/loss" in r][-1] for run in runs]
    for seed, final in enumerate(finals, start=1):
        assert final == pytest.approx(undisturbed(*SHORT, f"--seed={seed}"), rel=1e-5)


def test_a_head_node_that_is_none_is_said_within_30_seconds(
    cluster: Cluster, checkout: Path
) -> None:
    begun = time.monotonic()
    job = Job(cluster, checkout, "slurm_srun.sbatch", *SHORT, MASTER_ADDR="nosuchnode")
    cluster.until(lambda: "meeting point nosuchnode:" in job.output, timeout=30)
    job.until("FAILED")
    assert "is not known on n2" in job.output
    assert time.monotonic() - begun < 60


def test_bad_flags_are_one_line_and_not_requeued(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", "--lr=-1")
    job.until("FAILED")
    assert job.output.count("mnist-dist: error: --lr -1") == 1, job.output
    assert job.restarts == 0
    assert not (checkout / "runs").exists()
