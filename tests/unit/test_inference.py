"""The quick way to logits gives the model's own."""

import pytest
import torch
from torch import nn

from mnist_dist.inference import quick_logits
from mnist_dist.model import MLP


@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_the_perceptrons_logits_are_its_own_to_rounding(rows: int) -> None:
    torch.manual_seed(0)
    model, pixels = MLP(), torch.rand(rows, 784)
    with torch.inference_mode():
        torch.testing.assert_close(quick_logits(model)(pixels), model(pixels))


def test_weights_are_used_as_they_are_at_each_call() -> None:
    model, pixels = MLP(), torch.rand(3, 784)
    logits = quick_logits(model)
    with torch.inference_mode():
        before = logits(pixels)
        nn.init.zeros_(model.out.weight)
        after = logits(pixels)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.out.bias.detach().expand(3, 10))


def test_any_other_model_is_used_as_it_is() -> None:
    class Other(MLP):
        pass

    model = Other()
    assert quick_logits(model) is model
