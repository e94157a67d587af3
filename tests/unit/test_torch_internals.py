"""A release of torch that drops a name of its internals fails the test of that name."""

import functools
import re
from typing import Any

import pytest
import torch
import torch.utils.tensorboard
from processes import ROOT

from mnist_dist import torch_internals

PRIVATE = re.compile(r"\b(torch|dist|nn|F)(\.\w+)*\.(_[a-z]\w*|ops\.)")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # as torch imports its compiler
def test_a_compiled_model_is_recognized() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert not torch_internals.is_compiled(model)
    compiled: Any = torch.compile(model)
    assert torch_internals.is_compiled(torch.nn.Sequential(compiled))


@pytest.mark.parametrize("name", torch_internals.NAMES)
def test_torch_still_has(name: str) -> None:
    functools.reduce(getattr, name.split(".")[1:], torch)


def test_torch_still_marks_the_steps_that_it_wraps_for_its_profiler() -> None:
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    assert torch.optim.SGD.step.hooked is True  # type: ignore[attr-defined]


def test_no_other_module_uses_torchs_internals() -> None:
    """Neither in the package nor in the script."""
    users = {
        str(file.relative_to(ROOT))
        for file in [*(ROOT / "mnist_dist").rglob("*.py"), ROOT / "train_ddp.py"]
        if PRIVATE.search(file.read_text())
    }
    assert users == {"mnist_dist/torch_internals.py"}
