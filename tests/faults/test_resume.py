"""Exact resume at any step, at any world size."""

import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import completed_run, metrics, run_job, run_ranks
from torch.utils.data import DistributedSampler

from mnist_dist.distributed.sync import StopRequest

SMALL = ["--data=bundled", "--train-samples=43", "--global-batch-size=8", "--epochs=2"]
RECIPE = ["--recipe=tuned", "--lr=0.05"]
STEPS = 12


def comparable(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k != "time" and not k.startswith("perf/")}
        for r in metrics(run)
    ]


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bitwise equality of nested state."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other)
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


def cut_back(whole: Path, run: Path, step: int) -> None:
    """A copy of `whole` as a crash between the checkpoints of `step` and the next leaves it."""
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "status": "running"}))


@pytest.mark.parametrize(
    ("world_size", "way"),
    [
        (1, "--step=ddp"),
        (2, "--step=ddp"),
        (1, "--step=manual"),
        (2, "--step=manual"),
        (
            3,
            "--shared-memory=off",
        ),  # gloo adds up in an order that depends on the place in a bucket
    ],
)
def test_a_resume_at_every_step_ends_in_the_same_bits(
    world_size: int, way: str, tmp_path: Path
) -> None:
    saving = ["--checkpoint-every-steps=1", "--keep-checkpoints=100"]
    whole = completed_run(tmp_path, world_size, *SMALL, *RECIPE, *saving, way)
    expected = torch.load(whole / "checkpoints" / f"step_{STEPS:08d}.pt", weights_only=True)
    for done in range(1, STEPS + 1):
        run = tmp_path / f"cut-{done}"
        cut_back(whole, run, done)
        flags = [f"--run-dir={run}", *SMALL, *RECIPE, "--keep-checkpoints=100", way]
        first = run_job(tmp_path, world_size, *flags)[0]
        assert first.code == 0, first.err
        assert f"resume at step {done}, " in first.out
        final = torch.load(run / "checkpoints" / f"step_{STEPS:08d}.pt", weights_only=True)
        assert_equal(final, expected, f"after step {done}")
        assert comparable(run) == comparable(whole), done


def write_numbered_digits(file: Path, count: int) -> None:
    """Training images whose first two pixels are their own number."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    labels = generator.integers(0, 10, count).astype(np.uint8)
    np.savez(file, x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])


def train_and_count(flags: list[str], stop_after: int) -> tuple[int, list[tuple[int, int]]]:
    """Run the job in this rank; its exit code, and (epoch, image) of every image it trained on.

    It is asked to stop while it works on its `stop_after`-th batch.
    """
    import train_ddp
    from mnist_dist.distributed import sync

    sync._PERIOD_S = sync._PERIOD_SINGLE_S = 0.0  # the ranks sync after every step
    used: list[tuple[int, int]] = []
    epoch, batches = -1, 0
    heard, receive = threading.Event(), StopRequest._receive
    train_step, set_epoch = train_ddp.train_step, DistributedSampler.set_epoch

    def noted_signal(self: StopRequest, number: int) -> None:
        receive(self, number)
        heard.set()

    def counted(model: Any, optimizer: Any, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal batches
        numbers = (images[:, 0] * 256 * 256 + images[:, 1] * 256).int().tolist()
        used.extend((epoch, number) for number in numbers)
        batches += 1
        if batches == stop_after and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard.wait(60)  # by the thread that reads signals
        return train_step(model, optimizer, images, *rest)

    def noted_epoch(self: Any, number: int) -> None:
        nonlocal epoch
        epoch = number
        set_epoch(self, number)

    train_ddp.train_step = counted  # type: ignore[assignment]
    StopRequest._receive = noted_signal  # type: ignore[method-assign]
    DistributedSampler.set_epoch = noted_epoch  # type: ignore[assignment, method-assign]
    return train_ddp.main(flags) or 0, used


def test_four_then_two_then_one_then_three_processes_use_every_sample_once_an_epoch(
    tmp_path: Path,
) -> None:
    samples, epochs = 500, 3
    write_numbered_digits(tmp_path / "mnist.npz", samples * 6 // 5)
    flags = [f"--data={tmp_path / 'mnist.npz'}", "--global-batch-size=20", "--lr=0.05"]
    flags += [f"--epochs={epochs}"]
    whole = completed_run(tmp_path, 1, *flags)
    run = tmp_path / "moved"
    used: list[tuple[int, int]] = []
    # 25 steps an epoch: the stops are after steps 10, 31 and 60, each within an epoch.
    for world_size, stop_after, code in ((4, 10, 75), (2, 21, 75), (1, 29, 75), (3, 999, 0)):
        results = run_ranks(train_and_count, world_size, [f"--run-dir={run}", *flags], stop_after)
        assert [result[0] for result in results] == [code] * world_size
        used += [pair for result in results for pair in result[1]]
    assert sorted(used) == [(epoch, n) for epoch in range(epochs) for n in range(samples)]
    for ours, expected in zip(metrics(run), metrics(whole), strict=True):
        for tag in ("train/loss", "val/loss", "test/loss"):
            if tag in expected:
                assert ours[tag] == pytest.approx(expected[tag], rel=1e-5), tag


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize("damage", ["empty", "truncated", "a flipped bit", "a malicious pickle"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_older_one_used(
    damage: str, tmp_path: Path
) -> None:
    flags = [*SMALL, "--checkpoint-every-steps=1", "--keep-checkpoints=100"]
    whole = completed_run(tmp_path, 2, *flags)
    run = tmp_path / "damaged"
    cut_back(whole, run, 7)
    newest = run / "checkpoints" / "step_00000007.pt"
    content = newest.read_bytes()
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    damaged = {"empty": b"", "truncated": content[:999], "a flipped bit": flipped}
    newest.write_bytes(damaged.get(damage, pickle.dumps(Malicious(tmp_path / "executed"))))
    first, second = run_job(tmp_path, 2, f"--run-dir={run}", *flags)
    assert (first.code, second.code) == (0, 0)
    assert "step_00000007.pt" in first.err
    assert "resume at step 6, " in first.out
    assert not (tmp_path / "executed").exists()
    assert comparable(run) == comparable(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(tmp_path: Path) -> None:
    run = completed_run(tmp_path, 2, *SMALL)
    for path in (run / "checkpoints").glob("step_*.pt"):
        path.write_bytes(b"")
    for _ in range(2):
        first, second = run_job(tmp_path, 2, f"--run-dir={run}", *SMALL)
        assert (first.code, second.code) == (2, 2)
        (line,) = first.err.splitlines()
        assert "every step_*.pt is damaged" in line
        assert "step_00000012.pt" in line


def test_checkpoints_are_also_made_by_the_clock(tmp_path: Path) -> None:
    """Every 0.3 s, in an epoch of slow steps: two processes meet once a second."""
    flags = ["--data=bundled", "--global-batch-size=1", "--epochs=1", "--keep-checkpoints=100"]
    run = completed_run(tmp_path, 2, *flags, "--checkpoint-every-minutes=0.005")
    steps = [int(p.stem[5:]) for p in (run / "checkpoints").glob("step_*.pt")]
    assert max(steps) == 4000
    assert [step for step in steps if step % 4000]
    for step in steps:
        saved = torch.load(run / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)
        assert (saved["epoch"], saved["batch"]) == divmod(step, 4000)
