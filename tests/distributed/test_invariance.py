"""The global batch defines the run, whatever the number of processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import completed_run, metrics
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split, find_data, load
from mnist_dist.model import MLP

WORLD_SIZES = (1, 2, 3, 4, 7)
EPOCH_LOSSES = ("train/loss", "val/loss")


def losses(run: Path) -> list[float]:
    """Every epoch's train and validation loss, then the test loss."""
    records = metrics(run)
    return [r[tag] for r in records[:-1] for tag in EPOCH_LOSSES] + [records[-1]["test/loss"]]


@pytest.mark.parametrize(
    ("batch_size", "epochs", "lr"),
    [(50, 3, 0.1), (5, 2, 0.05)],
    ids=["uneven-batches", "fewer-samples-than-ranks"],
)
def test_every_world_size_gives_the_same_losses(
    batch_size: int, epochs: int, lr: float, tmp_path: Path
) -> None:
    flags = ["--data=bundled", "--train-samples=1003", f"--global-batch-size={batch_size}"]
    flags += [f"--epochs={epochs}", f"--lr={lr}"]
    curves = {w: losses(completed_run(tmp_path, w, *flags)) for w in WORLD_SIZES}
    assert len(curves[1]) == 2 * epochs + 1
    assert curves[1][-3] < 0.9 * curves[1][0], "the runs learn something, so differences would show"
    for world_size in WORLD_SIZES:
        assert curves[world_size] == pytest.approx(curves[1], rel=1e-5), world_size


def test_the_tuned_recipe_is_the_same_at_every_world_size(tmp_path: Path) -> None:
    """Nor do momentum, weight decay, the schedule and the shifts depend on the processes."""
    flags = ["--data=bundled", "--recipe=tuned", "--train-samples=600", "--epochs=2", "--lr=0.02"]
    curves = {w: losses(completed_run(tmp_path, w, *flags)) for w in (1, 2, 3)}
    for world_size in (2, 3):
        assert curves[world_size] == pytest.approx(curves[1], rel=1e-4), world_size


def plain_loop(
    split: Split, batch_size: int, epochs: int, lr: float, seed: int
) -> tuple[dict[str, Any], list[float]]:
    """Single-process training as a textbook has it: final weights, and every epoch's mean loss."""
    torch.manual_seed(seed)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    sampler: DistributedSampler[int] = DistributedSampler(
        split,
        num_replicas=1,
        rank=0,
        seed=seed,
    )
    epoch_losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for part in torch.tensor(list(sampler)).split(batch_size):
            loss = F.cross_entropy(model(split.images[part].float() / 256), split.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        epoch_losses.append(total / len(split))
    return model.state_dict(), epoch_losses


@pytest.mark.parametrize("step", ["ddp", "manual"])
@pytest.mark.parametrize(
    ("samples", "batch_size", "bitwise"),
    [(960, 64, True), (1003, 50, False)],
    ids=["powers-of-two", "uneven"],
)
def test_one_process_equals_a_plain_loop(
    samples: int, batch_size: int, bitwise: bool, step: str, tmp_path: Path
) -> None:
    flags = ["--data=bundled", f"--train-samples={samples}", f"--global-batch-size={batch_size}"]
    flags.append(f"--step={step}")
    run = completed_run(tmp_path, 1, *flags, "--epochs=3", "--lr=0.05", "--seed=5")
    split = load(find_data("bundled", None)).first_training_samples(samples).train
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the job's processes have in these tests
    weights, epoch_losses = plain_loop(split, batch_size, epochs=3, lr=0.05, seed=5)
    torch.set_num_threads(threads)
    newest = max((run / "checkpoints").glob("step_*.pt"))
    ours = torch.load(newest, weights_only=True)["model"]
    assert set(ours) == set(weights)
    for name, weight in weights.items():
        if bitwise:
            assert torch.equal(ours[name], weight), name
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)
    assert [r["train/loss"] for r in metrics(run)[:-1]] == pytest.approx(epoch_losses, rel=1e-6)


def test_full_mnist_gives_the_same_first_epoch_at_1_2_and_4_processes(
    full_mnist: Path, tmp_path: Path
) -> None:
    flags = [f"--data={full_mnist / 'mnist.pkl.gz'}", "--epochs=1"]
    curves = {w: losses(completed_run(tmp_path, w, *flags)) for w in (1, 2, 4)}
    assert json.loads((tmp_path / "run-4" / "environment.json").read_text())["world_size"] == 4
    for world_size in (2, 4):
        assert curves[world_size] == pytest.approx(curves[1], rel=1e-5), world_size
