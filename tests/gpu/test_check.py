"""`python -m benchmarks.gpu --check`: on a GPU where there is one, else as much as a CPU can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.timeout(600)
def test_every_check_of_the_gpu_path_passes(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--check", f"--device={DEVICE}"],
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    checks = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [name for name, result in checks.items() if not result["ok"]] == [], ended.stdout
    assert "graph_steps_equal_eager_steps" in checks
    assert ended.returncode == 0
