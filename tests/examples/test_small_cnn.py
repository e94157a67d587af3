"""`examples/small_cnn.patch`, as a new user applies it: the project works on the new model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import copy_checkout
from data_files import Digits, Pair, write_idx
from processes import ROOT, Ended, command, completed_run, metrics

PATCH = "examples/small_cnn.patch"
# Of 961 training images the last batch of 16 holds one: the second process has nothing to do then.
TRAIN_AND_VALIDATION, TEST = 1154, 300
FLAGS = ["train_ddp.py", "--data=fashion", "--epochs=2", "--global-batch-size=16", "--lr=0.02"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's files with the patch applied, and a folder `fashion` of images beside them."""
    directory = tmp_path_factory.mktemp("clone")
    copy_checkout(directory)
    for words in (["git", "init", "--quiet"], ["git", "apply", PATCH]):
        ended = command(directory, *words)
        assert ended.code == 0, ended.err
    write_idx(directory / "fashion", clothes(), ".gz")
    return directory


def clothes() -> Digits:
    """Images of ten kinds in Fashion-MNIST's shapes, one in ten of them with a random label."""
    random = np.random.default_rng(0)
    coarse = (random.random((10, 7, 7)) < 0.2).astype(np.uint8)
    patterns = coarse.repeat(4, 1).repeat(4, 2) * 160

    def some(count: int) -> Pair:
        kinds, others = random.integers(0, 10, (2, count), dtype=np.uint8)
        noise = random.integers(0, 64, (count, 28, 28), dtype=np.uint8)
        return patterns[kinds] + noise, np.where(random.random(count) < 0.1, others, kinds)

    return Digits(some(TRAIN_AND_VALIDATION), some(TEST))


def in_clone(clone: Path, *words: str) -> Ended:
    """The command as typed there; an installed copy of the project must not be what answers."""
    return command(clone, *words, environment={"PYTHONPATH": str(clone)})


def train(clone: Path, name: str, *program: str) -> Path:
    ended = in_clone(clone, *program, *FLAGS, f"--run-dir=runs/{name}")
    assert ended.code == 0, ended.out + ended.err
    assert "SmallCNN, 28,938 parameters" in ended.out
    several = "torchrun" in program
    ddp = "DistributedDataParallel, gradients over shared memory"
    assert f"\nstep   {ddp if several else 'single process'}\n" in ended.out
    return clone / "runs" / name


def test_the_patch_changes_fewer_than_twenty_lines_of_the_model_alone() -> None:
    lines = (ROOT / PATCH).read_text().splitlines()
    touched = [line.split()[1] for line in lines if line.startswith(("--- ", "+++ "))]
    assert touched == ["a/mnist_dist/model.py", "b/mnist_dist/model.py"]
    changed = [line for line in lines if re.match(r"[-+](?!-- |\+\+ )", line)]
    assert 2 <= len(changed) < 20


def test_the_new_model_learns_the_same_on_one_and_two_processes_and_is_evaluated_and_exported(
    clone: Path,
) -> None:
    alone = train(clone, "alone", "python")
    run = train(clone, "pair", "torchrun", "--nproc_per_node=2")
    *epochs, tested = metrics(run)
    for found, expected in zip(metrics(run), metrics(alone), strict=True):
        for tag in (tag for tag in expected if tag.endswith("/loss")):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5), tag
    assert epochs[-1]["train/loss"] < epochs[0]["train/loss"]
    assert tested["test/accuracy"] > 0.8, "ten kinds: chance is 0.1"
    evaluated = in_clone(clone, "mnist-dist", "evaluate", "runs/pair")
    assert evaluated.code == 0, evaluated.err
    right = round(tested["test/accuracy"] * TEST)
    assert f"accuracy {right / TEST:.2%}: {right} of {TEST} digits right" in evaluated.out
    exported = in_clone(clone, "mnist-dist", "export", "runs/pair", "--format", "torch")
    assert exported.code == 0, exported.err
    images = torch.from_numpy(clothes().test[0]).view(-1, 784).float() / 256
    program = torch.export.load(run / "checkpoints" / "best.pt2").module()
    predicted = program(images).argmax(1)
    assert (predicted == torch.from_numpy(clothes().test[1])).sum() == right


# Both doors in one interpreter: each would import torch for itself.
USE_OF_ANOTHER_MODEL = """
import sys, train_ddp
from mnist_dist.__main__ import main
run = sys.argv[1]
assert train_ddp.main([f"--run-dir={run}", "--data=bundled", "--train-samples=100"]) == 2
sys.exit(main(["predict", run, "docs/digit.jpg"]))
"""


def test_a_checkpoint_of_the_old_model_is_refused_in_one_line_and_stays_as_it_was(
    clone: Path, tmp_path: Path
) -> None:
    old = completed_run(tmp_path, 1, "--data=bundled", "--train-samples=100", "--epochs=1")
    (old / ".lock").unlink()  # it names the last process that held it
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    ended = in_clone(clone, "python", "-c", USE_OF_ANOTHER_MODEL, str(old))
    assert (ended.code, ended.out) == (2, "")
    resumed, predicted = ended.err.splitlines()
    assert "--run-dir: its checkpoint is of a model other than SmallCNN: it has no 1." in resumed
    assert (
        "best.pt: does not hold weights of this project's model, SmallCNN: it has no 1."
        in predicted
    )
    (old / ".lock").unlink()
    assert {file: file.read_bytes() for file in old.rglob("*") if file.is_file()} == before
