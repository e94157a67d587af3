"""The step by hand against autograd and torch's own SGD: the same bits."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import command
from torch import Tensor

from mnist_dist.fast import onednn
from mnist_dist.fast.captured import fault
from mnist_dist.fast.manual_backward import Perceptron
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 21, 32, 63, 64, 65, 128, 192, 193, 512])
def test_gradients_by_hand_are_those_of_autograd_on_one_thread_to_the_last_bit(
    count: int, threads: int
) -> None:
    torch.manual_seed(count)
    model = MLP()
    optimizer = FlatSGD(model, 0.1, 0, 0)
    pixels = torch.randint(0, 256, (count, 784)) / 256
    labels = torch.randint(0, 10, (count,))
    scale = 3 / max(1, count)
    torch.set_num_threads(1)
    expected = F.cross_entropy(model(pixels), labels, reduction="sum")
    (expected * scale).backward()
    found = optimizer.views(torch.full_like(optimizer.flat, torch.nan))
    by_hand = Perceptron([model.hidden1, model.hidden2, model.out])
    torch.set_num_threads(threads)
    for _ in range(2):  # the first call of a size tries how it may be done
        loss_sum = by_hand.gradients(pixels, labels, torch.tensor(scale), found)
        assert torch.equal(loss_sum, expected)
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
    assert torch.get_num_threads() == threads


def test_a_quicker_product_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this processor a change of the last bit stands for another processor's oneDNN."""
    quick = onednn.linear

    def off_by_one_bit(left: Tensor, right: Tensor) -> Tensor:
        product = quick(left, right)
        product[0, 0] = torch.nextafter(product[0, 0], torch.tensor(9.0))
        return product

    monkeypatch.setattr(onednn, "linear", off_by_one_bit)
    test_gradients_by_hand_are_those_of_autograd_on_one_thread_to_the_last_bit(64, 1)


@pytest.mark.parametrize(("momentum", "decay"), [(0, 0), (0, 0.01), (0.9, 0), (0.9, 0.01)])
def test_flat_steps_and_their_state_are_those_of_torch_to_the_last_bit(
    momentum: float, decay: float
) -> None:
    torch.manual_seed(0)
    ours, theirs = MLP(), MLP()
    theirs.load_state_dict(ours.state_dict())
    flat = FlatSGD(ours, 0.1, momentum, decay)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=decay)
    for number in range(6):
        gradients = [torch.randn_like(parameter) for parameter in theirs.parameters()]
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        sgd.step()
        flat.apply(torch.cat([gradient.flatten() for gradient in gradients]))
        if number == 2:  # a resume in between
            flat.load_state_dict(copy.deepcopy(flat.state_dict()))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    found, expected = flat.state_dict(), sgd.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert state.keys() == found["state"][number].keys()
        if momentum:
            assert torch.equal(found["state"][number]["momentum_buffer"], state["momentum_buffer"])


def test_steps_by_hand_never_import_torchs_compiler() -> None:
    """It takes as long to import as torch itself."""
    program = """
import sys, torch
from mnist_dist.model import MLP
from mnist_dist.optimizer import FlatSGD
optimizer = FlatSGD(MLP(), 0.1, 0.9, 0.01)
optimizer.apply(torch.ones_like(optimizer.flat))
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    assert command(Path(), sys.executable, "-c", program).out == "False\n"


def test_a_trial_tells_gradients_that_are_autograds_from_others() -> None:
    """What decides on a GPU whether its graphs are used; here of what they would record."""
    torch.manual_seed(0)
    model = MLP()
    layers = [model.hidden1, model.hidden2, model.out]
    assert fault(Perceptron(layers), model) is None
    other = MLP()
    assert fault(Perceptron([*layers[:2], other.out]), model) == (
        "a replayed graph gives other gradients than autograd"
    )
    narrow = torch.nn.Linear(7, 10)
    assert str(fault(Perceptron([*layers[:2], narrow]), model)).startswith("RuntimeError: ")
