"""Time an epoch on one GPU: the original script moved there, eager DDP, and the job.

python -m benchmarks.gpu --data ../shared/data/mnist.pkl.gz

An epoch is training and validation. Eager DDP, in a group of one process, has its data on the GPU;
so has the job, which needs no DDP for one process. All take turns, and the first epoch of each is a
warm-up. `--device cpu` only tries the program out.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.jobs import epochs_after_the_first, train
from benchmarks.peers import LR, Work, clock, original
from mnist_dist.model import MLP


def eager_ddp(work: Work, device: torch.device) -> Iterator[float]:
    """DistributedDataParallel in a group of one process, with its data on the GPU."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    training, validation = work.datasets()
    images, labels = (tensor.to(device) for tensor in training.tensors)
    valid_images, valid_labels = (tensor.to(device) for tensor in validation.tensors)
    bare = MLP().to(device)
    model = nn.parallel.DistributedDataParallel(bare)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def epoch(_: int) -> None:
        for indices in torch.randperm(len(images), device=device).split(work.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[indices]), labels[indices]).backward()
            optimizer.step()
        with torch.no_grad():
            F.cross_entropy(bare(valid_images), valid_labels).item()

    yield from clock(work.epochs, epoch)


def ours(work: Work, device: torch.device) -> list[float]:
    """Return the seconds of each epoch of the real job but the first."""
    with tempfile.TemporaryDirectory() as directory:
        size = f"--global-batch-size={work.global_batch_size}"
        words = [f"--data={work.data}", f"--epochs={work.epochs}", size, f"--device={device.type}"]
        records = train(Path(directory) / "run", 1, *words)
    return [seconds for seconds, _ in epochs_after_the_first(records)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    work = Work(chosen.data, 4, chosen.batch)
    endless = replace(work, epochs=chosen.rounds + 1)
    loops = {"original script": original(endless, device), "eager DDP": eager_ddp(endless, device)}
    for loop in loops.values():
        next(loop)
    seconds: dict[str, list[float]] = {}
    for _ in range(chosen.rounds):
        for name, loop in loops.items():
            seconds.setdefault(name, []).append(next(loop))
        seconds.setdefault("ours", []).extend(ours(work, device))
    base = statistics.median(seconds["ours"])
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n")
    print("| | s an epoch | from to | times ours |\n|---|---|---|---|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"| {name} | {middle:.3f} | {spread} | {middle / base:.1f} |")


if __name__ == "__main__":
    main()
