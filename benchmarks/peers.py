"""The same training with other libraries, each used as its documentation shows.

Every function trains and validates `Work` and yields the seconds of each epoch, validation
included. Tensors are in memory, as in the original script; no DataLoader has worker processes,
which would only cost more here. torchrun starts several processes of any of them.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mnist_dist.data import Split, find_data, load
from mnist_dist.model import MLP

LR = 0.001


@dataclass(frozen=True)
class Work:
    """The work of every contender."""

    data: str
    epochs: int
    global_batch_size: int

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def batch(self) -> int:
        """Local batch size."""
        return self.global_batch_size // self.world_size

    def datasets(self) -> tuple[TensorDataset, TensorDataset]:
        """Return training and validation with float32 pixels, as in the original script."""
        data = load(find_data(self.data, None))
        return _tensors(data.train), _tensors(data.validation)


def _tensors(split: Split) -> TensorDataset:
    return TensorDataset(split.images.to(torch.float32) / 256, split.labels)


def clock(epochs: int, epoch: Callable[[int], object]) -> Iterator[float]:
    for number in range(epochs):
        started = time.perf_counter()
        epoch(number)
        yield time.perf_counter() - started


def original(work: Work, device: torch.device | str = "cpu") -> Iterator[float]:
    """The single-process script that this project started from; batches are moved to `device`."""
    train, valid = work.datasets()
    train_loader = DataLoader(train, batch_size=work.batch, shuffle=True)
    valid_loader = DataLoader(valid, batch_size=2 * work.batch)
    model = MLP().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def loss_of_batch(images: Tensor, labels: Tensor, *, learn: bool) -> tuple[float, int]:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        if learn:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), len(images)

    def epoch(_: int) -> None:
        model.train()
        for images, labels in train_loader:
            loss_of_batch(images, labels, learn=True)
        model.eval()
        with torch.no_grad():
            results = [
                loss_of_batch(images, labels, learn=False) for images, labels in valid_loader
            ]
        sum(loss * count for loss, count in results) / sum(count for _, count in results)

    yield from clock(work.epochs, epoch)


def ddp_tutorial(work: Work) -> Iterator[float]:
    """The DDP tutorial: DistributedSampler, DataLoader, DistributedDataParallel."""
    distributed = work.world_size > 1
    if distributed:
        dist.init_process_group("gloo")
    train, valid = work.datasets()
    sampler: DistributedSampler[Any] | None = DistributedSampler(train) if distributed else None
    train_loader = DataLoader(train, work.batch, shuffle=not distributed, sampler=sampler)
    valid_sampler: DistributedSampler[Any] | None = None
    if distributed:
        valid_sampler = DistributedSampler(valid, shuffle=False)
    valid_loader = DataLoader(valid, 2 * work.batch, sampler=valid_sampler)
    bare = MLP()
    model: nn.Module = nn.parallel.DistributedDataParallel(bare) if distributed else bare
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def epoch(number: int) -> None:
        if sampler is not None:
            sampler.set_epoch(number)
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        total = torch.zeros(2)
        with torch.no_grad():
            for images, labels in valid_loader:
                loss = F.cross_entropy(model(images), labels)
                total += torch.tensor([loss * len(images), len(images)])
        if distributed:
            dist.all_reduce(total)

    yield from clock(work.epochs, epoch)


def fabric(work: Work) -> Iterator[float]:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    tool = Fabric(
        accelerator="cpu",
        devices=work.world_size,
        strategy="auto" if work.world_size == 1 else "ddp",
    )
    tool.launch()
    train, valid = work.datasets()
    train_loader = tool.setup_dataloaders(DataLoader(train, work.batch, shuffle=True))
    valid_loader = tool.setup_dataloaders(DataLoader(valid, 2 * work.batch))
    bare = MLP()
    model, optimizer = tool.setup(bare, torch.optim.SGD(bare.parameters(), lr=LR))

    def epoch(_: int) -> None:
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            tool.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
        model.eval()
        total = torch.zeros(2)
        with torch.no_grad():
            for images, labels in valid_loader:
                loss = F.cross_entropy(model(images), labels)
                total += torch.tensor([loss * len(images), len(images)])
        tool.all_reduce(total, reduce_op="sum")

    yield from clock(work.epochs, epoch)


def trainer(work: Work) -> Iterator[float]:
    """Lightning's Trainer; its loggers and checkpoints are off."""
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = MLP()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    seconds: list[float] = []

    class Clock(lightning.Callback):  # type: ignore[misc]
        started = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:  # validation comes before it
            seconds.append(time.perf_counter() - self.started)

    train, valid = work.datasets()
    lightning.Trainer(
        accelerator="cpu",
        devices=work.world_size,
        strategy="auto" if work.world_size == 1 else "ddp",
        max_epochs=work.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    ).fit(
        Classifier(),
        DataLoader(train, work.batch, shuffle=True),
        DataLoader(valid, 2 * work.batch),
    )
    yield from seconds


def accelerate(work: Work) -> Iterator[float]:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    tool = Accelerator(cpu=True)
    train, valid = work.datasets()
    bare = MLP()
    model, optimizer, train_loader, valid_loader = tool.prepare(
        bare,
        torch.optim.SGD(bare.parameters(), lr=LR),
        DataLoader(train, work.batch, shuffle=True),
        DataLoader(valid, 2 * work.batch),
    )

    def epoch(_: int) -> None:
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            tool.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
        model.eval()
        losses = []
        with torch.no_grad():
            for images, labels in valid_loader:
                loss = F.cross_entropy(model(images), labels, reduction="none")
                losses.append(tool.gather_for_metrics(loss))
        torch.cat(losses).mean().item()

    yield from clock(work.epochs, epoch)


def ignite(work: Work) -> Iterator[float]:
    """PyTorch Ignite's engines and its idist."""
    import ignite.distributed as idist
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Loss

    if work.world_size > 1:
        idist.initialize("gloo")
    train, valid = work.datasets()
    # idist's loaders take the global batch size and divide it.
    train_loader = idist.auto_dataloader(train, batch_size=work.global_batch_size, shuffle=True)
    valid_loader = idist.auto_dataloader(valid, batch_size=2 * work.global_batch_size)
    model = idist.auto_model(MLP())
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=LR))
    engine = create_supervised_trainer(model, optimizer, F.cross_entropy)
    evaluator = create_supervised_evaluator(model, {"loss": Loss(F.cross_entropy)})
    seconds: list[float] = []
    started = [0.0]
    engine.add_event_handler(
        Events.EPOCH_STARTED, lambda: started.__setitem__(0, time.perf_counter())
    )
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(valid_loader))
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seconds.append(time.perf_counter() - started[0])
    )
    engine.run(train_loader, max_epochs=work.epochs)
    yield from seconds


PEERS: dict[str, Callable[[Work], Iterator[float]]] = {
    "original script": original,
    "DDP tutorial": ddp_tutorial,
    "Fabric": fabric,
    "Lightning Trainer": trainer,
    "Accelerate": accelerate,
    "Ignite": ignite,
}
