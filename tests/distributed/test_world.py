"""The collectives: an error on one rank is everybody's, and nobody is left waiting."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_job, run_ranks, torchrun_environment
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist.distributed.devices import pick_device
from mnist_dist.distributed.launcher import Launch, read_launch
from mnist_dist.distributed.process_group import init_distributed, leave_process_group
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError


def try_everything() -> dict[str, Any]:
    """What each collective gives on this rank, with values and with an error on rank 1 or 0."""
    with init_distributed(read_launch(), "cpu", "auto") as world:

        def fails_on(rank: int) -> str:
            if world.rank == rank:
                raise UserError("--data x: no such thing")
            return f"from {world.rank}"

        def error_of(call: Any) -> str:
            try:
                call()
            except UserError as error:
                return str(error)
            return ""

        return {
            "sum": world.all_reduce_sum(
                torch.tensor([1.0, world.rank], dtype=torch.float64)
            ).tolist(),
            "gather": world.gather(world.rank * 10),
            "run_on_all": world.run_on_all(lambda: fails_on(99)),
            "run_on_all error": error_of(lambda: world.run_on_all(lambda: fails_on(1))),
            "on_main": world.on_main(lambda: fails_on(99)),
            "on_main error": error_of(lambda: world.on_main(lambda: fails_on(0))),
            "once_per_host": world.once_per_host(lambda: fails_on(99)),
            "same": error_of(lambda: world.check_equal({"--data": "abc"}, "mend it")),
            "differs": error_of(lambda: world.check_equal({"--data": world.rank}, "mend it")),
        }


def test_collectives_give_every_rank_the_same_values_and_errors() -> None:
    results = run_ranks(try_everything, 3)
    for rank, result in enumerate(results):
        assert result["sum"] == [3.0, 3.0]
        assert result["gather"] == [0, 10, 20]
        assert result["run_on_all"] == f"from {rank}"
        assert result["run_on_all error"] == "rank 1: --data x: no such thing"
        assert result["on_main"] == "from 0"
        assert result["on_main error"] == "--data x: no such thing"
        assert result["once_per_host"] == "from 0"
        assert result["same"] == ""
        assert result["differs"] == "--data differs: rank 1 has 1, rank 0 has 0; mend it"


def policy() -> int:
    with init_distributed(read_launch(), "cpu", "auto"):
        return os.sched_getscheduler(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has batch processes")
def test_ranks_work_in_long_turns_and_a_process_alone_as_any_other() -> None:
    assert run_ranks(policy, 2) == [os.SCHED_BATCH, os.SCHED_BATCH]
    assert run_ranks(policy, 1) == [os.SCHED_OTHER]


def two_hosts() -> tuple[str, str]:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        per_host = world.once_per_host(lambda: f"from rank {world.rank}")

        def fails_on_host_1() -> str:
            if world.launch.node_rank == 1:
                raise UserError("no disk")
            return "fine"

        try:
            world.once_per_host(fails_on_host_1)
        except UserError as error:
            return per_host, str(error)
        return per_host, ""


def test_each_hosts_first_rank_acts_for_it_however_ranks_are_laid_out() -> None:
    """Slurm may deal ranks to hosts in turn: here ranks 0 and 2 are on host 0, 1 and 3 on 1."""
    port = free_port()
    environments = [
        torchrun_environment(rank, 4, port, "x")
        | {"GROUP_RANK": str(rank % 2), "LOCAL_RANK": str(rank // 2), "LOCAL_WORLD_SIZE": "2"}
        for rank in range(4)
    ]
    values = run_ranks(two_hosts, 4, environments=environments)
    assert [value for value, _ in values] == ["from rank 0", "from rank 1"] * 2
    assert {error for _, error in values} == {"rank 1: no disk"}


def group_state() -> tuple[bool, str]:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        return torch.distributed.is_initialized(), world.backend


def test_one_process_makes_no_process_group_and_several_use_gloo_on_cpus() -> None:
    assert run_ranks(group_state, 1) == [(False, "none")]
    assert run_ranks(group_state, 2) == [(True, "gloo")] * 2


def outlive_groups(count: int) -> int:
    """Free a model after its process group was left, again and again."""
    launch = read_launch()
    rank, ranks = launch.rank, launch.world_size
    store = dist.TCPStore("127.0.0.1", launch.master_port or 0, ranks, rank == 0)
    for number in range(count):
        own = dist.PrefixStore(f"group {number}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=ranks)
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        dist.barrier()
        leave_process_group()
        del model
    return count


def test_a_model_that_outlives_its_process_group_keeps_no_rank_from_its_end() -> None:
    """With torch.distributed.destroy_process_group alone, a rank soon waits for itself."""
    assert run_ranks(outlive_groups, 3, 100, timeout=60) == [100, 100, 100]


def test_a_gpu_that_is_not_there_is_the_users_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert pick_device(Launch("none"), "auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda"):
        pick_device(Launch("none"), "cuda")


def srun_environment(rank: int, world_size: int, job: str) -> dict[str, str]:
    """What srun sets for a task, two tasks a node, all nodes being this host."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_NTASKS": str(world_size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(rank // 2),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_TASKS_PER_NODE": f"2(x{world_size // 2})",
    }


def test_srun_tasks_find_each_other_and_train(tmp_path: Path) -> None:
    job = str(free_port())  # any number that no other test has
    environments = [srun_environment(rank, 4, job) for rank in range(4)]
    flags = ["--data=bundled", "--train-samples=200", "--epochs=1"]
    ended = run_job(tmp_path, 4, *flags, environments=environments)
    assert [e.code for e in ended] == [0] * 4, ended
    assert "4 processes (srun)" in ended[0].out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith(f"_slurm-{job}")


def test_world_description_names_count_launcher_and_device() -> None:
    world = World(Launch("torchrun", world_size=3), torch.device("cpu"), "gloo")
    assert world.description() == "3 processes (torchrun), cpu, gloo"
