"""Capturing the steps as graphs, with stand-ins for CUDA graphs on the CPU.

A stand-in records each operation with the tensors it worked on, and a replay runs them again on
the same memory, as a CUDA graph does.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from digits import DropoutMLP, flat_weights, random_split
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DistributedSampler

import train_ddp
from mnist_dist.cuda_graphs import GraphSteps, obstacle
from mnist_dist.errors import JobError
from mnist_dist.model import MLP
from mnist_dist.optimizer import build_optimizer, gradient_norm
from mnist_dist.sampling import Sharding
from mnist_dist.torch_internals import mark_stepped

SAMPLES, BATCH, SHIFT = 211, 48, 2


class Recording(TorchDispatchMode):
    """Adds each operation to a graph."""

    def __init__(self, operations: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))

        def alias(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        self.operations.append((func, *(tree_map(alias, x) for x in (args, kwargs or {}, result))))
        return result


class StandInGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Any] = []
        self.replays = 0
        self.is_reset = False

    def replay(self) -> None:
        assert not self.is_reset
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.is_reset = True


class StandIns:
    """What the product asked of the stand-ins."""

    def __init__(self) -> None:
        self.captures = 0
        self.sync_modes: list[str] = []
        self.failure: Exception | None = None
        """Raised by the next capture."""

    @contextlib.contextmanager
    def graph(self, graph: StandInGraph, **options: Any) -> Iterator[None]:
        assert options == {"stream": "the stream", "capture_error_mode": "thread_local"}
        self.captures += 1
        with Recording(graph.operations):
            yield
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    found = StandIns()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", found.graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.sync_modes.append)
    return found


class Trainer:
    """A model, its optimizer and GraphSteps, in one process."""

    def __init__(self, model: type[nn.Module] = MLP, momentum: float = 0.9) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.sharding = Sharding(SAMPLES, BATCH, 0, 1)
        steps = 2 * self.sharding.steps_per_epoch
        self.optimizer, self.scheduler = build_optimizer(
            self.model, 0.05, momentum, 1e-3, "onecycle", steps
        )
        mark_stepped(self.optimizer)
        split = random_split(SAMPLES)
        self.sampler = DistributedSampler[int](split, 1, 0)
        self.launches = 0
        self.graphs = GraphSteps(
            train_ddp.train_step,
            self.model,
            self.optimizer,
            split,
            self.sharding,
            SHIFT,
            2,
            self.count_launch,
        )

    def count_launch(self) -> None:
        self.launches += 1

    def train_epoch(self, epoch: int) -> Tensor:
        """Take an epoch's five steps; their losses."""
        self.sampler.set_epoch(epoch)
        self.graphs.start_epoch(self.sampler, 0)
        rates = []
        for _ in range(self.sharding.steps_per_epoch):
            rates.append(self.optimizer.param_groups[0]["lr"])
            if self.scheduler is not None:
                self.scheduler.step()
        return self.graphs.take(rates).clone()

    def snapshot(self) -> list[Any]:
        """Weights, momentum, random state and learning rate."""
        states = [t.clone() for state in self.optimizer.state.values() for t in state.values()]
        rate = torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)
        return [flat_weights(self.model), *states, torch.get_rng_state(), rate]


def is_same(before: list[Any], after: list[Any]) -> bool:
    """Whether two snapshots have the same bits."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


@pytest.mark.parametrize("model", [MLP, DropoutMLP])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_replayed_graphs_give_the_bits_of_the_steps_they_hold(
    model: type[nn.Module], momentum: float, stand_ins: StandIns
) -> None:
    captured, plain = Trainer(model, momentum), Trainer(model, momentum)
    captured.graphs.capture()
    assert stand_ins.captures == 2
    for epoch in range(2):
        torch.manual_seed(epoch)
        losses = captured.train_epoch(epoch)
        torch.manual_seed(epoch)
        assert torch.equal(losses, plain.train_epoch(epoch))
        assert is_same(captured.snapshot(), plain.snapshot())
        # Where the logged gradient norm is read, whichever graph had the last step.
        assert gradient_norm(captured.model.parameters()) == gradient_norm(plain.model.parameters())
    graphs: Any = captured.graphs._graphs
    assert {steps: graph.replays for steps, graph in graphs.items()} == {1: 2, 2: 4}
    assert captured.launches == 6


@pytest.mark.parametrize("has_trained", [False, True])
def test_capturing_changes_nothing(has_trained: bool, stand_ins: StandIns) -> None:
    trainer = Trainer(DropoutMLP)
    if has_trained:
        trainer.train_epoch(0)
    before = trainer.snapshot()
    trainer.graphs.capture()
    after = trainer.snapshot()
    momentum = after[1:-2]
    assert len(momentum) == 6
    if not has_trained:  # the optimizer had no momentum yet, and now has its first
        assert not any(buffer.any() for buffer in momentum)
        after = [after[0], *after[-2:]]
    assert is_same(before, after)
    assert stand_ins.sync_modes == ["error", "default"]


def make_reading_model(stand_ins: StandIns) -> type[nn.Module]:
    """A model whose forward pass reads from the device, which raises in the mode "error"."""

    class ReadingMLP(DropoutMLP):
        def forward(self, images: Tensor) -> Tensor:
            if stand_ins.sync_modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation\nmore of it")
            return super().forward(images)

    return ReadingMLP


@pytest.mark.parametrize("has_trained", [False, True])
def test_a_step_that_reads_from_the_device_is_not_captured_and_nothing_has_changed(
    has_trained: bool, stand_ins: StandIns
) -> None:
    model = make_reading_model(stand_ins)
    trainer, other = Trainer(model), Trainer(model)
    if has_trained:
        for either in (trainer, other):
            torch.manual_seed(6)
            either.train_epoch(0)
    torch.manual_seed(7)
    before = trainer.snapshot()
    assert trainer.graphs.capture() == "called a synchronizing CUDA operation"
    after = trainer.snapshot()
    assert is_same(before, after if has_trained else [after[0], *after[-2:]])
    assert stand_ins.sync_modes == ["error", "default"]
    assert stand_ins.captures == 0
    torch.manual_seed(8)
    losses = trainer.train_epoch(1)
    torch.manual_seed(8)
    assert torch.equal(losses, other.train_epoch(1))
    assert is_same(trainer.snapshot(), other.snapshot())


def test_a_capture_that_fails_ends_the_job_with_one_line(stand_ins: StandIns) -> None:
    stand_ins.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    trainer = Trainer()
    with pytest.raises(JobError) as caught:
        trainer.graphs.capture()
    assert str(caught.value) == (
        "--cuda-graphs auto: the training step could not be captured (operation not permitted "
        "when stream is capturing); use --cuda-graphs off"
    )
    assert stand_ins.captures == 1
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 25)


def test_closing_frees_the_graphs_and_no_later_step_uses_them(stand_ins: StandIns) -> None:
    trainer = Trainer()
    trainer.graphs.capture()
    graphs: list[Any] = list(trainer.graphs._graphs.values())
    trainer.graphs.close()
    assert [graph.is_reset for graph in graphs] == [True, True]
    trainer.train_epoch(0)
    assert [graph.replays for graph in graphs] == [0, 0]


@pytest.mark.parametrize(
    ("make", "is_there"),
    [
        (MLP, False),
        (DropoutMLP, False),
        (lambda: nn.Sequential(MLP(), nn.BatchNorm1d(10)), True),
        (lambda: nn.Sequential(nn.Sequential(nn.SyncBatchNorm(10))), True),
    ],
)
def test_only_models_that_mix_samples_have_an_obstacle(
    make: Callable[[], nn.Module], is_there: bool
) -> None:
    model = make()
    optimizer, _ = build_optimizer(model, 0.1, 0.9, 0.0, "constant", 1)
    assert (obstacle(model, optimizer) is not None) == is_there


def test_another_optimizer_is_an_obstacle_as_its_state_may_not_start_as_zeros() -> None:
    model = MLP()
    assert "NAdam" in (obstacle(model, torch.optim.NAdam(model.parameters())) or "")


class CountingMLP(DropoutMLP):
    """Has a buffer that no checkpoint holds, and that each step changes."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add_(len(images))
        return super().forward(images)


def test_capturing_puts_buffers_back_that_no_checkpoint_holds(stand_ins: StandIns) -> None:
    trainer = Trainer(CountingMLP)
    trainer.graphs.capture()
    (seen,) = trainer.model.buffers()
    assert seen == 0
