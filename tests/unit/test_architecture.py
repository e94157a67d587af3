"""Imports point down the layers only, and functions stay short."""

import ast
from pathlib import Path

import pytest
from processes import ROOT

# From the ground up: a module may import from the layers below its own, and within its layer from
# the modules before it. A package counts as one module.
LAYERS = [
    ["errors", "dimensions", "files", "lock", "flags", "config", "torch_internals"],
    ["model", "optimizer", "distributed", "data"],
    ["sampling", "evaluation", "cuda_graphs", "fast", "run"],
    ["job", "steps", "train_ddp", "commands", "__main__"],
]
LEVEL = {name: level for level, name in enumerate(name for layer in LAYERS for name in layer)}
LONGEST_FUNCTION = 55
MODULES = sorted([*(ROOT / "mnist_dist").rglob("*.py"), ROOT / "train_ddp.py"])


def top_module(file: Path) -> str:
    """`mnist_dist/data/idx.py` and `mnist_dist.data.idx` are both in the module `data`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if len(parts) > 1 else parts[0]


def imported(file: Path) -> set[str]:
    """The project's modules that `file` imports anywhere, as in LAYERS."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            names = [node.module or ""]
            if node.module == "mnist_dist":
                names = [f"mnist_dist.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name == "train_ddp":
                found.add(name)
            if name.startswith("mnist_dist."):
                found.add(name.split(".")[1])
    return found - {"__version__"}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_down_the_layers_only(file: Path) -> None:
    own = top_module(file)
    if own == "__init__":
        if file.parent == ROOT / "mnist_dist":  # the door: lazily, so that it stays cheap
            assert imported(file) == {"errors", "commands"}
        return
    assert own in LEVEL, f"{own} has no layer yet: give it one here"
    for other in imported(file) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_only_the_job_sees_the_configuration() -> None:
    users = {top_module(file) for file in MODULES if "config" in imported(file)}
    assert users == {"train_ddp", "job"}


def test_only_one_module_reads_the_launchers_environment() -> None:
    markers = ("SLURM_", "TORCHELASTIC_", "LOCAL_RANK", "MASTER_ADDR")
    readers = {top_module(file) for file in MODULES if any(m in file.read_text() for m in markers)}
    assert readers == {"distributed"}


@pytest.mark.parametrize("folder", ["mnist_dist", "tests", "benchmarks", "."])
def test_no_function_is_longer_than_a_screen(folder: str) -> None:
    files = (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py")
    long = [
        f"{file.relative_to(ROOT)}:{node.name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert long == []
