"""`--step manual` against autograd and torch's own SGD: the same bits."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import run_job

import train_ddp
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.fast import ManualStep
from mnist_dist.fast.manual_backward import ManualBackward
from mnist_dist.model import MLP

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 21, 32, 63, 64, 65, 128, 192, 193, 512])
def test_manual_gradients_are_those_of_autograd_on_one_thread_to_the_last_bit(
    count: int, threads: int
) -> None:
    torch.manual_seed(count)
    model = MLP()
    images = torch.randint(0, 256, (count, 784)) / 256
    labels = torch.randint(0, 10, (count,))
    scale = 3 / max(1, count)
    torch.set_num_threads(1)
    expected = F.cross_entropy(model(images), labels, reduction="sum")
    (expected * scale).backward()
    found = [torch.full_like(parameter, torch.nan) for parameter in model.parameters()]
    backward = ManualBackward([model.hidden1, model.hidden2, model.out])
    torch.set_num_threads(threads)
    for _ in range(2):  # the first call of a size tries what threads may share
        loss_sum = backward(images, labels, torch.tensor(scale), found)
        assert torch.equal(loss_sum, expected)
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("momentum", "decay"), [(0, 0), (0, 0.01), (0.9, 0), (0.9, 0.01)])
def test_manual_steps_and_their_state_are_those_of_train_step_to_the_last_bit(
    momentum: float, decay: float
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, theirs = MLP(), MLP()
    theirs.load_state_dict(ours.state_dict())
    lean, sgd = (
        torch.optim.SGD(m.parameters(), 0.1, momentum, weight_decay=decay) for m in (ours, theirs)
    )
    with init_distributed(read_launch({}), "cpu", "auto") as world:
        torch.set_num_threads(1)
        for resumed in (False, True):
            if resumed:
                lean.load_state_dict(lean.state_dict())
            step = ManualStep(ours, lean, world, share_memory=True, timeout=60)
            for _ in range(4):
                images, labels = torch.rand(16, 784), torch.randint(0, 10, (16,))
                scale = torch.tensor(1 / 16)
                expected = train_ddp.train_step(theirs, sgd, images, labels, scale)
                assert torch.equal(step(ours, lean, images, labels, scale), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.grad is not None, "the gradient's norm is read from there"
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    found, expected_state = lean.state_dict()["state"], sgd.state_dict()["state"]
    for number in found if momentum else ():
        ours_buffer = found[number]["momentum_buffer"]
        assert torch.equal(ours_buffer, expected_state[number]["momentum_buffer"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--compile"], "--compile"),
        (["--precision=bf16"], "--precision bf16"),
        (["--grad-compression=powersgd"], "--grad-compression powersgd"),
    ],
)
def test_a_flag_that_the_manual_step_does_not_support_is_one_line(
    flags: list[str], named: str, tmp_path: Path
) -> None:
    ended = run_job(tmp_path, 2, "--data=bundled", "--step=manual", "--run-dir=run", *flags)
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = "".join(rank.err for rank in ended).splitlines()
    assert line.startswith(f"mnist-dist: error: --step manual: does not support {named}; ")
    assert not (tmp_path / "run").exists()
