"""Freed memory is used again, not asked of the system anew."""

import sys
from pathlib import Path

import pytest
from processes import command

PROGRAM = """
import resource, sys
from mnist_dist.data import load, find_data
from mnist_dist.evaluation import evaluate
from mnist_dist.distributed.launcher import Launch
from mnist_dist.model import MLP
from mnist_dist.distributed.world import join

with join(Launch("alone"), "cpu", "auto") as world:
    model, split = MLP(), load(find_data("bundled", None)).train
    for _ in range(4):
        evaluate(model, split, world)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        evaluate(model, split, world)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults, and is about glibc")
def test_evaluations_after_the_first_few_take_no_new_memory_from_the_system() -> None:
    """Eight need 24,000 pages of pixels; left to itself malloc asks for thousands of them anew."""
    ended = command(Path(), sys.executable, "-c", PROGRAM)
    assert int(ended.out) < 800, ended
