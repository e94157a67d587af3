"""What the GPU path promises. A check raises, or returns what it found in a few words.

Each runs in a process of its own. Those of `ON_ANY_DEVICE` also run where there is no GPU.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import jobs, models
from benchmarks.gpu.steps import Recipe, Steps, load_split, set_up, start_group_of_one
from mnist_dist.data import Split
from mnist_dist.distributed.launch_queue import LaunchQueue
from mnist_dist.distributed.process_group import leave_process_group
from mnist_dist.model import MLP

Check = Callable[[str], str]
ON_ANY_DEVICE: dict[str, Check] = {}
ON_GPUS: dict[str, Check] = {}


ALONE: set[str] = set()
"""Checks that find out how long something takes."""


def alone(check: Check) -> Check:
    ALONE.add(check.__name__)
    return check


def any_device(check: Check) -> Check:
    ON_ANY_DEVICE[check.__name__] = check
    return check


def on_gpu(check: Check) -> Check:
    ON_GPUS[check.__name__] = check
    return check


@any_device
def doctor_passes(device: str) -> str:
    command = [sys.executable, "-m", "mnist_dist", "doctor", f"--device={device}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=jobs.ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return next(line for line in ended.stdout.splitlines() if "devices" in line).strip()


@any_device
def graph_steps_equal_eager_steps(device: str) -> str:
    """Bitwise where all batches are full, so that both multiply matrices of the same shapes.

    Else to rounding, for a smooth model: a ReLU with an input within rounding of 0 has the slope 0
    in one run and 1 in the other.
    """
    whole = load_split("bundled", set_up(device))
    full = Split(whole.images[:3968], whole.labels[:3968])
    steps = 200 if device != "cpu" else 70
    same, apart = [], 0.0
    for batch in (64, 16, 8, 1):
        for recipe in (
            Recipe(batch),
            Recipe(batch, 0.01, 0.9, 1e-3),
            Recipe(batch, 0.01, 0.9, 0.0, "onecycle", 2),
        ):
            same.append(_difference(full, recipe, steps) == 0)
    assert all(same) or device == "cpu", f"not bitwise: {same}"  # on CPUs, updates are not fused
    for batch in (64, 48, 7):
        recipe = Recipe(batch, 0.01, 0.9)
        apart = max(apart, _difference(whole, recipe, 4 * steps, models.SmoothMLP))
    assert apart <= 1e-6, f"weights differ by {apart:.1e}"
    return f"{steps} steps: bitwise in {sum(same)} of {len(same)}; short batches: {apart:.1e}"


def _difference(
    split: Split,
    recipe: Recipe,
    steps: int,
    build: Callable[[], nn.Module] = MLP,
    ddp: bool = False,
) -> float:
    """Return the largest difference of a weight after eager steps and after a graph's."""
    eager = Steps(split, recipe, build=build, graphs=False, ddp=ddp)
    ours = Steps(split, recipe, build=build, ddp=ddp)
    expected, found = eager.take(steps), ours.take(steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours.close()
    return (eager.weights() - ours.weights()).abs().max().item()


@any_device
def ddp_graph_steps_equal_eager_ddp_steps(device: str) -> str:
    """In a process group of one: NCCL's all-reduce is in the graph."""
    chosen = set_up(device)
    whole = load_split("bundled", chosen)
    full = Split(whole.images[:3968], whole.labels[:3968])
    steps = 200 if device != "cpu" else 70
    start_group_of_one(chosen)
    same = [_difference(full, Recipe(b, 0.01, 0.9), steps, ddp=True) == 0 for b in (64, 8)]
    apart = _difference(whole, Recipe(48, 0.01, 0.9), steps, models.SmoothMLP, ddp=True)
    leave_process_group()
    assert all(same) or device == "cpu", f"not bitwise: {same}"
    assert apart <= 1e-6, f"weights differ by {apart:.1e}"
    return f"{steps} steps: bitwise in {sum(same)} of 2; short batches: {apart:.1e}"


@on_gpu
def losses_are_the_cpus(device: str) -> str:
    with jobs.directory() as path:
        cpu = jobs.train(path / "cpu", "--device=cpu").require()
        graphs = jobs.train(path / "a", f"--device={device}", "--cuda-graphs=auto").require()
        eager = jobs.train(path / "b", f"--device={device}", "--cuda-graphs=off").require()
        found = [jobs.apart(job.losses, cpu.losses) for job in (graphs, eager)]
        assert max(found) <= 1e-4, found
        assert "CUDA graphs of" in graphs.step, graphs.step
        return f"graphs within {found[0]:.1e}, eager {found[1]:.1e} ({graphs.step})"


@on_gpu
def runs_repeat_and_resume_bitwise(device: str) -> str:
    """Twice the same; 1 + 2 epochs; stopped in the middle of an epoch by SIGTERM."""
    flags = [f"--device={device}", "--cuda-graphs=auto", "--momentum=0.9"]
    with jobs.directory() as path:
        whole = jobs.train(path / "whole", *flags).require().weights()
        again = jobs.train(path / "again", *flags).require().weights()
        assert jobs.equal(whole, again), "two equal runs differ"
        jobs.train(path / "two", *flags, "--epochs=1").require()
        assert jobs.equal(whole, jobs.train(path / "two", *flags).require().weights()), "1 + 2"
    flags += ["--epochs=400", "--global-batch-size=8", "--keep-checkpoints=1"]
    flags += ["--checkpoint-every-epochs=400", "--tensorboard=minimal"]
    with jobs.directory() as path:
        whole = jobs.train(path / "whole", *flags, "--epochs=8").require().weights()
        started = time.monotonic()
        job = jobs.start(path / "cut", *flags)
        while not (path / "cut" / "metrics.jsonl").exists() or not _recorded(path / "cut"):
            assert time.monotonic() < started + 60
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        stopped = jobs.finish(path / "cut", job, started).require(75)
        epoch, step = stopped.status["epoch"], stopped.status["step"]
        assert epoch < 8, f"stopped too late, in epoch {epoch}"
        ended = jobs.train(path / "cut", *flags, "--epochs=8").require()
        assert jobs.equal(whole, ended.weights()), f"stopped at step {step}"
    return f"3 epochs twice, 1 + 2, and SIGTERM at step {step} and on: equal bits"


def _recorded(run: Path) -> bool:
    return b"val/loss" in (run / "metrics.jsonl").read_bytes()


@any_device
def a_model_that_draws_random_numbers_resumes_bitwise(device: str) -> str:
    flags = [f"--device={device}", "--cuda-graphs=auto"]
    with jobs.directory() as path:
        whole = jobs.train(path / "a", *flags, model="DropoutMLP").require()
        jobs.train(path / "b", *flags, "--epochs=1", model="DropoutMLP").require()
        resumed = jobs.train(path / "b", *flags, model="DropoutMLP").require()
        plain = jobs.train(path / "c", *flags).require()
        assert jobs.equal(whole.weights(), resumed.weights()), "1 + 2 epochs differ from 3"
        assert whole.losses != plain.losses, "nothing was dropped"
        return f"1 + 2 epochs equal 3, with dropout ({whole.step})"


@on_gpu
def a_cnn_trains(device: str) -> str:
    with jobs.directory() as path:
        flags = [f"--device={device}", "--epochs=2"]
        graphs = jobs.train(path / "a", *flags, "--cuda-graphs=auto", model="SmallCNN").require()
        again = jobs.train(path / "b", *flags, "--cuda-graphs=auto", model="SmallCNN").require()
        eager = jobs.train(path / "c", *flags, "--cuda-graphs=off", model="SmallCNN").require()
        cpu = jobs.train(path / "d", "--device=cpu", "--epochs=2", model="SmallCNN").require()
        found = [jobs.apart(job.losses, cpu.losses) for job in (graphs, eager)]
        assert max(found) <= 1e-3, found
        assert jobs.equal(graphs.weights(), again.weights()), "two equal runs differ"
        return f"losses within {max(found):.1e} of the CPU's; twice the same bits ({graphs.step})"


@any_device
@alone
def more_processes_than_gpus_is_one_line(device: str) -> str:
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    processes = max(2, gpus + 1)
    with jobs.directory() as path:
        auto = jobs.train(path / "a", "--epochs=1", processes=processes).require()
        forced = jobs.train(path / "b", "--device=cuda", processes=processes)
        ours = [line for line in forced.err.splitlines() if line.startswith("mnist-dist: ")]
        assert forced.code != 0
        assert len(ours) == 1, forced.err
        assert "--device cuda: " in ours[0]
        assert not (path / "b").exists(), "a run was created"
        warnings = [line for line in auto.err.splitlines() if "--device auto" in line]
        assert len(warnings) == (gpus > 0), auto.err
        assert ", cpu, gloo" in auto.out
        return f"auto: CPU{', one warning' * bool(gpus)}; cuda: {ours[0]} ({forced.seconds:.1f} s)"


@on_gpu
def no_step_waits_for_the_device(device: str) -> str:
    split = load_split("bundled", set_up(device))
    for graphs in (False, True):
        steps = Steps(split, Recipe(4, momentum=0.9, shift=1), graphs=graphs)
        steps.take(3)
        if steps.graphs is not None:
            rates = [0.05] * 300
            torch.cuda.set_sync_debug_mode("error")
            steps.graphs.take(rates)
        else:
            torch.cuda.set_sync_debug_mode("error")
            steps.take(300)
        torch.cuda.set_sync_debug_mode("default")
        steps.close()
    return "300 steps, eager and as graphs, without a synchronizing call"


@on_gpu
def a_failed_capture_is_clean(device: str) -> str:
    flags = [f"--device={device}", "--cuda-graphs=auto", "--epochs=1"]
    with jobs.directory() as path:
        reading = jobs.train(path / "a", *flags, model="ReadingMLP").require()
        eager = jobs.train(path / "b", f"--device={device}", "--cuda-graphs=off", "--epochs=1")
        assert "no CUDA graphs" in reading.step, reading.step
        same = jobs.equal(reading.weights(), eager.weights())
        assert same, "63 steps after the fall-back differ from eager ones"
        failed = jobs.train(path / "c", *flags, model="UncapturableMLP")
        ours = [line for line in failed.err.splitlines() if line.startswith("mnist-dist: ")]
        assert (failed.code, len(ours)) == (1, 1), (failed.code, failed.err)
        assert "--cuda-graphs off" in ours[0]
        assert "Traceback" not in failed.err
        assert failed.status["status"] == "failed", failed.status
        return f"reads: {reading.step}; else: {ours[0]}"


@on_gpu
def precisions_and_tools_work(device: str) -> str:
    flags = [f"--device={device}", "--cuda-graphs=auto"]
    found = []
    with jobs.directory() as path:
        plain = jobs.train(path / "fp32", *flags).require()
        variants = ("--precision=tf32", "--precision=bf16", "--compile", "--profile")
        for number, flag in enumerate(variants):
            job = jobs.train(path / str(number), *flags, flag).require()
            apart = jobs.apart(job.losses, plain.losses)
            assert apart < 0.02, f"{flag}: {apart}"
            found.append(f"{flag[2:]} {apart:.0e} ({job.step})")
        override = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
        forced = jobs.train(path / "forced", *flags, **override).require()
        assert jobs.equal(forced.weights(), plain.weights()), "the override changed fp32"
        assert not jobs.equal(jobs.Ended(0, "", "", 0, path / "0").weights(), plain.weights())
    return "; ".join([*found, "fp32 under the TF32 override: equal bits"])


@on_gpu
def two_ranks_share_one_gpu_over_gloo(device: str) -> str:
    found = []
    with jobs.directory() as path:
        for batch in (48, 5, 1):
            size = [f"--global-batch-size={batch}", "--train-samples=501", "--epochs=2"]
            gpu = jobs.train(path / f"g{batch}", *size, "--device=cuda:0", processes=2).require()
            cpu = jobs.train(path / f"c{batch}", *size, "--device=cpu").require()
            found.append(jobs.apart(gpu.losses, cpu.losses))
        assert max(found) <= 1e-4, found
        flags = ["--device=cuda:0", "--epochs=100000", "--step-timeout=20"]
        started = time.monotonic()
        job = jobs.start(path / "killed", *flags, processes=2)
        while not (path / "killed" / "metrics.jsonl").exists() or not _recorded(path / "killed"):
            assert time.monotonic() < started + 60
            time.sleep(0.05)
        victim = _children(job.pid)[1]
        os.kill(victim, signal.SIGKILL)
        ended = jobs.finish(path / "killed", job, started)
        lines = [line for line in ended.err.splitlines() if line.startswith("mnist-dist: rank")]
        assert lines, ended.err[-800:]
        assert ended.status["status"] == "failed", ended.status
        return f"losses within {max(found):.1e}; kill -9: {lines[0]}"


def _children(parent: int) -> list[int]:
    """Return the child processes of `parent`, the oldest first."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return sorted(int(pid) for pid, of in pairs if int(of) == parent)


@on_gpu
@alone
def a_nccl_group_survives_replays_and_ends(device: str) -> str:
    """2,000 replays with eager collectives in between, and the teardown, with and without reset."""
    chosen = set_up(device)
    split = load_split("bundled", chosen)
    found = []
    for reset in (True, False):
        start_group_of_one(chosen)
        steps = Steps(split, Recipe(2), steps_per_launch=1, ddp=True)
        for _ in range(20):
            steps.take(100)
            gathered = [torch.zeros(4, device=chosen)]
            dist.all_gather(gathered, torch.ones(4, device=chosen))
            assert gathered[0].sum().item() == 4
        if reset:
            steps.close()
        started = time.monotonic()
        teardown = threading.Thread(target=dist.destroy_process_group, daemon=True)
        teardown.start()
        teardown.join(10)
        assert not (reset and teardown.is_alive()), "the teardown hangs"
        seconds = time.monotonic() - started
        found.append("over 10 s" if teardown.is_alive() else f"{seconds:.2f} s")
    return f"teardown {found[0]} after reset, {found[1]} without"


@on_gpu
def a_job_whose_gpu_hangs_ends_in_time(device: str) -> str:
    flags = [f"--device={device}", "--step-timeout=2"]
    with jobs.directory() as path:
        ended = jobs.train(path / "a", *flags, model="HangingMLP").require(1)
        lines = [line for line in ended.err.splitlines() if line.startswith("mnist-dist: ")]
        assert len(lines) == 1, ended.err
        assert "Timed out after 2 s waiting for the GPU" in lines[0]
        assert ended.status["status"] == "failed", ended.status
        return f"{lines[0]}; status.json: failed"


@on_gpu
def a_gpu_that_does_not_answer_ends_in_time(device: str) -> str:
    chosen = set_up(device)
    queue = LaunchQueue(chosen, 2.0, lambda seconds: None)
    torch.cuda._sleep(20_000_000_000)  # cycles: about 10 s
    started = time.monotonic()
    try:
        queue.wait()
    except ConnectionError as error:
        seconds = time.monotonic() - started
        assert seconds < 4, seconds
        return f"{error} (raised after {seconds:.1f} s)"
    raise AssertionError("no error")


def run(name: str, device: str) -> NoReturn:
    """Run one check in this process, print its result as a line of JSON, and exit."""
    try:
        result = {"ok": True, "found": (ON_ANY_DEVICE | ON_GPUS)[name](device)}
    except Exception as error:
        traceback.print_exc()
        result = {"ok": False, "found": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)
    os._exit(0)  # even if threads are still waiting
