"""README's section on the trained model: its commands run in order, its program too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT


def blocks(language: str) -> list[str]:
    """The code blocks of the section "Use the model" in `language`."""
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Use the model\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_commands_and_the_program_of_use_the_model_run_as_written(tmp_path: Path) -> None:
    """On the bundled digits, which is what a reader without a network has."""
    pytest.importorskip("onnxruntime", reason="one of them needs the extra: pip install '.[onnx]'")
    for name in ("train_ddp.py", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_directory = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"}
    script = "set -ex\n" + "".join(blocks("bash"))
    for words in (["bash", "-c", script], [sys.executable, "-c", "".join(blocks("python"))]):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        if words[0] == "bash":
            assert re.search(r"^docs/digit\.jpg  5   0: ", done.stdout, re.MULTILINE)
            assert re.search(r"^runs/tuned +completed +bundled +4 +15/15 ", done.stdout, re.M)
    assert (tmp_path / "model.onnx").exists()
