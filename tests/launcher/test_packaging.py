"""Wheel and sdist work away from the checkout; constraints.txt fits what the package asks for."""

import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkout import copy_checkout, project_files
from packaging.requirements import Requirement
from processes import ROOT, Ended, command

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

COMMANDS = """
import shutil
from pathlib import Path
import mnist_dist
from mnist_dist.__main__ import main
from mnist_dist.commands import evaluate
from mnist_dist.commands.doctor import command

print(mnist_dist.__file__)
shutil.copytree("runs/wheel", "runs/copy")
assert evaluate.main(["runs/wheel"]) == 0
assert main(["predict", "runs/wheel", "digit.jpg"]) == 0
assert main(["runs"]) == 0
assert main(["compare", "runs/wheel", "runs/copy"]) == 0
assert command.main(["--train"]) == 0
assert main(["export", "--help"]) == 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build` makes of an archive of this checkout: an sdist, and of it a wheel."""
    archive = tmp_path_factory.mktemp("archive")
    copy_checkout(archive)
    build(archive, "build_sdist")
    (sdist,) = (archive / "dist").glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    build(source, "build_wheel")
    (made,) = (source / "dist").glob("*.whl")
    return made


def build(source: Path, hook: str) -> None:
    program = f"import setuptools.build_meta as backend; backend.{hook}('dist')"
    ended = command(source, "python", "-c", program)
    assert ended.code == 0, ended.err


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel is installed, inside a git repository of something else."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "mine").write_text("text")
    for line in ("init -q", "add mine", "-c user.name=a -c user.email=a@b commit -qm mine"):
        assert command(repository, "git", *line.split()).code == 0
    directory = repository / "site"
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    ended = command(repository, "python", *words, f"--target={directory}", str(wheel))
    assert ended.code == 0, ended.err
    return directory


def installed(site: Path, directory: Path, *words: str) -> Ended:
    ended = command(directory, *words, environment={"PYTHONPATH": str(site)})
    assert ended.code == 0, ended.out + ended.err
    return ended


def test_the_wheel_holds_the_types_the_digits_and_the_reference_curve(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = ["py.typed", "data/bundled/mnist_5k.npz", "commands/doctor/reference.json"]
    assert {f"mnist_dist/{name}" for name in expected} <= names
    sources = {
        name for name in project_files() if re.match(r"(mnist_dist/.*|train_ddp)\.py$", name)
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_an_installed_wheel_trains_under_torchrun_and_runs_every_command(
    site: Path, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "docs" / "digit.jpg", tmp_path)
    words = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "mnist_dist", "train"]
    flags = ["--data=bundled", "--train-samples=500", "--epochs=1", "--run-dir=runs/wheel"]
    installed(site, tmp_path, *words, *flags)
    environment = json.loads((tmp_path / "runs" / "wheel" / "environment.json").read_text())
    assert environment["git_commit"] is None, "the repository around it is not this project's"
    ended = installed(site, tmp_path, "python", "-c", COMMANDS)
    assert ended.out.startswith(str(site)), "not the checkout"
    assert "OK" in ended.out
    version = installed(site, tmp_path, str(site / "bin" / "mnist-dist"), "--version").out
    assert version == f"mnist-dist {environment['mnist_dist']}\n"


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_dependency_to_a_version_that_the_package_accepts(
    python: str,
) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in valid}
    assert len(versions) == len(valid), "one pin for each"
    assert versions["torch"] == "2.13.0"
    for requirement in dependencies():
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def dependencies() -> list[Requirement]:
    """What pyproject.toml asks for, with the extras for tests and development."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|test|onnx|dev) = \[(.*?)\]$", text, re.M | re.S)
    found = [Requirement(each) for each in re.findall(r'"([^"]+)"', "\n".join(lists))]
    assert len(found) > 12
    return [requirement for requirement in found if requirement.name != "mnist-dist"]


def test_torch_has_no_upper_bound() -> None:
    (torch,) = (each for each in dependencies() if each.name == "torch")
    assert str(torch.specifier) == ">=2.11"
