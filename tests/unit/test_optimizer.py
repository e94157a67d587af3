"""The optimizer against torch.optim.SGD: the same bits, the same state."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from processes import command

from mnist_dist.model import MLP
from mnist_dist.optimizer import LeanSGD


@pytest.mark.parametrize(("momentum", "decay"), [(0, 0), (0, 0.01), (0.9, 0), (0.9, 0.01)])
def test_steps_and_state_are_those_of_torch_to_the_last_bit(momentum: float, decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = MLP(), MLP()
    theirs.load_state_dict(ours.state_dict())
    lean = LeanSGD(ours.parameters(), 0.1, momentum, weight_decay=decay)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=decay)
    for number in range(6):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        sgd.step()
        lean.step()
        if number == 2:  # a resume in between
            lean.load_state_dict(copy.deepcopy(lean.state_dict()))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    found, expected = lean.state_dict(), sgd.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert bool(found["state"]) == bool(momentum)
    for number, state in found["state"].items():
        assert torch.equal(state["momentum_buffer"], expected["state"][number]["momentum_buffer"])


@pytest.mark.parametrize(("momentum", "decay"), [(0, 0), (0, 0.01), (0.9, 0), (0.9, 0.01)])
def test_a_learning_rate_in_a_tensor_gives_the_update_of_the_number(
    momentum: float, decay: float
) -> None:
    torch.manual_seed(0)
    models = MLP(), MLP()
    models[1].load_state_dict(models[0].state_dict())
    start = copy.deepcopy(models[0].state_dict())
    number, tensor = (LeanSGD(m.parameters(), 0.1, momentum, weight_decay=decay) for m in models)
    for step in range(6):
        rate = 0.1 / (1 + step)
        number.param_groups[0]["lr"], tensor.param_groups[0]["lr"] = rate, torch.tensor(rate)
        for model in models:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        number.step()
        tensor.step()
    for name, expected in models[0].state_dict().items():
        assert (models[1].state_dict()[name] - expected).abs().max() <= 1e-6
        assert (start[name] - expected).abs().max() > 0.01
    for mine, other in zip(number.state.values(), tensor.state.values(), strict=True):
        assert torch.allclose(mine["momentum_buffer"], other["momentum_buffer"], atol=1e-6)
    assert bool(tensor.state) == bool(momentum)


def test_a_second_group_of_parameters_is_refused() -> None:
    model = MLP()
    groups = [{"params": layer.parameters()} for layer in (model.hidden1, model.out)]
    with pytest.raises(ValueError, match="one group"):
        LeanSGD(groups, 0.1)


def test_a_layer_that_a_step_did_not_use_stays_as_it_is() -> None:
    model = MLP()
    before = copy.deepcopy(model.state_dict())
    optimizer = LeanSGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    model.out(torch.rand(3, 256)).sum().backward()
    optimizer.step()
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {"out.weight", "out.bias"}


def test_a_training_step_never_imports_torchs_compiler() -> None:
    """It takes as long to import as torch itself."""
    program = """
import sys, torch, train_ddp
from mnist_dist.model import MLP
from mnist_dist.optimizer import build_optimizer
model = MLP()
optimizer, _ = build_optimizer(model, 0.1, 0.9, 0.01, "constant", 1)
train_ddp.train_step(model, optimizer, torch.rand(8, 784), torch.arange(8), torch.tensor(1 / 8))
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    assert command(Path(), sys.executable, "-c", program).out == "False\n"
