"""Which device each process takes, with torch.cuda standing in for GPUs that are not there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, Ended, command

from mnist_dist.distributed.devices import pick_backend, pick_device, set_precision
from mnist_dist.distributed.launcher import Launch
from mnist_dist.errors import UserError

SCRIPT = str(ROOT / "train_ddp.py")
CPU = torch.device("cpu")
FakeGpus = Callable[..., list[str]]


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """A function that makes torch see `count` GPUs; it returns the list of what is then called."""

    def install(count: int, warning: str = "", init_error: str = "") -> list[str]:
        calls: list[str] = []

        def is_available() -> bool:
            if warning:
                warnings.warn(warning, stacklevel=2)
            return count > 0 and not warning

        def init() -> None:
            if init_error:
                raise RuntimeError(init_error)

        stand_ins: dict[str, Any] = {
            "is_available": is_available,
            "init": init,
            "device_count": lambda: count,
            "set_device": lambda device: calls.append(f"set_device {device}"),
            "Stream": lambda device: f"stream of {device}",
            "set_stream": lambda stream: calls.append(f"set_stream {stream}"),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return calls

    return install


def torchrun(local_rank: int, processes: int) -> Launch:
    """The place of a process among those of one node."""
    return Launch("torchrun", local_rank, local_rank, processes, processes)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_local_rank_and_a_stream_of_it(
    device: str, fake_gpus: FakeGpus
) -> None:
    calls, lines = fake_gpus(4), list[str]()
    for local_rank in range(3):
        calls.clear()
        name = f"cuda:{local_rank}"
        assert pick_device(torchrun(local_rank, 3), device, lines.append) == torch.device(name)
        assert calls == [f"set_device {name}", f"set_stream stream of {name}"]
    assert lines == []


@pytest.mark.parametrize(("gpus", "processes"), [(1, 2), (3, 4)])
def test_auto_with_fewer_gpus_than_processes_is_the_cpu_and_one_warning(
    gpus: int, processes: int, fake_gpus: FakeGpus
) -> None:
    calls = fake_gpus(gpus)
    for local_rank in range(processes):
        lines: list[str] = []
        assert pick_device(torchrun(local_rank, processes), "auto", lines.append) == CPU
        (line,) = lines  # init_distributed prints that of rank 0
        assert f"{processes} processes on a node with {gpus} GPU" in line
        assert "training on the CPU" in line
        assert f"--nproc_per_node={gpus}" in line
    assert calls == []


def test_too_few_gpus_for_srun_tasks_are_answered_by_sruns_flag(fake_gpus: FakeGpus) -> None:
    fake_gpus(2)
    lines: list[str] = []
    task = Launch("srun", 3, 3, 4, 4)
    assert pick_device(task, "auto", lines.append) == CPU
    assert lines[0].endswith("; --ntasks-per-node=2 uses the GPUs")
    with pytest.raises(UserError, match=r"start 2 or fewer \(--ntasks-per-node=2\)"):
        pick_device(task, "cuda")


def test_cuda_with_fewer_gpus_than_processes_is_refused_on_every_rank_alike(
    fake_gpus: FakeGpus,
) -> None:
    calls, texts = fake_gpus(2), set[str]()
    for local_rank in range(3):
        with pytest.raises(UserError) as caught:
            pick_device(torchrun(local_rank, 3), "cuda")
        texts.add(str(caught.value))
    (text,) = texts
    assert text.startswith("--device cuda: 3 processes on a node with 2 GPUs; start 2 or fewer")
    assert "\n" not in text
    assert calls == []


OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found 11040)"


@pytest.mark.parametrize("seen_by", ["is_available", "init"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_driver_that_is_too_old_is_a_warning_for_auto_and_else_an_error(
    seen_by: str, device: str, fake_gpus: FakeGpus
) -> None:
    message = f"{OLD_DRIVER}\nsecond line"
    if seen_by == "is_available":
        fake_gpus(2, warning=message)
    else:
        fake_gpus(2, init_error=message)
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's warning is not shown, too
        assert pick_device(torchrun(0, 2), "auto", lines.append) == CPU
        with pytest.raises(UserError) as caught:
            pick_device(torchrun(0, 2), device)
    (line,) = lines
    assert OLD_DRIVER in line
    assert "training on the CPU" in line
    assert str(caught.value) == (
        f"--device {device}: torch finds no usable GPU here ({OLD_DRIVER}); use --device cpu"
    )


def test_a_machine_without_gpus_is_the_cpu_without_a_warning(fake_gpus: FakeGpus) -> None:
    fake_gpus(0)
    lines: list[str] = []
    assert pick_device(torchrun(0, 2), "auto", lines.append) == CPU
    assert lines == []
    with pytest.raises(UserError, match="torch finds no usable GPU here; use --device cpu"):
        pick_device(torchrun(0, 2), "cuda")


def test_cpu_does_not_ask_for_gpus(fake_gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert pick_device(torchrun(0, 2), "cpu") == CPU


def test_a_gpu_beyond_the_last_is_refused(fake_gpus: FakeGpus) -> None:
    fake_gpus(1)
    with pytest.raises(UserError) as caught:
        pick_device(Launch("none"), "cuda:1")
    assert str(caught.value) == "--device cuda:1: this node has 1 GPU; use cuda:0"


def test_processes_that_share_a_gpu_use_gloo_and_nccl_is_refused(fake_gpus: FakeGpus) -> None:
    calls = fake_gpus(1)
    for local_rank in range(3):
        launch = torchrun(local_rank, 3)
        gpu = pick_device(launch, "cuda:0")
        assert gpu == torch.device("cuda:0")
        assert pick_backend(launch, gpu, "cuda:0", "auto") == "gloo"
        with pytest.raises(UserError, match=r"--backend nccl: processes share cuda:0"):
            pick_backend(launch, gpu, "cuda:0", "nccl")
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("device", "wanted", "backend", "expected"),
    [
        ("cuda:1", "auto", "auto", "nccl"),
        ("cuda:1", "cuda", "nccl", "nccl"),
        ("cuda:1", "cuda", "gloo", "gloo"),
        ("cpu", "auto", "auto", "gloo"),
    ],
)
def test_gpus_use_nccl_and_cpus_gloo_unless_the_user_chose(
    device: str, wanted: str, backend: str, expected: str
) -> None:
    assert pick_backend(torchrun(1, 2), torch.device(device), wanted, backend) == expected


def test_nccl_on_cpus_is_refused() -> None:
    with pytest.raises(UserError, match="--backend nccl: no GPU is used here"):
        pick_backend(torchrun(0, 2), CPU, "auto", "nccl")


def test_srun_tasks_that_see_one_gpu_each_take_number_0(fake_gpus: FakeGpus) -> None:
    """As under --gpus-per-task=1; with as many GPUs as tasks, each takes that of its number."""
    tasks = [Launch("srun", rank, rank, 2, 2) for rank in range(2)]
    fake_gpus(1)
    assert [pick_device(task, "auto") for task in tasks] == [torch.device("cuda:0")] * 2
    fake_gpus(2)
    assert [str(pick_device(task, "auto")) for task in tasks] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", ""])
def test_a_device_that_is_none_is_refused(device: str, fake_gpus: FakeGpus) -> None:
    fake_gpus(1)
    with pytest.raises(UserError, match=f"--device {device or repr(device)}: use auto, cpu, cuda"):
        pick_device(Launch("none"), device)


def our_lines(ended: Ended) -> list[str]:
    """What the job itself printed to stderr."""
    return [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]


def test_a_bad_device_on_the_command_line_is_one_line_and_no_run(tmp_path: Path) -> None:
    ended = command(tmp_path, "python", SCRIPT, "--data=bundled", "--device", "gpu")
    assert ended.code == 2
    assert ended.err == ("mnist-dist: error: --device gpu: use auto, cpu, cuda or cuda:N\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_under_torchrun_without_gpus_ends_with_one_line_of_rank_0(tmp_path: Path) -> None:
    words = ["torchrun", "--nproc_per_node=2", SCRIPT, "--data=bundled", "--device", "cuda"]
    ended = command(tmp_path, *words)
    assert ended.code != 0
    (line,) = our_lines(ended)
    assert line.startswith("mnist-dist: error: --device cuda: torch finds no usable GPU here")
    assert line.endswith("; use --device cpu")
    assert "exitcode  : 2" in ended.err
    assert list(tmp_path.iterdir()) == []


PRECISION = """
import sys, torch
from mnist_dist.distributed.devices import set_precision
print(torch.get_float32_matmul_precision())
set_precision(sys.argv[1], torch.device(sys.argv[2]))
print(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
print(torch.backends.cudnn.deterministic)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp32_is_float32_where_the_environment_asks_for_tf32(device: str) -> None:
    """As in NVIDIA's containers."""
    found = precision_after("fp32", device, {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})
    assert found == ["high", "highest False", "True"]


def test_tf32_is_set_for_matrix_products_and_convolutions() -> None:
    assert precision_after("tf32", "cuda", {}) == ["highest", "high True", "True"]


def precision_after(precision: str, device: str, environment: dict[str, str]) -> list[str]:
    """What torch computes in before and after `set_precision`, in an interpreter of its own."""
    words = ["python", "-c", PRECISION, precision, device]
    ended = command(ROOT, *words, environment=environment)
    assert ended.code == 0, ended.err
    return ended.out.splitlines()


def test_tf32_on_a_cpu_is_refused() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(UserError, match="--precision tf32: needs a GPU"):
        set_precision("tf32", CPU)
    assert torch.get_float32_matmul_precision() == before


def test_a_gpu_that_is_counted_but_cannot_be_used_is_a_warning_for_auto_and_else_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In exclusive mode, with full memory, or broken."""

    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    for name, stand_in in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "set_device": fail,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    warned: list[str] = []
    assert pick_device(Launch("none"), "auto", warned.append) == torch.device("cpu")
    assert len(warned) == 1
    assert "busy or unavailable" in warned[0]
    with pytest.raises(UserError, match="busy or unavailable"):
        pick_device(Launch("none"), "cuda")
