"""A failure on one rank ends all of them, and its rank and cause are printed first."""

import json
import os
import re
from pathlib import Path

import pytest
from data_files import digits, write_npz
from processes import Ended, command, completed_run, hosts_of, run_main, run_ranks
from sabotage import FAULTS

SABOTAGE = str(Path(__file__).parent / "sabotage.py")
# The step timeout is longer than any test waits: none of the ends here may come by it.
SMALL = ["--data=bundled", "--train-samples=300", "--epochs=3", "--step-timeout=250"]
PATIENCE_S = 100


def under_torchrun(directory: Path, fault: str, *flags: str) -> Ended:
    """Three ranks, of which rank 1 has the fault."""
    words = ["torchrun", "--nproc_per_node=3", SABOTAGE, fault, "1", "--run-dir=run"]
    return command(directory, *words, *SMALL, *flags, timeout=PATIENCE_S)


def forked(directory: str, fault: str, flags: list[str]) -> Ended:
    """The same in a rank that is there already."""
    if os.environ["RANK"] == "1":
        FAULTS[fault](flags)
    return run_main(directory, flags)


def ours(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("mnist-dist:")]


@pytest.mark.parametrize(
    ("fault", "first_line"),
    [
        ("raise_error", r"error: rank 1 failed: ValueError.*the cat sat on the keyboard"),
        ("out_of_memory", r"error: rank 1 failed: .*out of memory.*--global-batch-size"),
    ],
)
def test_a_rank_that_fails_takes_the_others_down_and_its_cause_comes_first(
    fault: str, first_line: str, tmp_path: Path
) -> None:
    ended = under_torchrun(tmp_path, fault)
    assert ended.code == 1
    first, *others = ours(ended.err)
    assert re.match(rf"mnist-dist: {first_line}", first), ended.err
    assert all("rank 1 failed" in line for line in others)
    assert 'train_ddp.py", line' in ended.err, "a bug has its whole traceback"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["resumable"]) == ("failed", False), "it would fail again"


@pytest.mark.parametrize(
    ("fault", "line", "exit_code"),
    [
        ("not_a_number", r"error: .*step 5 .*rank 1 is not finite.*--lr", 1),
        ("other_weights", r"error: the weights differs?: rank 1", 2),
        (
            "flipped_weight",
            r"error: the weights of rank 1 differ from the other ranks' after",
            1,
        ),
        ("other_data", r"error: --data differs: rank 1 has auto, rank 0 has bundled", 2),
        ("other_flag", r"error: --lr differs: rank 1 has 0\.75, rank 0 has 0\.001", 2),
    ],
)
def test_what_the_ranks_find_together_is_one_line_and_ends_all(
    fault: str, line: str, exit_code: int, tmp_path: Path
) -> None:
    flags = [*SMALL, f"--run-dir={tmp_path / 'run'}"]
    first, *others = run_ranks(forked, 3, str(tmp_path), fault, flags, timeout=PATIENCE_S)
    assert [first.code, *(other.code for other in others)] == [exit_code] * 3
    (said,) = ours(first.err)
    assert re.match(rf"mnist-dist: {line}", said)
    assert "".join(other.err for other in others) == ""


def test_of_two_ranks_that_differ_neither_is_accused(tmp_path: Path) -> None:
    flags = [*SMALL, f"--run-dir={tmp_path / 'run'}"]
    first, _ = run_ranks(forked, 2, str(tmp_path), "flipped_weight", flags, timeout=PATIENCE_S)
    assert "check all nodes' memory" in first.err


def in_its_hosts_directory(base: str, flags: list[str]) -> Ended:
    return run_main(f"{base}/{os.environ['GROUP_RANK']}", flags)


def test_a_host_with_other_data_under_the_same_name_is_named(tmp_path: Path) -> None:
    for host in (0, 1):
        write_npz(tmp_path / str(host) / "mnist.npz", digits(train=60, test=10, seed=host))
    flags = ["--data=mnist.npz", "--epochs=1", f"--run-dir={tmp_path / 'run'}"]
    environments = hosts_of(2, 1)
    ended = run_ranks(
        *(in_its_hosts_directory, 3, str(tmp_path), flags),
        environments=environments,
        timeout=PATIENCE_S,
    )
    assert [rank.code for rank in ended] == [2] * 3
    (said,) = ours(ended[0].err)
    assert re.match(r"mnist-dist: error: the data differs: rank 2 has \w+, rank 0 has \w+;", said)
    assert "".join(other.err for other in ended[1:]) == ""
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = completed_run(tmp_path, 3, *SMALL, "--epochs=1")
    flags = [*SMALL, f"--run-dir={run}", "--checkpoint-every-steps=1"]
    first, *_ = run_ranks(forked, 3, str(tmp_path), "not_a_number", flags)
    # The fifth batch of this start is the fifth step of the second epoch.
    assert "step 10 (epoch 2) on rank 1 is not finite" in first.err
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"best.pt", "step_00000009.pt"} <= names
    assert "step_00000010.pt" not in names
    assert "not finite" in (run / "status.json").read_text()
