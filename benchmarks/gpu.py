"""Seconds an epoch takes on one GPU: the original script moved there, eager DDP, ours.

python -m benchmarks.gpu --data ../shared/data/mnist.pkl.gz

An epoch is training and validation. Eager DDP has its data on the GPU, too, and indexes it there.
All take turns; the first epoch of each warms up. `--device cpu` tries the program out.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.jobs import train
from benchmarks.peers import LR, Work
from mnist_dist.model import MLP


def original(work: Work, device: torch.device) -> Iterator[float]:
    """Batches from a DataLoader on the CPU, each sent to the GPU."""
    training, validation = work.datasets()
    train_loader = DataLoader(training, work.batch, shuffle=True)
    valid_loader = DataLoader(validation, 2 * work.batch)
    model = MLP().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    while True:
        begun = time.perf_counter()
        for images, labels in train_loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for images, labels in valid_loader:
                F.cross_entropy(model(images.to(device)), labels.to(device)).item()
        yield time.perf_counter() - begun


def eager_ddp(work: Work, device: torch.device) -> Iterator[float]:
    """DistributedDataParallel in a group of one, data on the GPU, no graphs."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    training, validation = work.datasets()
    images, labels = (tensor.to(device) for tensor in training.tensors)
    valid_images, valid_labels = (tensor.to(device) for tensor in validation.tensors)
    bare = MLP().to(device)
    model = nn.parallel.DistributedDataParallel(bare)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    while True:
        begun = time.perf_counter()
        for part in torch.randperm(len(images), device=device).split(work.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        with torch.no_grad():
            F.cross_entropy(bare(valid_images), valid_labels).item()
        yield time.perf_counter() - begun


def ours(work: Work, device: torch.device, *flags: str) -> list[float]:
    """Seconds of the epochs of the real job, but for its first."""
    with tempfile.TemporaryDirectory() as directory:
        size = f"--global-batch-size={work.global_batch_size}"
        words = [f"--data={work.data}", f"--epochs={work.epochs}", size, f"--device={device.type}"]
        records = train(Path(directory) / "run", 1, *words, *flags)
    ends = [record["time"] for record in records if "val/loss" in record]
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as of train_ddp.py")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    work = Work(chosen.data, 4, chosen.batch)
    loops = {"original script": original(work, device), "eager DDP": eager_ddp(work, device)}
    for loop in loops.values():
        next(loop)
    seconds: dict[str, list[float]] = {}
    for _ in range(chosen.rounds):
        for name, loop in loops.items():
            seconds.setdefault(name, []).append(next(loop))
        for name, flags in (("ours, by autograd", ["--backward=autograd"]), ("ours", [])):
            seconds.setdefault(name, []).extend(ours(work, device, *flags))
    best = statistics.median(seconds["ours"])
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n")
    print("| | s an epoch | from to | times ours |\n|---|---|---|---|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"| {name} | {middle:.3f} | {spread} | {middle / best:.1f} |")


if __name__ == "__main__":
    main()
