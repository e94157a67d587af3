"""launch/'s sbatch scripts on a real Slurm of two nodes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
ENDLESS = [*LONG, "--epochs=1000"]
# A thread for each process: this machine's few cores are those of all nodes and of all jobs, and
# threads of one process that wait for each other on taken cores take a tenth of a second a step.
ONE_THREAD = "--cpus-per-task=1"
# What befalls a job is the same for one process a node, and the machine starts half as many.
ONE_EACH = f"--ntasks-per-node=1 {ONE_THREAD}"
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
    return checked_out(tmp_path)


@pytest.fixture
def slow_checkout(tmp_path: Path) -> Path:
    """One whose jobs take their time until they are requeued."""
    directory = checked_out(tmp_path)
    (directory / "train_ddp.py").rename(directory / "real_job.py")
    slow = Path(__file__).with_name("slow_until_requeued.py")
    shutil.copy(slow, directory / "train_ddp.py")
    return directory


def checked_out(directory: Path) -> Path:
    for name in ("mnist_dist", "launch"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job | None:
    """A job with two minutes to live, which only takes the time that other tests leave.

    Slurm looks at the clock every half minute and warns up to half a minute early, here after 50 to
    80 s. So the job starts before all tests, if the one that waits for the warning is among them.
    """
    items = {item.name for item in request.session.items}
    if test_slurms_own_warning_saves_and_requeues_until_the_job_is_cancelled.__name__ not in items:
        return None
    cluster = request.getfixturevalue("cluster")
    directory = checked_out(tmp_path_factory.mktemp("limited"))
    limit = f"{ONE_EACH} --time=2 --signal=B:USR1@40"
    return Job(cluster, directory, "slurm_srun.sbatch", *ENDLESS, sbatch=limit, nice=19)


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
    # Its log file is for reading: each epoch is a line, and nothing is drawn over.
    assert [line[:9] for line in job.output.splitlines() if line.startswith("epoch ")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert all(character >= " " or character == "\n" for character in job.output)
    if script != "slurm_single_node.sbatch":
        again = f"extend the same command with --run-dir runs/{job.run.name} --epochs 4"
        assert again in job.output


def test_a_warning_before_the_time_limit_saves_and_the_requeued_job_completes(
    cluster: Cluster, slow_checkout: Path
) -> None:
    job = Job(cluster, slow_checkout, "slurm_multi_node.sbatch", *LONG, sbatch=ONE_EACH)
    job.until_saved()
    warn(job)
    job.until("COMPLETED")
    assert "stopped: SIGTERM at step" in job.output
    assert "requeued: restart 1 of at most 10" in job.output
    assert job.restarts == 1
    require_undisturbed_end(job, *LONG)


def warn(job: Job) -> None:
    """What Slurm does by itself some time before the limit."""
    job.cluster.ask("scancel", "--batch", "--signal=USR1", job.id)


def test_an_administrators_requeue_continues_the_same_run(
    cluster: Cluster, slow_checkout: Path
) -> None:
    job = Job(cluster, slow_checkout, "slurm_srun.sbatch", *LONG, sbatch=ONE_EACH)
    job.until_saved()
    cluster.ask("scontrol", "requeue", job.id)
    job.until("COMPLETED")
    assert "stopped: SIGTERM at step" in job.output
    assert job.restarts == 1
    require_undisturbed_end(job, *LONG)


def test_scancel_leaves_no_process_on_any_node(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_multi_node.sbatch", *ENDLESS, sbatch=ONE_THREAD)
    job.until_saved()
    require_nothing_left_by_scancel(job)


def require_nothing_left_by_scancel(job: Job) -> None:
    job.cluster.until(lambda: job.status["status"] == "running" and job.processes())
    job.cluster.ask("scancel", job.id)
    job.until("CANCELLED")
    job.cluster.until(lambda: job.processes() == [], timeout=10)
    assert job.status["status"] == "preempted", job.output
    assert job.status["saved_step"] == job.status["step"]
    assert "requeued: restart" not in job.output.rpartition("launch: the step ended")[2]


def test_requeues_are_bounded(cluster: Cluster, checkout: Path) -> None:
    script = "slurm_srun.sbatch"
    job = Job(cluster, checkout, script, *ENDLESS, sbatch=ONE_EACH, MAX_REQUEUES="1")
    job.until_saved()
    warn(job)
    cluster.until(lambda: "resume at step" in job.output, timeout=90)
    job.until_saved(job.status["step"] + 1)
    warn(job)
    job.until("FAILED")
    assert "requeued: restart 1 of at most 1" in job.output
    assert "requeued 1 times already (MAX_REQUEUES=1)" in job.output
    assert job.restarts == 1
    assert job.status["status"] == "preempted"


def test_slurms_own_warning_saves_and_requeues_until_the_job_is_cancelled(limited: Job) -> None:
    try:
        limited.cluster.until(lambda: "resume at step" in limited.output, timeout=150)
        stopped, _, resumed = limited.output.partition("requeued: restart")
        step = int(stopped.rpartition("stopped: SIGTERM at step ")[2].partition(",")[0])
        assert f"resume at step {step}," in resumed
        require_nothing_left_by_scancel(limited)
    finally:  # by its partition it would take the nodes of the jobs of later tests
        limited.cluster.ask("scancel", limited.id)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "starting"])
@pytest.mark.parametrize("script", ["slurm_single_node.sbatch", "slurm_srun.sbatch"])
def test_a_preempted_job_saves_in_its_grace_and_continues_when_the_other_is_done(
    script: str, begun: bool, cluster: Cluster, slow_checkout: Path
) -> None:
    tasks = ONE_EACH if script == "slurm_srun.sbatch" else ONE_THREAD
    low = f"--partition=low --exclusive --nodes=2 {tasks}"
    job = Job(cluster, slow_checkout, script, *LONG, sbatch=low)
    if begun:
        job.until_saved()
    else:
        cluster.until(lambda: job.state == "RUNNING")
    urgent = cluster.ask(
        *["sbatch", "--parsable", "--exclusive", "--nodes=2", "--output=/dev/null"],
        *["--partition=main", "--wrap=sleep 1"],
    )
    assert urgent
    job.until("COMPLETED")
    if begun:
        assert "stopped: SIGTERM at step" in job.output
    assert job.restarts >= 1
    require_undisturbed_end(job, *LONG)


def test_a_node_set_down_moves_the_job_and_it_continues(
    cluster: Cluster, slow_checkout: Path
) -> None:
    job = Job(cluster, slow_checkout, "slurm_srun.sbatch", *LONG, sbatch=ONE_EACH)
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
    job = Job(cluster, checkout, "slurm_srun.sbatch", *LONG, sbatch=ONE_EACH)
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
    same_node = f"--array=1-3 --nodes=1 --nodelist=n1 {ONE_THREAD}"
    job = Job(cluster, checkout, "seeds.sbatch", *SHORT, sbatch=same_node)
    running = ["squeue", "-h", "-r", "-tRUNNING", f"-j{job.id}", "-o%i"]
    cluster.until(lambda: len(cluster.ask(*running).split()) == 3)
    job.until("COMPLETED")
    runs = sorted((checkout / "runs").iterdir(), key=lambda run: run.name.partition("_")[2])
    assert [run.name.partition("_")[2] for run in runs] == [
        f"slurm-{job.id}-{n}" for n in (1, 2, 3)
    ]
    finals = [[r["val/loss"] for r in metrics(run) if "val/loss" in r][-1] for run in runs]
    for seed, final in enumerate(finals, start=1):
        assert final == pytest.approx(undisturbed(*SHORT, f"--seed={seed}"), rel=1e-5)


def test_a_head_node_that_is_none_is_said_within_30_seconds(
    cluster: Cluster, checkout: Path
) -> None:
    nowhere = "nosuchnode"
    script = "slurm_srun.sbatch"
    job = Job(cluster, checkout, script, *SHORT, sbatch=ONE_EACH, MASTER_ADDR=nowhere)
    cluster.until(lambda: "rendezvous endpoint nosuchnode:" in job.output, timeout=30)
    job.until("FAILED")
    assert " on n2 (" in job.output, "the node is named"


def test_bad_flags_are_one_line_and_not_requeued(cluster: Cluster, checkout: Path) -> None:
    job = Job(cluster, checkout, "slurm_srun.sbatch", "--lr=-1")
    job.until("FAILED")
    assert job.output.count("mnist-dist: error: --lr -1") == 1, job.output
    assert job.restarts == 0
    assert not (checkout / "runs").exists()


def srun_doctor(cluster: Cluster, checkout: Path, *options: str) -> tuple[int, list[str]]:
    """The doctor in two tasks on each node; srun's exit code and the lines it printed."""
    words = ["srun", "--nodes=2", "--ntasks-per-node=2", *options]
    done = subprocess.run(
        [*words, sys.executable, "-m", "mnist_dist", "doctor", "--train"],
        cwd=checkout,
        env={**cluster.environment, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines()


def test_srun_starts_the_doctor_on_all_nodes_and_rank_0_has_the_last_word(
    cluster: Cluster, checkout: Path
) -> None:
    code, lines = srun_doctor(cluster, checkout)
    assert code == 0, lines
    assert lines[0] == "mnist-dist doctor: 4 processes (srun)"
    assert any("6 pairs of ranks, both ways" in line for line in lines)
    assert any(line.startswith("  ok    training      4 ranks together") for line in lines)
    assert lines[-1].endswith("4 ranks on 2 nodes can train together")
    assert not (checkout / "runs").exists()
    code, lines = srun_doctor(cluster, checkout, "--export=ALL,GLOO_SOCKET_IFNAME=eth7")
    assert code == 1
    assert "there is no interface eth7 (ranks 0-1 on n1, 2-3 on n2)" in lines[-1]
