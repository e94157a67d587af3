"""`mnist-dist export`: what it writes computes what the model computes, or nothing is written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import command
from torch import Tensor

import mnist_dist
from mnist_dist.__main__ import main
from mnist_dist.commands import export as export_command
from mnist_dist.data import find_data, load
from mnist_dist.errors import JobError


def batch(size: int) -> Tensor:
    return load(find_data("bundled", None)).validation.images[:size].float() / 256


def assert_agrees(logits: Tensor, images: Tensor, trained: Path) -> None:
    with torch.inference_mode():
        expected = mnist_dist.load_model(trained)(images)
    assert logits.shape == expected.shape
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(logits.softmax(1), expected.softmax(1), rtol=0, atol=1e-5)


def test_torch_export_computes_the_same_for_any_batch_without_this_package(
    trained: Path, tmp_path: Path
) -> None:
    ended = command(
        tmp_path, "python", "-m", "mnist_dist", "export", str(trained), "--format=torch",
        "--output=model.pt2",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    wrote, check, _ = ended.out.splitlines()
    assert "model.pt2" in wrote
    assert "differ from the model's by at most" in check
    sizes = (1, 3, 500)
    torch.save([batch(size) for size in sizes], tmp_path / "images.pt")
    use = (
        "import sys, torch; sys.modules['mnist_dist'] = None; "
        "model = torch.export.load('model.pt2').module(); "
        "logits = [model(images).detach() for images in torch.load('images.pt')]; "
        "torch.save(logits, 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", use], check=True, cwd=tmp_path)
    for size, logits in zip(sizes, torch.load(tmp_path / "logits.pt"), strict=True):
        assert_agrees(logits, batch(size), trained)


def test_onnx_computes_the_same_for_any_batch(trained: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install '.[onnx]'")
    exported = mnist_dist.export(trained, "onnx", tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"], "one file, weights inside"
    session = runtime.InferenceSession(str(exported.file), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    for size in (1, 3, 500):
        (logits,) = session.run(["logits"], {"images": batch(size).numpy()})
        assert_agrees(torch.from_numpy(logits), batch(size), trained)


def test_without_a_name_it_goes_beside_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine.pt"
    copy.write_bytes((trained / "checkpoints" / "best.pt").read_bytes())
    exported = mnist_dist.export(copy, "torch")
    assert exported.file == tmp_path / "mine.pt2"
    assert 0 <= exported.difference <= 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.pt", "mine.pt2"]


def test_an_export_that_computes_something_else_is_never_put_in_place(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter had a bug: it is given a model with one other weight."""
    honest = export_command._to_torch

    def wrong(model: torch.nn.Module) -> bytes:
        other = mnist_dist.load_model(trained)
        with torch.no_grad():
            other.state_dict()["out.bias"][3] += 0.01
        return honest(other)

    file = tmp_path / "model.pt2"
    file.write_text("what was there")
    monkeypatch.setattr(export_command, "_to_torch", wrong)
    with pytest.raises(JobError, match=r"model\.pt2: not written: .* differ by 1\.0e-02"):
        mnist_dist.export(trained, "torch", file)
    assert file.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_what_was_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.pt2"
    file.write_text("what was there")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(mnist_dist.UserError, match=r"--output .*model\.pt2: No space left"):
        mnist_dist.export(trained, "torch", file)
    assert file.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN"], "--format is missing"),
        (["RUN", "--format=tflite"], "--format"),
        (["RUN", "--format=torch", "--output=model.onnx"], "ends in .pt2"),
        (
            ["RUN", "--format=torch", "--output=nowhere/model.pt2"],
            "nowhere/model.pt2: No such",
        ),
        (["RUN", "--format=torch", "--output=taken.pt2"], "is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str],
    says: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.pt2").mkdir()
    given = [str(trained) if word == "RUN" else word for word in words]
    assert main(["export", *given]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("mnist-dist: error: ")
    assert says in line
    assert [p.name for p in tmp_path.iterdir()] == ["taken.pt2"]


def test_a_missing_package_is_named_with_what_to_install(trained: Path, tmp_path: Path) -> None:
    """In an interpreter that cannot find the package, as where the extra is not installed."""
    (tmp_path / "hide.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'onnx' else find(name, *a)\n"
        "from mnist_dist.__main__ import main\n"
        "sys.exit(main())\n"
    )
    ended = command(tmp_path, "python", "hide.py", "export", str(trained), "--format=onnx")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "the package onnx is missing; pip install onnx onnxscript onnxruntime" in line
