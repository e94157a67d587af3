"""The quick way to logits gives the model's own."""

import pytest
import torch
from torch import nn

from mnist_dist.fast.inference import quick_logits
from mnist_dist.model import MLP, pixels


@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_the_perceptrons_logits_are_its_own_to_rounding(rows: int) -> None:
    torch.manual_seed(0)
    model, images = MLP(), torch.randint(0, 256, (rows, 784), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(quick_logits(model)(images), model(pixels(images)))


def test_weights_are_used_as_they_are_at_each_call() -> None:
    model, images = MLP(), torch.randint(0, 256, (3, 784), dtype=torch.uint8)
    logits = quick_logits(model)
    with torch.inference_mode():
        before = logits(images)
        nn.init.zeros_(model.hidden1.weight)
        between = logits(images)
        nn.init.zeros_(model.out.weight)
        after = logits(images)
    assert not torch.equal(before, between)
    assert not torch.equal(between, after)
    torch.testing.assert_close(after, model.out.bias.detach().expand(3, 10))


def test_any_other_model_is_used_as_it_is() -> None:
    class Other(MLP):
        pass

    model, images = Other(), torch.randint(0, 256, (9, 784), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(quick_logits(model)(images), model(pixels(images)))
