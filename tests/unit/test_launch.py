"""A process's place in the job under torchrun, srun and plain python."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import torchrun_environment

from mnist_dist.distributed.launcher import (
    Launch,
    first_host,
    read_launch,
    refuse_mpirun,
    tasks_per_node,
)
from mnist_dist.errors import UserError

# What a real `srun` (22.05) sets for task 3 of 4 on two nodes, as far as it is read.
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_plain_python_is_one_process_without_a_launcher() -> None:
    assert read_launch({}) == Launch("none")
    assert read_launch({"RANK_OF_NOBLES": "3", "PATH": "/bin"}) == Launch("none")


def test_torchrun_gives_rank_world_size_and_run_id() -> None:
    launch = read_launch(torchrun_environment(2, 4, 29500, "7f-a"))
    assert launch == Launch(
        launcher="torchrun",
        rank=2,
        local_rank=2,
        world_size=4,
        local_world_size=4,
        node_rank=0,
        master_addr="127.0.0.1",
        master_port=29500,
        job_id="torchrun-7f-a",
    )


def test_a_torchrun_launch_without_a_run_id_is_named_by_torchruns_process() -> None:
    ids = [read_launch(torchrun_environment(rank, 2, 29500, "none")).job_id for rank in (0, 1)]
    assert ids[0] == ids[1]
    assert re.fullmatch(rf"torchrun-{os.getppid()}-\d+", str(ids[0]))


def test_ranks_started_by_hand_have_no_job_id() -> None:
    environment = torchrun_environment(0, 2, 29500, "none")
    del environment["TORCHELASTIC_RUN_ID"]
    assert read_launch(environment).job_id is None


def test_an_srun_task_knows_its_place_and_the_first_host() -> None:
    launch = read_launch(SRUN)
    assert (launch.launcher, launch.rank, launch.world_size) == ("srun", 3, 4)
    assert (launch.local_rank, launch.local_world_size, launch.node_rank) == (1, 2, 1)
    assert (launch.master_addr, launch.job_id) == ("n1", "slurm-17")
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}
    assert read_launch({**SRUN, **one_node}).master_addr == "127.0.0.1", "its name may be unknown"
    assert launch.master_port is not None
    assert 1024 < launch.master_port < 32768


def test_all_tasks_of_a_step_agree_on_the_port_and_other_jobs_have_another() -> None:
    def port(**changed: str) -> int | None:
        return read_launch({**SRUN, **changed}).master_port

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert port() not in (port(SLURM_JOB_ID="18"), port(SLURM_STEP_ID="1"))
    assert port(MASTER_PORT="4321") == 4321


def test_torchrun_inside_a_slurm_job_is_torchrun_and_keeps_the_jobs_name() -> None:
    launch = read_launch({**SRUN, **torchrun_environment(1, 2, 29500, "x")})
    assert (launch.launcher, launch.rank, launch.world_size) == ("torchrun", 1, 2)
    assert launch.job_id == "slurm-17"


def test_torchruns_processes_share_the_cpus_that_srun_gave_to_their_agent() -> None:
    step = {**SRUN, "SLURM_CPUS_PER_TASK": "8"}
    assert read_launch(step).cpus_per_task == 8
    torchrun = torchrun_environment(1, 2, 29500, "x")
    assert read_launch({**step, **torchrun}).cpus_per_task == 4
    assert read_launch({"SLURM_CPUS_PER_TASK": "8", **torchrun}).cpus_per_task is None, "no step"


def test_a_batch_script_that_starts_python_without_srun_is_one_process() -> None:
    """Slurm sets SLURM_NTASKS and SLURM_PROCID there too, but the other tasks are not started."""
    batch = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP_")}
    launch = read_launch({**batch, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (launch.launcher, launch.world_size, launch.job_id) == ("none", 1, "slurm-17")


def test_each_task_of_an_array_is_a_job_of_its_own() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "42"}
    assert read_launch({**SRUN, **array}).job_id == "slurm-40-2"


def test_half_an_environment_is_refused_and_names_what_is_missing() -> None:
    broken = torchrun_environment(0, 2, 29500, "x")
    del broken["MASTER_PORT"]
    with pytest.raises(UserError, match="MASTER_PORT"):
        read_launch(broken)
    with pytest.raises(UserError, match="many"):
        read_launch({**torchrun_environment(0, 2, 29500, "x"), "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"RANK": "0"}, ["RANK=0", "without LOCAL_WORLD_SIZE", "unset RANK;"]),
        ({"WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "unset WORLD_SIZE;"]),
        ({"RANK": "3", "WORLD_SIZE": ""}, ["unset RANK WORLD_SIZE;"]),
        ({**torchrun_environment(5, 2, 1, "x"), "LOCAL_RANK": "0"}, ["RANK=5 WORLD_SIZE=2"]),
        (
            {**torchrun_environment(0, 2, 1, "x"), "LOCAL_WORLD_SIZE": "4"},
            ["contradictory values"],
        ),
        ({**torchrun_environment(0, 2, 1, "x"), "LOCAL_RANK": "-1"}, ["contradictory values"]),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, ["unset SLURM_STEP_NUM_TASKS"]),
        ({**SRUN, "SLURM_NODEID": "7"}, ["SLURM_STEP_NUM_TASKS=4"]),
        ({**SRUN, "SLURM_PROCID": "9"}, ["SLURM_PROCID=9", "contradictory values"]),
    ],
)
def test_variables_that_are_left_over_are_refused_and_named(
    changed: dict[str, str], names: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        read_launch(changed)
    for name in [*names, "start with torchrun, srun or plain python"]:
        assert name in str(caught.value)


def test_a_process_typed_into_a_shell_of_a_step_is_alone() -> None:
    """That shell has the variables of all four tasks, as task 0 of `srun --ntasks=4 --pty bash`."""
    salloc = {**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}
    assert read_launch(salloc) == Launch("none", job_id="slurm-17")


@pytest.mark.parametrize(
    ("words", "alone"),
    [
        (["bash"], True),
        (["-bash"], True),
        (["sh", "-i"], True),
        (["bash", "-c", "read; true"], False),
        (["cat"], False),
    ],
)
def test_a_shell_is_told_from_a_script_by_the_task_that_slurm_started(
    words: list[str], alone: bool
) -> None:
    program = words[0].lstrip("-")
    with subprocess.Popen(
        words, executable=shutil.which(program), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as task:
        assert task.stdin is not None
        while not Path(f"/proc/{task.pid}/cmdline").read_text():
            pass  # for a moment after it was started
        found = read_launch({**SRUN, "SLURM_TASK_PID": str(task.pid)})
        task.stdin.close()
    assert (found.launcher, found.world_size) == (("none", 1) if alone else ("srun", 4))
    assert read_launch({**SRUN, "SLURM_TASK_PID": str(task.pid)}).launcher == "srun", "it has ended"


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
        {"PMI_SIZE": "4", "PMI_RANK": "2"},
        {**SRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
    ],
    ids=["open-mpi", "mpich", "open-mpi-in-slurm"],
)
def test_mpirun_is_refused_instead_of_training_alone_in_each_process(
    variables: dict[str, str],
) -> None:
    launch = read_launch(variables)
    assert (launch.rank, launch.world_size) == (2, 4)
    with pytest.raises(UserError, match=r"mpirun started 4 processes.* torchrun or srun"):
        refuse_mpirun(launch)


def test_one_process_under_mpirun_and_srun_with_pmi_are_no_mpirun() -> None:
    assert read_launch({"OMPI_COMM_WORLD_SIZE": "1"}) == Launch("none")
    assert read_launch({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "3"}).launcher == "srun"
    assert read_launch({"PMI_SIZE": "4", **torchrun_environment(1, 2, 29500, "x")}).rank == 1


def test_an_ipv6_address_may_be_in_brackets() -> None:
    torchrun = torchrun_environment(1, 2, 29500, "x") | {"MASTER_ADDR": "[::1]"}
    assert read_launch(torchrun).master_addr == "::1"
    assert read_launch({**SRUN, "MASTER_ADDR": "[fd00::1]"}).master_addr == "fd00::1"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-07,9]-ib,x1", "gpu03-ib"),
        ("rack[2,4]node[007-012]", "rack2node007"),
        ("a-b.example[10]", "a-b.example10"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_task_counts_are_written_out() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
