"""How fast the GPU path is, compared with the original script and eager DDP on the same GPU."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import jobs
from benchmarks.gpu.models import SmallCNN
from benchmarks.gpu.steps import Recipe, Steps, set_up, start_group_of_one
from benchmarks.peers import Work, clock, original
from mnist_dist.data import Split, find_data, load
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.process_group import leave_process_group
from mnist_dist.distributed.world import World
from mnist_dist.evaluation import evaluate
from mnist_dist.model import MLP

_ENDLESS = 10**6
_LAUNCHES = (1, 8, 32, 64)


def measure(data: str, device: str, rounds: int) -> dict[str, Any]:
    """Return all measurements, by name."""
    chosen = set_up(device)
    start_group_of_one(chosen)
    found: dict[str, Any] = {
        f"batch {batch}": _epochs(data, chosen, batch, rounds)
        for batch in ((64, 1024) if rounds else ())
    }
    leave_process_group()
    recipe = Recipe(256, 0.4, 0.9, 1e-4, "onecycle")
    found["98 % (MLP)"] = _time_to(data, chosen, MLP, 0.98, recipe, epochs=5)
    recipe = Recipe(128, 0.15, 0.9, 1e-4, "onecycle", shift=1)
    found["99 % (CNN)"] = _time_to(data, chosen, SmallCNN, 0.99, recipe, epochs=8)
    found["job"] = _job(data, device)
    return found


def _epochs(data: str, device: torch.device, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Time epochs of every contender in turn, after one to warm up."""
    dataset = load(find_data(data, None)).to(device)
    validation, split = dataset.validation, dataset.train
    recipe = Recipe(batch, 0.001)
    built = {
        "eager DDP": Steps(split, recipe, graphs=False, ddp=True),
        "ours, no graphs": Steps(split, recipe, graphs=False),
        "ours, DDP in the graph, K=32": Steps(split, recipe, 32, ddp=True),
    }
    captures = {}
    compiled = Steps(split, recipe, build=_compiled)
    built["ours, compiled, K=32"] = compiled
    for count in _LAUNCHES:
        _synchronize(device)
        started = time.perf_counter()
        built[f"ours, K={count}"] = Steps(split, recipe, count)
        _synchronize(device)
        captures[f"ours, K={count}"] = time.perf_counter() - started
    work = Work(data, _ENDLESS, batch)
    loops: dict[str, Iterator[float]] = {"original script": original(work, device)}
    loops |= {name: _own_epochs(steps, validation) for name, steps in built.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name, loop in loops.items():
            taken = next(loop)
            if turn:
                seconds[name].append(taken)
    steps_per_epoch = -(-len(split) // batch)
    found = {}
    for name, values in seconds.items():
        middle = statistics.median(values)
        found[name] = {
            "s/epoch": middle,
            "from": min(values),
            "to": max(values),
            "us/step": 1e6 * middle / steps_per_epoch,
            **(_profile(built[name]) if name in built and device.type == "cuda" else {}),
            **({"build and capture, s": captures[name]} if name in captures else {}),
        }
    for steps in built.values():
        steps.close()
    return found


def _own_epochs(steps: Steps, validation: Split) -> Iterator[float]:
    world = World(Launch("none"), validation.images.device, "none")

    def epoch(_: int) -> None:
        steps.take(steps.sharding.steps_per_epoch).tolist()
        evaluate(steps.bare, validation, world)

    yield from clock(_ENDLESS, epoch)


def _profile(steps: Steps) -> dict[str, float]:
    """Trace 128 steps: launches and kernels a step, and the share of time with a kernel."""
    from torch.profiler import ProfilerActivity, profile

    count = 128
    torch.cuda.reset_peak_memory_stats()
    steps.take(min(count, steps.sharding.steps_per_epoch)).tolist()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        taken = len(steps.take(min(count, steps.sharding.steps_per_epoch)).tolist())
        seconds = time.perf_counter() - started
    kernels = launches = 0
    busy = 0.0
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            kernels += 1
            busy += event.time_range.elapsed_us() / 1e6
        elif event.name in ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernelEx") or (
            event.name.startswith("cudaLaunchKernel")
        ):
            launches += 1
    return {
        "launches/step": launches / taken,
        "kernels/step": kernels / taken,
        "kernel us/step": 1e6 * busy / taken,
        "busy while traced": busy / seconds,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
    }


def _time_to(
    data: str,
    device: torch.device,
    build: Callable[[], nn.Module],
    target: float,
    recipe: Recipe,
    epochs: int,
) -> dict[str, Any]:
    """Train with three seeds until a test accuracy is reached; evaluations count, capture not."""
    dataset = load(find_data(data, None)).to(device)
    world = World(Launch("none"), device, "none")
    steps_per_epoch = -(-len(dataset.train) // recipe.batch)
    recipe = replace(recipe, total_steps=epochs * steps_per_epoch)
    seconds, accuracies, taken = [], [], 0
    for seed in range(3):
        steps = Steps(dataset.train, recipe, build=partial(_seeded, build, seed))
        _synchronize(device)
        started, accuracy, taken = time.perf_counter(), 0.0, 0
        while accuracy < target and taken < epochs:
            steps.take(steps_per_epoch)
            taken += 1
            accuracy = evaluate(steps.bare, dataset.test, world).accuracy
        seconds.append(time.perf_counter() - started)
        accuracies.append(accuracy)
        steps.close()
    return {"s": statistics.median(seconds), "of": seconds, "reached": accuracies, "epochs": taken}


def _compiled() -> nn.Module:
    compiled: nn.Module = torch.compile(MLP(), dynamic=False)  # type: ignore[assignment]
    return compiled


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def _job(data: str, device: str) -> dict[str, Any]:
    """The real job from its command line: seconds to the end of epoch 1, and its epoch times."""
    flags = [f"--data={data}", f"--device={device}", "--lr=0.001", "--epochs=6"]
    found: dict[str, Any] = {}
    with jobs.directory() as path:
        for graphs in ("auto", "off"):
            run = path / graphs
            started = time.monotonic()
            job = jobs.start(run, *flags, f"--cuda-graphs={graphs}", "--tensorboard=minimal")
            assert job.stdout is not None
            for line in job.stdout:
                if line.startswith("epoch 1/"):
                    break
            first = time.monotonic() - started
            jobs.finish(run, job, started).require()
            found[f"graphs {graphs}"] = {
                "start to the end of epoch 1, s": first,
                **_recorded_epochs(run),
            }
    return found


def _recorded_epochs(run: Path) -> dict[str, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "val/loss" in record]
    steps = [record["perf/step_ms"] * 1000 for record in records[1:]]
    times = [record["time"] for record in records]
    whole = [now - before for before, now in itertools.pairwise(times)]
    return {"us/step": statistics.median(steps), "s/epoch": statistics.median(whole)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
