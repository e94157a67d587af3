"""A state that was read from a file is checked before any of it is used."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError
from mnist_dist.model import build_model
from mnist_dist.optimizer import build_optimizer
from mnist_dist.run.state import TrainState

WORLD = World(Launch("none"), torch.device("cpu"), "none")


def new_state(lr: float = 0.1) -> TrainState:
    model = build_model()
    optimizer, scheduler = build_optimizer(model, lr, 0.9, 0.0, "onecycle", 10)
    return TrainState(model, optimizer, scheduler, {"lr": lr, "seed": 0})


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """The state after a step, with momentum."""
    state = new_state()
    state.model(torch.rand(4, 784)).sum().backward()
    state.optimizer.step()
    state.count_steps(torch.tensor(1.0))
    state.drain_losses()
    return state.state_dict(WORLD)


def test_a_state_that_was_saved_is_taken(saved: dict[str, Any]) -> None:
    state = new_state()
    assert state.find_fault(saved) is None
    state.load_state_dict(saved, WORLD)
    assert state.step == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_a_state_of_another_optimizer_is_taken(groups: int) -> None:
    """Adam has a counter for each parameter, and may decay weights and not biases."""

    def adam() -> TrainState:
        model = build_model()
        parameters = list(model.parameters())
        split = [{"params": parameters[n::groups]} for n in range(groups)]
        return TrainState(model, torch.optim.Adam(split, lr=0.1), None, {"seed": 0})

    state = adam()
    state.model(torch.rand(4, 784)).sum().backward()
    state.optimizer.step()
    state.count_steps(torch.tensor(1.0))
    state.drain_losses()
    saved, again = state.state_dict(WORLD), adam()
    assert again.find_fault(saved) is None
    again.load_state_dict(saved, WORLD)
    assert again.optimizer.state_dict()["state"][0]["step"] == 1


def group(saved: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = saved["optimizer"]["param_groups"][0]
    return found


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no epoch": lambda s: s.pop("epoch"),
    "epoch as text": lambda s: s.update(epoch="3"),
    "epoch as a fraction": lambda s: s.update(epoch=1.5),
    "a negative batch": lambda s: s.update(batch=-1),
    "step as a flag": lambda s: s.update(step=True),
    "a best loss that is no number": lambda s: s.update(best_loss=float("nan")),
    "no model": lambda s: s.update(model=None),
    "a weight as a list": lambda s: s["model"].update({"out.bias": [0.0]}),
    "identity as a list": lambda s: s.update(identity=[1]),
    "a tensor in identity": lambda s: s["identity"].update(lr=torch.ones(2)),
    "no optimizer": lambda s: s.update(optimizer={}),
    "no learning rate": lambda s: group(s).pop("lr"),
    "the learning rate as text": lambda s: group(s).update(lr="0.1"),
    "no peak learning rate": lambda s: group(s).pop("max_lr"),
    "other parameters": lambda s: group(s).update(params=[0, 1]),
    "parameters as text": lambda s: group(s).update(params="0"),
    "momentum of another shape": lambda s: s["optimizer"]["state"][0].update(
        momentum_buffer=torch.ones(3)
    ),
    "momentum as text": lambda s: s["optimizer"]["state"].update({0: "x"}),
    "momentum of no parameter": lambda s: s["optimizer"]["state"].update({99: {}}),
    "no schedule": lambda s: s.update(scheduler=None),
    "a schedule as a list": lambda s: s.update(scheduler=[1]),
    "a schedule at no step": lambda s: s["scheduler"].update(last_epoch="1"),
    "no random states": lambda s: s.update(rng=[]),
    "a random state of floats": lambda s: s.update(rng=[torch.ones(5056)]),
    "a random state cut short": lambda s: s.update(rng=[s["rng"][0][:100]]),
    "a GPU's random state as text": lambda s: s.update(cuda_rng=["x"]),
    "losses of other ranks": lambda s: s.update(loss_sums=[0.0, 0.0]),
    "losses as text": lambda s: s.update(loss_sums=["0"]),
    "no format": lambda s: s.pop("format"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_values_of_the_wrong_kind_are_found_before_anything_is_loaded(
    damage: Callable[[dict[str, Any]], Any], saved: dict[str, Any]
) -> None:
    damaged = deepcopy(saved)
    damage(damaged)
    fault = new_state().find_fault(damaged)
    assert fault is not None
    assert "\n" not in fault


@pytest.mark.parametrize("content", [None, [], 3, torch.ones(2), {}, "text"])
def test_an_object_that_is_no_state_is_found(content: Any) -> None:
    assert new_state().find_fault(content) is not None


def test_a_sound_state_of_another_run_is_no_damage_and_is_refused_by_its_flag(
    saved: dict[str, Any],
) -> None:
    state = new_state(lr=0.2)
    assert state.find_fault(saved) is None
    with pytest.raises(UserError, match="--lr"):
        state.load_state_dict(saved, WORLD)


def test_a_sound_state_of_another_model_or_version_is_no_damage_either(
    saved: dict[str, Any],
) -> None:
    state = new_state()
    for change, words in (({"model": {"w": torch.ones(1)}}, "model"), ({"format": 99}, "99")):
        assert state.find_fault(saved | change) is None
        with pytest.raises(UserError, match=words):
            state.load_state_dict(saved | change, WORLD)
