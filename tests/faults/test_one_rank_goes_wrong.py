"""Contract C6: whatever goes wrong on one rank ends all of them, with its name and cause first."""

import re
from pathlib import Path

import pytest
from processes import Ended, command

SABOTAGE = str(Path(__file__).parent / "sabotage.py")
SMALL = ["--data=bundled", "--train-samples=300", "--epochs=3", "--step-timeout=20"]


def sabotaged(directory: Path, fault: str, *flags: str) -> Ended:
    """Three ranks, of which rank 1 has the fault."""
    words = ["torchrun", "--nproc_per_node=3", SABOTAGE, fault, "1", "--run-dir=run"]
    return command(directory, *words, *SMALL, *flags, timeout=100)


def ours(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("mnist-dist:")]


@pytest.mark.parametrize(
    ("fault", "first_line", "exit_code"),
    [
        ("raise_error", r"error: rank 1 failed: ValueError.*the cat sat on the keyboard", 1),
        ("out_of_memory", r"error: rank 1 failed: .*out of memory.*--global-batch-size", 1),
        ("not_a_number", r"error: .*step 5 .*rank 1 is not finite.*--lr", 1),
        ("other_weights", r"error: the weights differs?: rank 1", 2),
        ("flipped_weight", r"error: the weights of rank\(s\) 1 differ", 1),
        ("other_flag", r"error: --lr differs: rank 1 has 0\.75, rank 0 has 0\.001", 2),
        ("other_data", r"error: --train-samples differs: rank 1 has 250, rank 0 has 300", 2),
    ],
)
def test_all_ranks_end_and_the_first_line_names_rank_and_cause(
    fault: str, first_line: str, exit_code: int, tmp_path: Path
) -> None:
    ended = sabotaged(tmp_path, fault)
    assert ended.code == 1, "torchrun's own code for a failed worker"
    assert re.match(rf"mnist-dist: {first_line}", ours(ended)[0]), ended.err
    assert f"exitcode  : {exit_code} " in ended.err
    if fault == "raise_error":
        assert 'engine.py", line' in ended.err, "a bug has its whole traceback"
    elif exit_code == 2:
        assert len(ours(ended)) == 1


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    good = command(tmp_path, "torchrun", "--nproc_per_node=2", SABOTAGE, "not_a_number", "-1",
                   "--run-dir=run", *SMALL[:-1], "--epochs=1")  # fmt: skip
    assert good.code == 0, good.err
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    bad = sabotaged(tmp_path, "not_a_number", "--checkpoint-every-steps=1")
    # The fifth batch of this start is the fifth step of the second epoch.
    assert "step 10 (epoch 2) on rank 1 is not finite" in ours(bad)[0]
    after = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert set(before) & set(after) >= {"best.pt", "best.json"}
    assert "step_00000009.pt" in after
    assert "step_00000010.pt" not in after
    assert "not finite" in (tmp_path / "run" / "status.json").read_text()
