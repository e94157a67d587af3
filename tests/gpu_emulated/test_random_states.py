"""The random states of GPUs in checkpoints, with torch.cuda's functions standing in."""

import copy
from typing import Any

import pytest
import torch
from processes import run_ranks

from mnist_dist.distributed.launcher import Launch, read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.model import MLP
from mnist_dist.optimizer import build_optimizer
from mnist_dist.run.state import TrainState

CPU = torch.device("cpu")
GPU_STATE = 16  # bytes, as those of CUDA's Philox generator


def new_state() -> TrainState:
    model = MLP()
    optimizer, scheduler = build_optimizer(model, 0.1, 0.9, 0.0, "constant", 10)
    return TrainState(model, optimizer, scheduler, {"seed": 0})


class FakeGpuGenerator:
    """Stands in for the generator of this process's GPU, and lets TrainState believe in one."""

    def __init__(self, patch: Any, value: int) -> None:
        self.state = torch.full((GPU_STATE,), value, dtype=torch.uint8)
        patch(torch.cuda, "get_rng_state", lambda *_: self.state.clone())
        patch(torch.cuda, "set_rng_state", self.set)
        patch(TrainState, "_is_on_gpu", True)

    def set(self, state: torch.Tensor, *_: Any) -> None:
        self.state = state


def round_trip() -> dict[str, list[int]]:
    """What the states of this rank's generators are after a save, other draws, and a load."""
    with init_distributed(read_launch(), "cpu", "auto") as world:
        generator = FakeGpuGenerator(setattr, 10 + world.rank)
        torch.manual_seed(world.rank)
        saved = copy.deepcopy(new_state().state_dict(world))
        expected = torch.rand(3).tolist()
        generator.state = torch.zeros_like(generator.state)
        new_state().load_state_dict(saved, world)
        return {
            "saved": [int(state[0]) for state in saved["cuda_rng"]],
            "lengths": [len(state) for state in saved["cuda_rng"]],
            "restored": generator.state.tolist(),
            "draws equal": [int(torch.rand(3).tolist() == expected)],
        }


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_ranks_gpu_gets_its_own_random_state_back(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(round_trip, world_size)):
        assert found["saved"] == [10 + other for other in range(world_size)]
        assert found["lengths"] == [GPU_STATE] * world_size
        assert found["restored"] == [10 + rank] * GPU_STATE
        assert found["draws equal"] == [1]


@pytest.mark.parametrize("change", ["missing", "from a CPU"])
def test_a_checkpoint_without_gpu_states_loads_on_a_gpu(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(Launch("none"), CPU, "none")
    saved = new_state().state_dict(world)
    assert saved["cuda_rng"] == []
    if change == "missing":
        del saved["cuda_rng"]
    generator = FakeGpuGenerator(monkeypatch.setattr, 5)
    torch.manual_seed(3)
    resumed = new_state()
    resumed.load_state_dict(saved, world)
    assert generator.state.tolist() == [5] * GPU_STATE
    assert torch.equal(torch.get_rng_state(), saved["rng"][0])
    assert torch.equal(resumed.model.state_dict()["out.bias"], saved["model"]["out.bias"])


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Launch("none"), CPU, "none")
    with monkeypatch.context() as patch:
        FakeGpuGenerator(patch.setattr, 5)
        saved = new_state().state_dict(world)
    assert len(saved["cuda_rng"]) == 1
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is no GPU"))
    new_state().load_state_dict(saved, world)
    assert torch.equal(torch.get_rng_state(), saved["rng"][0])


def test_the_sum_and_the_cpus_state_are_read_back_beside_a_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpuGenerator(monkeypatch.setattr, 7)
    world = World(Launch("none"), CPU, "none")
    state = new_state()
    state.count_steps(torch.tensor(2.5))
    state.drain_losses()
    saved = state.state_dict(world)
    assert saved["loss_sums"] == [2.5]
    assert torch.equal(saved["rng"][0], torch.get_rng_state())
