"""How many processes the launch scripts start, by what nvidia-smi prints and CUDA would show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.distributed.gpu_count import count_gpus


def listing(*instances: int) -> str:
    """What `nvidia-smi --list-gpus` prints for GPUs with so many MIG instances each."""
    lines = []
    for number, count in enumerate(instances):
        lines.append(f"GPU {number}: NVIDIA A100-SXM4-40GB (UUID: GPU-{number}a{number}-55)")
        lines += [f"  MIG 1g.5gb     Device  {n}: (UUID: MIG-{n})" for n in range(count)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "visible", "count"),
    [
        (listing(0, 0, 0, 0), None, 4),
        (listing(0, 0, 0, 0), "", 0),
        (listing(0, 0, 0, 0), "-1", 0),
        (listing(0, 0, 0, 0), "NoDevFiles", 0),
        (listing(0, 0, 0, 0), "3, 1", 2),
        (listing(0, 0, 0, 0), "0,9,1", 1),
        (listing(0, 0, 0, 0), "1,1", 0),
        (listing(0, 0, 0, 0), "GPU-2a,GPU-3a3-55", 2),
        (listing(0, 0, 0, 0), "GPU-", 0),
        (listing(3), None, 1),
        (listing(3, 2), None, 1),
        (listing(0, 2, 0), None, 2),
        (listing(3, 2), "MIG-0,MIG-1", 1),
        ("", None, 0),
        ("", "0,1", 0),
        ("", "MIG-0", 0),
        ("No devices were found\n", None, 0),
    ],
)
def test_the_gpus_that_cuda_shows_are_counted(text: str, visible: str | None, count: int) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(text, chosen) == count


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("printf 'GPU 0: A (UUID: GPU-1)\\nGPU 1: A (UUID: GPU-2)\\n'", 2),
        ("echo 'GPU 0: A (UUID: GPU-1)'; exit 9", 0),
        ('echo "NVIDIA-SMI has failed because it couldn\'t communicate"; exit 9', 0),
        (None, 0),
    ],
    ids=["two", "lists-and-fails", "driver-not-loaded", "not-installed"],
)
def test_an_nvidia_smi_that_fails_counts_none(
    script: str | None, count: int, tmp_path: Path
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "mnist_dist.distributed.gpu_count"],
        env={**hidden, "PATH": f"{tmp_path}:/nowhere"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{count}\n", "")
