"""`mnist-dist doctor --train`: ranks that compute wrongly are named, whatever they do wrong."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, free_port, run_main, run_ranks, torchrun_environment
from torch import Tensor, nn

import train_ddp
from mnist_dist.commands.doctor import train_check
from mnist_dist.commands.doctor.train_check import TrainCheck, check_alone, check_together
from mnist_dist.distributed import ddp
from mnist_dist.distributed.launcher import Launch

HERE = socket.gethostname()
STEPS = 126
COMMAND = "mnist_dist.commands.doctor.command"


def flip(bit: int, at_call: int) -> Callable[[], None]:
    """Flip one bit of a weight before one call of the train step, counted from 1."""

    def sabotage() -> None:
        original, calls = train_ddp.train_step, 0

        def step(model: nn.Module, *rest: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at_call:
                weight = next(model.parameters()).detach().view(torch.int32)
                weight[0, 400] ^= 1 << bit
            return original(model, *rest)

        vars(train_check)["train_step"] = step

    return sabotage


def wrong_product() -> None:
    """Let one row of the first layer's product be wrong by a thousandth."""
    original = torch.nn.functional.linear

    def linear(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = original(images, weight, bias)
        return torch.cat([product[:1] * 1.001, product[1:]]) if len(weight) == 128 else product

    vars(torch.nn.functional)["linear"] = linear


def wrong_sum() -> None:
    """Average gradients over one rank too many."""
    original = ddp.shared_memory_hook
    vars(ddp)["shared_memory_hook"] = lambda state, bucket: original(
        (state[0], state[1] + 1), bucket
    )


def other_step() -> None:
    """Train in other steps than the reference did, as after a change of the optimizer."""
    train_check._LR = 0.04


def fails_together() -> None:
    original, calls = train_ddp.train_step, 0

    def step(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == STEPS + 9:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return original(*args)

    vars(train_check)["train_step"] = step


FAULTS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "a wrong product": (wrong_product, (1,)),
    "a low bit of a weight, together": (flip(8, at_call=STEPS + 120), (1,)),
    "a high bit of a weight, together": (flip(30, at_call=STEPS + 60), (0,)),
    "a wrong sum": (wrong_sum, (0, 1)),
    "another learning rate": (other_step, (0, 1)),
    "a failing step": (fails_together, (0, 1)),
}


def sabotaged(directory: str, fault: str) -> Ended:
    """The doctor in a rank, some of which have a fault built in."""
    act, ranks = FAULTS[fault]
    if int(os.environ["RANK"]) in ranks:
        act()
    return run_main(directory, ["--train", "--json"], COMMAND)


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        (
            "a wrong product",
            "arithmetic",
            f"rank 1 on {HERE}: the losses leave the reference curve at step ",
        ),
        (
            "a low bit of a weight, together",
            "training",
            f"the weights of rank 1 on {HERE} differ from the other ranks'",
        ),
        (
            "a high bit of a weight, together",
            "training",
            f"the losses of rank 0 on {HERE} differ from those of the same samples alone, from "
            "step 60 on",
        ),
        ("a wrong sum", "training", "each rank alone is right, but not all together"),
        (
            "another learning rate",
            "arithmetic",
            f"ranks 0-1 on {HERE}: the losses leave the reference curve at step 2 ",
        ),
        (
            "a failing step",
            "training",
            f"training fails on ranks 0-1 on {HERE}: CUDA error: unspecified launch failure",
        ),
    ],
)
def test_what_computes_wrongly_is_named(fault: str, check: str, words: str, tmp_path: Path) -> None:
    port = free_port()
    environments = [torchrun_environment(rank, 2, port, "doctor") for rank in range(2)]
    first, second = run_ranks(sabotaged, 2, str(tmp_path), fault, environments=environments)
    assert (first.code, second.code) == (1, 1), first.out + first.err
    report = json.loads(first.out)
    problems = {f["check"]: f["text"] for f in report["findings"] if f["level"] == "problem"}
    assert list(problems) == [check], report["findings"]
    assert problems[check].startswith(words), problems
    levels = {f["check"]: f["level"] for f in report["findings"]}
    assert levels["training"] == ("skipped" if check == "arithmetic" else "problem")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_follows_the_reference_in_every_precision_of_cpus(
    precision: Any, threads_as_before: None
) -> None:
    alone = TrainCheck(Launch("none"), torch.device("cpu"), precision).alone()
    assert alone["step"] is None, alone
    assert 0 < alone["difference"] < train_check.TOLERANCES[precision]


def test_a_precision_that_the_device_lacks_is_a_finding(threads_as_before: None) -> None:
    found = TrainCheck(Launch("none"), torch.device("cpu"), "tf32").alone()
    (finding,) = check_alone([found], {}, "tf32")
    assert (finding.check, finding.level) == ("arithmetic", "problem")
    assert "--precision tf32: needs a GPU; use fp32, or bf16" in finding.text


def payload(**values: Any) -> dict[str, Any]:
    healthy = {"difference": 1e-7, "step": None, "own_step": None, "digest": "a", "drift": 1e-7}
    return {**healthy, "samples_per_second": 1.0, "description": "gloo", **values}


@pytest.mark.parametrize(
    ("payloads", "named"),
    [
        (
            [payload(digest="b", drift=0.5), payload(), payload(digest="c", drift=1e-6)],
            "ranks 0, 2",
        ),
        ([payload(digest="b", drift=float("nan")), payload(drift=0.1)], "rank 0"),
        ([payload(own_step=7), payload(own_step=8), payload(own_step=8)], "rank 0"),
    ],
    ids=["drift", "nan", "first"],
)
def test_of_several_ranks_that_deviate_the_cause_is_named(
    payloads: list[dict[str, Any]], named: str
) -> None:
    (finding,) = check_together(payloads, {}, "fp32")
    assert finding.level == "problem"
    assert f" {named} differ from " in finding.text
