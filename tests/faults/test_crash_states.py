"""After power losses, kills and full disks, a run ends like an undisturbed one."""

import shutil
import sys
from pathlib import Path

import pytest
from processes import ROOT, command


@pytest.mark.skipif(
    not shutil.which("cc"), reason="records file operations by a library built here"
)
def test_the_job_ends_as_if_undisturbed_after_power_losses_kills_and_full_disks(
    tmp_path: Path,
) -> None:
    """Thousands of other states: `python -m benchmarks.crash_states --states 5000 --seed N`."""
    # Fewer where the machine is busy: no time is asserted.
    counts = ["--states=14", "--kills=3", "--full-disks=3", "--seed=3", "--minutes=1"]
    words = [sys.executable, "-m", "benchmarks.crash_states", *counts, f"--keep={tmp_path}"]
    ended = command(ROOT, *words, timeout=290)
    assert ended.code == 0, ended.out + ended.err
