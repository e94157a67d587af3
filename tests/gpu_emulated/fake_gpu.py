"""A program: GPU code on fake CUDA tensors, which have shapes and devices but no values.

python fake_gpu.py LIBRARY PART [RUN] prints what PART did, as JSON. LIBRARY is built from
fake_gpu.cpp, and RUN is a completed run with 1,000 training samples.
Mixing CPU and GPU tensors in an operation fails as on a GPU. What a GPU would have to be waited
for, reading a value or copying to or from the CPU, is recorded.
"""

import ctypes
import json
import os
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, see fake_gpu.cpp

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

import train_ddp
from mnist_dist import evaluation
from mnist_dist.commands import evaluate, predict
from mnist_dist.commands.loading import load_trained
from mnist_dist.cuda_graphs import GraphSteps
from mnist_dist.data import Split, load
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.sync import RankSync
from mnist_dist.distributed.world import World
from mnist_dist.job import Job
from mnist_dist.model import MLP
from mnist_dist.optimizer import build_optimizer
from mnist_dist.run.state import TrainState
from mnist_dist.sampling import Sharding, global_batches

GPU = torch.device("cuda", 0)
SAMPLES, BATCH, SHIFT = 1000, 64, 2
_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "bincount"}
# What an operation whose result depends on values gives here.
_RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda t: t.new_empty((3, t.dim()), dtype=torch.int64),
    "bincount": lambda t: t.new_empty(100, dtype=torch.int64),
    "equal": lambda t: True,
}


class Waits(TorchDispatchMode):
    """Records each operation for which the host would wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        devices = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.operations += "cuda" in devices
        if name == "_fused_sgd_":  # has no implementation for fake tensors; works in place
            assert set(devices) == {"cuda"}
            return None
        if name in _READS and "cuda" in devices:
            self.found.append(name)
            return _RESULTS[name](args[0]) if name in _RESULTS else _number(args[0].dtype)
        if name in ("_local_scalar_dense", "item"):  # of a fake on the CPU
            return _number(args[0].dtype)
        result = func(*args, **kwargs)
        if name in ("to", "_to_copy", "copy_"):
            source = args[1 if name == "copy_" else 0].device.type
            if source != result.device.type:
                self.found.append(f"copy from {source} to {result.device.type}")
        return result

    def listed(self, action: Callable[[], object]) -> list[str]:
        """What `action` would wait for."""
        before = len(self.found)
        action()
        return self.found[before:]


def _number(dtype: torch.dtype) -> float:
    """Any value; as a float, evaluate's count of samples."""
    return float(SAMPLES) if dtype.is_floating_point else 1


def fake_mlp() -> nn.Module:
    """The job's model on the GPU."""
    model = MLP()
    for layer in (model.hidden1, model.hidden2, model.out):
        layer.weight = nn.Parameter(torch.empty(layer.weight.shape, device=GPU))
        layer.bias = nn.Parameter(torch.empty(layer.bias.shape, device=GPU))
    return model


def fake_split() -> Split:
    """A split on the GPU."""
    images = torch.empty(SAMPLES, 784, dtype=torch.uint8, device=GPU)
    return Split(images, torch.empty(SAMPLES, dtype=torch.int64, device=GPU))


class Rank:
    """What one rank of a run on fake GPUs holds."""

    def __init__(self, world: World, batch: int = BATCH, momentum: float = 0.9) -> None:
        self.world, self.split, self.model = world, fake_split(), fake_mlp()
        self.sharding = Sharding(SAMPLES, batch, world.rank, world.world_size)
        self.optimizer, self.scheduler = build_optimizer(
            self.model, 0.05, momentum, 1e-4, "constant", 1000
        )
        self.state = TrainState(self.model, self.optimizer, self.scheduler, {"seed": 0})
        self.sampler = DistributedSampler[int](self.split, world.world_size, world.rank)

    def eager_losses(self) -> Iterator[Tensor]:
        """The losses of an epoch's steps, as train_ddp.fit takes them."""
        batches = global_batches(self.split, self.sampler, self.sharding, 0, SHIFT)
        for images, labels, size in batches:
            scale = torch.full((), self.world.world_size / size, device=GPU)
            yield train_ddp.train_step(self.model, self.optimizer, images, labels, scale)

    def graph_steps(self, steps_per_launch: int) -> GraphSteps:
        """The same steps from tables."""
        return GraphSteps(
            train_ddp.train_step,
            self.model,
            self.optimizer,
            self.split,
            self.sharding,
            SHIFT,
            steps_per_launch,
        )


def launch(world_size: int, rank: int = 0) -> Launch:
    """A rank's place under torchrun, or the place of a process without launcher."""
    if world_size == 1:
        return Launch("none")
    return Launch("torchrun", rank, rank, world_size, world_size)


def eager_steps(waits: Waits) -> dict[str, Any]:
    """Waits in an epoch's first step and in each later one, with full and with empty shares."""
    found: dict[str, Any] = {}
    for world_size, batch in ((1, BATCH), (3, 2)):
        rank = Rank(World(launch(world_size, world_size - 1), GPU, "nccl"), batch)
        losses, taken = rank.eager_losses(), [torch.empty(())]
        first = waits.listed(lambda: taken.append(next(losses)))  # noqa: B023
        rest = waits.listed(lambda: taken.extend(next(losses) for _ in range(9)))  # noqa: B023
        found[f"{world_size} ranks"] = {
            "first": first,
            "rest": rest,
            "devices": sorted({str(loss.device) for loss in taken[1:]}),
        }
    return found


def graph_steps(waits: Waits) -> dict[str, Any]:
    """Waits in the body of the graphs, and around it."""
    found: dict[str, Any] = {}
    for world_size, batch in ((1, BATCH), (3, 2)):
        rank = Rank(World(launch(world_size, world_size - 1), GPU, "nccl"), batch)
        graphs = rank.graph_steps(4)
        graphs.start_epoch(rank.sampler, 0)
        before = waits.operations
        found[f"{world_size} ranks"] = {
            "one step": waits.listed(lambda: graphs._run(1)),  # noqa: B023
            "four steps": waits.listed(lambda: graphs._run(4)),  # noqa: B023
            "operations": waits.operations - before,
            "take": waits.listed(lambda: graphs.take([0.1] * 9)),  # noqa: B023
        }
    return found


def reading(waits: Waits) -> dict[str, Any]:
    """Waits of all that reads from the GPU between steps."""
    rank = Rank(World(launch(1), GPU, "none"))
    for loss in rank.eager_losses():
        rank.state.count_steps(loss)
    rank.state.count_steps(torch.empty(7, device=GPU))
    found: dict[str, Any] = {"drain": waits.listed(rank.state.drain_losses)}
    saved: dict[str, Any] = {}
    found["state_dict"] = waits.listed(lambda: saved.update(rank.state.state_dict(rank.world)))
    found["random states"] = [len(state) for state in saved["cuda_rng"]]
    results: list[evaluation.Evaluation] = []
    found["evaluate"] = waits.listed(
        lambda: results.append(evaluation.evaluate(rank.model, rank.split, rank.world, 16))
    )
    found["digest"] = waits.listed(rank.state.weights_digest)
    found["tensors"] = len(rank.model.state_dict())
    error = evaluation.ConfidentError(3, 1, 7, 0.9)
    result = evaluation.Evaluation(results[0].loss, results[0].confusion, (error,))
    dataset = type("Dataset", (), {"validation": rank.split})
    job: Any = type("Job", (), {"dataset": dataset})
    plots = Job.build_plots(job, rank.state, result)
    found["plots"] = [str(image.device) for image, _ in plots.errors]
    return found


def collectives(waits: Waits) -> dict[str, list[str]]:
    """The devices of the tensors that each call of a collective got, by what made the calls."""
    calls: list[str] = []

    def note(name: str, *tensors: Tensor) -> None:
        calls.append(" ".join([name, *sorted({t.device.type for t in tensors})]))

    dist.all_reduce = lambda tensor, *_, **__: note("all_reduce", tensor)

    def all_gather(gathered: list[Tensor], tensor: Tensor) -> None:
        note("all_gather", tensor, *gathered)
        raise EOFError("a fake tensor has no content to be unpickled")

    original = World.gather

    def gather(self: World, value: Any) -> list[Any]:
        assert not any(isinstance(t, Tensor) and t.is_cuda for t in tree_leaves(value))
        with suppress(EOFError):
            original(self, value)
        return [value] * self.world_size

    dist.all_gather = all_gather  # type: ignore[assignment]
    World.gather = gather  # type: ignore[method-assign]
    world = World(launch(2), GPU, "nccl")
    rank = Rank(world)
    sync = RankSync(world)
    parts: dict[str, Callable[[], object]] = {
        "connect": lambda: world.run_on_all(
            lambda: world.all_reduce_sum(torch.zeros(1, device=GPU))
        ),
        "sync": lambda: sync.exchange(),
        "sync of an epoch": lambda: sync.exchange(
            bad_step=3, payload=rank.state.local_payload(world)
        ),
        "state_dict": lambda: rank.state.state_dict(world),
        "evaluate": lambda: evaluation.evaluate(rank.model, rank.split, world, 16),
        "barrier": world.barrier,
        "check_equal": lambda: world.check_equal({"--data": "x"}, "y"),
    }
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        calls.clear()
        part()
        found[name] = list(calls)
    return found


def commands(waits: Waits) -> dict[str, Any]:
    """What evaluating and predicting with a trained model on the GPU wait for."""

    def from_disk(read: Callable[..., Any]) -> Callable[..., Any]:
        def outside(*arguments: Any) -> Any:
            with unset_fake_temporarily(), _disable_current_modes():
                return read(*arguments)

        return outside

    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        (evaluate, "load_trained", from_disk(load_trained)),
        (evaluate, "load", from_disk(load)),
        (predict, "read_digit", lambda file: (torch.empty(784, dtype=torch.uint8), ())),
    ]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    run, image = sys.argv[3], __file__  # any file
    models: list[nn.Module] = []
    config = evaluate.EvaluateConfig(run, split="train")
    world = World(launch(1), GPU, "none")

    def evaluated() -> None:
        models.append(evaluate._evaluate(config, world, print)[0].model)

    found = {"evaluate": waits.listed(evaluated)}
    found["predict"] = waits.listed(lambda: predict.predict(models[0], [image]))
    return found


PARTS: dict[str, Callable[[Waits], dict[str, Any]]] = {
    "eager_steps": eager_steps,
    "graph_steps": graph_steps,
    "reading": reading,
    "collectives": collectives,
    "commands": commands,
}


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Let the block create tensors on GPU 0; what has no values gives zeros."""
    waits = Waits()

    def tolist(tensor: FakeTensor) -> Any:
        if tensor.is_cuda:
            waits.found.append("tolist")
        return np.zeros(tuple(tensor.shape)).tolist()

    def numpy(tensor: FakeTensor) -> Any:
        assert tensor.device.type == "cpu"
        return np.zeros(tuple(tensor.shape), np.float32)

    for name, stand_in in (("tolist", tolist), ("numpy", numpy)):
        setattr(FakeTensor, name, stand_in)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        yield waits


if __name__ == "__main__":
    with fake_gpu() as recorded:
        result = PARTS[sys.argv[2]](recorded)
    print(json.dumps(result), flush=True)
    os._exit(0)  # autograd's thread for the GPU would abort the interpreter's shutdown
