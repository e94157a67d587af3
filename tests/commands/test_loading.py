"""A run's directory or a checkpoint gives the model; anything else is one line."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, completed_run

import mnist_dist
from mnist_dist.__main__ import main
from mnist_dist.commands.loading import load_trained
from mnist_dist.model import MLP


def test_a_run_stands_for_its_best_checkpoint(trained: Path) -> None:
    model = mnist_dist.load_model(trained)
    saved = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)["model"]
    assert not model.training
    assert isinstance(model, MLP)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


def test_a_checkpoint_its_directory_and_a_copy_are_as_good(trained: Path, tmp_path: Path) -> None:
    best = trained / "checkpoints" / "best.pt"
    weights = torch.load(best, weights_only=True)["model"]
    torch.save(weights, tmp_path / "weights.pt")
    copy = shutil.copy(best, tmp_path / "copy.pt")
    for path in (best, str(best), best.parent, copy, tmp_path / "weights.pt"):
        loaded = mnist_dist.load_model(path).state_dict()
        assert torch.equal(loaded["out.weight"], weights["out.weight"]), path


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_weights_under_a_wrappers_prefix_are_taken(
    prefix: str, trained: Path, tmp_path: Path
) -> None:
    weights = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)["model"]
    torch.save({prefix + name: weight for name, weight in weights.items()}, tmp_path / "w.pt")
    loaded = mnist_dist.load_model(tmp_path / "w.pt").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_half_precision_weights_are_taken(trained: Path, tmp_path: Path) -> None:
    weights = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)["model"]
    torch.save({name: weight.half() for name, weight in weights.items()}, tmp_path / "w.pt")
    loaded = mnist_dist.load_model(tmp_path / "w.pt").state_dict()
    assert torch.equal(loaded["out.weight"], weights["out.weight"].half().float())


def damaged_configs(path: Path) -> Iterator[None]:
    """What can be in the place of config.json; yields after each is made."""
    path.unlink()
    os.mkfifo(path)
    yield
    path.unlink()
    path.symlink_to("/dev/zero")
    yield
    path.unlink()
    path.symlink_to(path.name)
    yield
    path.unlink()
    for content in (b"[" * 100_000, b"\xff{", b'{"data": 5, "cache_dir": ["x"]}', b"[1]"):
        path.write_bytes(content)
        yield


@pytest.mark.timeout(60)  # reading a FIFO would wait for a writer
def test_a_model_loads_whatever_is_in_the_place_of_config_json(
    trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for _ in damaged_configs(run / "config.json"):
        loaded = load_trained(run)
        assert (loaded.data, loaded.cache_dir) == (None, None)


def test_importing_the_package_does_not_import_torch() -> None:
    check = (
        "import sys, mnist_dist; assert 'torch' not in sys.modules; "
        "mnist_dist.list_runs; assert 'torch' not in sys.modules; "
        "mnist_dist.load_model; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_the_old_name_of_preprocess_image_still_works_and_warns() -> None:
    with pytest.deprecated_call(match="preprocess_image"):
        assert mnist_dist.prepare is mnist_dist.preprocess_image


def test_every_name_that_the_package_offers_is_there() -> None:
    assert set(mnist_dist.__all__) <= set(dir(mnist_dist))
    for name in mnist_dist.__all__:
        assert getattr(mnist_dist, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        mnist_dist.nonsense  # noqa: B018


class Trap:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def saved(trained: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    return content


def other_shape(trained: Path, file: Path) -> None:
    content = saved(trained)
    content["model"]["hidden1.weight"] = torch.zeros(64, 784)
    torch.save(content, file)


def not_finite(trained: Path, file: Path) -> None:
    content = saved(trained)
    content["model"]["out.bias"][3] = float("nan")
    torch.save(content, file)


def no_tensors(trained: Path, file: Path) -> None:
    torch.save({"model": dict.fromkeys(saved(trained)["model"], "weights")}, file)


def cut_short(trained: Path, file: Path) -> None:
    file.write_bytes((trained / "checkpoints" / "best.pt").read_bytes()[:5000])


def with_foreign_sidecar(trained: Path, file: Path) -> None:
    shutil.copy(trained / "checkpoints" / "best.pt", file)
    content = (trained / "checkpoints" / "best.json").read_text()
    wrong = {"sha256": "0" * 64, "replaces": None}
    assert "sha256" in content
    file.with_suffix(".json").write_text(str(wrong).replace("'", '"').replace("None", "null"))


def with_broken_sidecar(trained: Path, file: Path) -> None:
    shutil.copy(trained / "checkpoints" / "best.pt", file)
    file.with_suffix(".json").write_text("[]")


def of_another_project(trained: Path, file: Path) -> None:
    torch.save({"model": torch.nn.Linear(3, 4).state_dict(), "epoch": 3}, file)


def whole_module(trained: Path, file: Path) -> None:
    torch.save(MLP(), file)


def named_by_a_terminal(trained: Path, file: Path) -> None:
    torch.save(saved(trained)["model"] | {"a\nb\x1b[31m": torch.zeros(1)}, file)


def sparse(trained: Path, file: Path) -> None:
    weights = saved(trained)["model"]
    torch.save(weights | {"out.weight": weights["out.weight"].to_sparse()}, file)


def without_memory(trained: Path, file: Path) -> None:
    weights = saved(trained)["model"]
    torch.save(weights | {"out.weight": torch.empty(10, 256, device="meta")}, file)


def wrapped_twice_over(trained: Path, file: Path) -> None:
    weights = saved(trained)["model"]
    torch.save({f"{p}.{name}": w for name, w in weights.items() for p in ("a", "b")}, file)


BAD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "another project": (of_another_project, "does not hold weights of this project's model"),
    "a name for terminals": (named_by_a_terminal, "it has an unknown a\\nb\\x1b[31m"),
    "sparse weights": (sparse, "its out.weight is not a dense tensor"),
    "weights without memory": (without_memory, "its out.weight is not a dense tensor"),
    "two models": (wrapped_twice_over, "it has no hidden1.weight"),
    "a list": (lambda _, file: torch.save([1, 2], file), "does not hold weights"),
    "another shape": (other_shape, "hidden1.weight is (64, 784), this one's (128, 784)"),
    "no tensors": (no_tensors, "hidden1.weight is str"),
    "not finite": (not_finite, "its out.bias has values that are not finite"),
    "text": (lambda _, file: file.write_text("weights"), "not a checkpoint"),
    "empty": (lambda _, file: file.write_bytes(b""), "not a checkpoint"),
    "cut short": (cut_short, "not a checkpoint"),
    "a whole module": (whole_module, "not a checkpoint"),
    "a trap": (lambda _, file: torch.save({"model": Trap()}, file), "not a checkpoint"),
    "a bare trap": (lambda _, file: file.write_bytes(pickle.dumps(Trap())), "not a checkpoint"),
    "a foreign sidecar": (with_foreign_sidecar, "SHA-256 differs"),
    "a broken sidecar": (with_broken_sidecar, "not a checkpoint's sidecar"),
    "a directory": (lambda _, file: file.mkdir(), "not a run directory"),
    "nothing": (lambda _, file: None, "no such file or directory"),
    "a pipe": (lambda _, file: os.mkfifo(file), "not a regular file"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", ["predict", "export"])
def test_what_is_no_checkpoint_is_one_line_and_nothing_in_it_runs(
    command: str,
    kind: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make, says = BAD[kind]
    make(trained, tmp_path / "given.pt")
    before = sorted(tmp_path.iterdir())
    rest = {"predict": ["picture.png"], "export": ["--format=torch"]}[command]
    assert main([command, "given.pt", *rest]) == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("mnist-dist: error: given.")
    assert says in line
    assert "use a run directory or a checkpoint" in line
    assert said.out == ""
    assert sorted(tmp_path.iterdir()) == before, "nothing was made, and no trap sprung"


def test_a_run_without_a_finished_epoch_says_which_checkpoint_there_is(tmp_path: Path) -> None:
    run = completed_run(tmp_path, 1, "--data=bundled", "--train-samples=100", "--epochs=1")
    (run / "checkpoints" / "best.pt").unlink()
    with pytest.raises(mnist_dist.UserError, match=r"no best\.pt yet.*step_00000002\.pt"):
        mnist_dist.load_model(run)


def test_what_holds_no_model_yet_is_named_for_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "status.json").write_text("{}")
    with pytest.raises(mnist_dist.UserError, match=r"run: the run has no best\.pt: no epoch was"):
        mnist_dist.load_model(run)
    (run / "checkpoints").rmdir()
    with pytest.raises(mnist_dist.UserError, match=r"run: .*it has no checkpoints/best\.pt"):
        mnist_dist.load_model(run)
    with pytest.raises(mnist_dist.UserError, match=r"status\.json: not a checkpoint \(\*\.pt\)"):
        mnist_dist.load_model(run / "status.json")
