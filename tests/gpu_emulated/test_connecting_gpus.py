"""NCCL's set-up: a GPU that two ranks have, and a failure to connect, are one line each."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from mnist_dist.distributed import process_group
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.errors import ReportedError

GPU = torch.device("cuda", 0)


def connect(uuids: list[str], nccl_error: str) -> str:
    """The error of connecting GPUs with these UUIDs, over a group of gloo."""
    with init_distributed(read_launch(), "cpu", "auto") as cpus:
        properties = SimpleNamespace(uuid=uuids[cpus.rank])
        setattr(torch.cuda, "get_device_properties", lambda device: properties)  # noqa: B010

        def all_reduce_sum(self: World, values: Any) -> Any:
            if nccl_error and self.rank == 1:
                raise dist.DistBackendError(nccl_error)
            return torch.zeros(1)

        World.all_reduce_sum = all_reduce_sum  # type: ignore[method-assign]
        try:
            process_group._connect_gpus(World(cpus.launch, cpus.device, "nccl", cpus.failures))
        except ReportedError as error:
            return f"{type(error).__name__} {error.exit_code}: {error}"
    return "connected"


def test_ranks_with_a_gpu_each_connect() -> None:
    assert run_ranks(connect, 3, ["a", "b", "c"], "") == ["connected"] * 3


def test_ranks_with_the_same_gpu_are_the_users_error_which_names_them() -> None:
    texts = run_ranks(connect, 3, ["a", "b", "a"], "")
    assert len(set(texts)) == 1
    assert texts[0].startswith("UserError 2: --backend nccl: ranks 0, 2 on ")
    assert "have the same GPU, which NCCL refuses; bind one to each task" in texts[0]


def test_a_failure_of_nccl_is_one_line_on_every_rank() -> None:
    error = (
        "[/pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:77] NCCL error in: x.cpp:3, "
        "unhandled system error\nncclSystemError: System call failed\nLast error:\nno socket"
    )
    texts = run_ranks(connect, 2, ["a", "b"], error)
    assert len(set(texts)) == 1
    assert texts[0].startswith("JobError 1: rank 1: NCCL could not connect the GPUs (")
    assert "unhandled system error" in texts[0]
    assert texts[0].endswith("); NCCL_DEBUG=INFO shows why")
    assert "\n" not in texts[0]


def group_options(error_handling: str) -> tuple[str, str | None]:
    """What a group for GPUs is made with; it is made of gloo here."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = error_handling
    made: list[str] = []
    init = dist.init_process_group

    def init_with_gloo(backend: str, **options: Any) -> None:
        made.append(backend)
        init("gloo", **options)

    stand_ins: dict[str, Any] = {
        "_connect_gpus": lambda ranks: made.append(ranks.backend),
        "pick_device": lambda *_: GPU,
    }
    for name, stand_in in stand_ins.items():
        setattr(process_group, name, stand_in)
    setattr(dist, "init_process_group", init_with_gloo)  # noqa: B010
    with init_distributed(read_launch(), "cuda", "auto") as ranks:
        ranks.barrier()
        made.append(str(ranks.gather(ranks.rank)))
    return " ".join(made), os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")


@pytest.mark.parametrize(("given", "used"), [("1", "0"), ("3", "3")])
def test_a_group_for_gpus_has_gloo_for_cpus_too_and_no_watchdog_that_aborts(
    given: str, used: str
) -> None:
    """1 is torchrun's own default."""
    assert run_ranks(group_options, 2, given) == [("cpu:gloo,cuda:nccl nccl [0, 1]", used)] * 2


def fewer_gpus_than_ranks(fd_path: str) -> tuple[str, str]:
    """Each rank's device and backend where a node has one GPU; what it prints goes to a file."""
    torch.cuda.is_available = lambda: True
    torch.cuda.init = lambda: None
    torch.cuda.device_count = lambda: 1
    launch = read_launch()
    out = os.open(f"{fd_path}/{launch.rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 2)
    with init_distributed(launch, "auto", "auto") as ranks:
        return str(ranks.device), ranks.backend


def test_only_rank_0_warns_that_auto_leaves_gpus_unused(tmp_path: Any) -> None:
    assert run_ranks(fewer_gpus_than_ranks, 3, str(tmp_path)) == [("cpu", "gloo")] * 3
    first, *others = [
        [line for line in (tmp_path / str(rank)).read_text().splitlines() if "mnist-dist" in line]
        for rank in range(3)
    ]
    assert others == [[], []]
    (line,) = first
    assert line.startswith("mnist-dist: warning: --device auto: 3 processes on a node with 1 GPU")
    assert line.endswith("--nproc_per_node=1 uses the GPU")
