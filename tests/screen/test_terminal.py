"""What a person sees: at a terminal, in a pipe, in a log file."""

import os
import re
import sys
from pathlib import Path

import pytest
from processes import ROOT, Ended, command, metrics, run_main, run_ranks

from benchmarks import terminal

DATA = ["--data=bundled", "--train-samples=1600", "--global-batch-size=4"]
FLAGS = [*DATA, "--epochs=3", "--lr=0.05"]
STEPS = 400  # an epoch
PROGRESS = re.compile(r"step ([\d,]+)/([\d,]+)  loss (\d+\.\d{4})  [\d,]+ samples/s  [\d:]+ left")
LABELS = ["best", "test", "digits", "errors", "run", "view", "check", "extend"]


def launch(processes: int) -> list[str]:
    """How a person starts the job from its checkout."""
    bin_directory = Path(sys.executable).parent
    torchrun = [str(bin_directory / "torchrun"), f"--nproc_per_node={processes}"]
    return [*(torchrun if processes > 1 else [sys.executable]), str(ROOT / "train_ddp.py")]


def plain(text: str) -> bool:
    return all(character >= " " or character == "\n" for character in text)


def require_story(lines: list[str], run: Path) -> None:
    """A header, each epoch once with the recorded figures, a summary."""
    heads = [line.split()[0] for line in lines if not line.startswith("  in ")]
    assert heads[:3] == ["world", "data", "model"]
    *epochs, test = metrics(run)
    said = [line for line in lines if line.startswith("epoch ")]
    assert len(said) == len(epochs) == 3
    for line, record in zip(said, epochs, strict=True):
        assert line.startswith(f"epoch {record['epoch']}/3  step {record['step']:,}  ")
        assert f"train loss {record['train/loss']:.4f}" in line
        assert f"val loss {record['val/loss']:.4f}, {record['val/accuracy']:6.2%}" in line
        assert f"{record['perf/samples_per_second']:,.0f} samples/s" in line
        assert line.endswith(" left" if record["epoch"] < 3 else " total")
    end = heads.index("best")
    assert [head for head in heads[end:] if head != "final"] == LABELS
    (tested,) = [line for line in lines if line.startswith("test ")]
    assert f"accuracy {test['test/accuracy']:.2%} of 500 digits" in tested
    (digits,) = [line for line in lines if line.startswith("digits ")]
    shares = [f"{digit}: {share:.1%}" for digit, share in enumerate(test["test/accuracy_by_digit"])]
    assert digits.split(maxsplit=1)[1] == "  ".join(shares)
    (errors,) = [line for line in lines if line.startswith("errors ")]
    wrong = round((1 - test["test/accuracy"]) * 500)
    assert re.match(rf"errors {wrong} total; \d predicted as \d: \d+, ", errors)


def require_progress(found: list[tuple[str, str, str]]) -> None:
    """It grows, up to what there is to do."""
    steps = [int(step.replace(",", "")) for step, _, _ in found]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[-1] <= 3 * STEPS
    assert {total for _, total, _ in found} == {f"{3 * STEPS:,}"}
    assert all(0 < float(loss) < 3 for _, _, loss in found)


def test_a_terminal_has_one_line_of_progress_that_is_gone_in_the_end(tmp_path: Path) -> None:
    words = [*launch(2), *FLAGS, f"--run-dir={tmp_path / 'run'}"]
    code, said = terminal.record(words, columns=400)
    text = said.decode()
    assert code == 0, text
    require_progress(PROGRESS.findall(text))
    screen = terminal.screen(said, columns=400)
    lines = [line.rstrip() for line in screen.display]
    ours = lines[next(n for n, line in enumerate(lines) if line.startswith("world ")) :]
    require_story([line for line in ours if line], tmp_path / "run")
    assert not any(re.search(r"\d%\s*[|█▏]", line) for line in lines), "no bar is left behind"
    assert "\x1b[32m" in text, "a better epoch is green"


def test_no_color_is_honoured_at_a_terminal(tmp_path: Path) -> None:
    words = [*launch(1), *FLAGS, "--epochs=1", f"--run-dir={tmp_path / 'run'}"]
    code, said = terminal.record(words, environment={"NO_COLOR": "1", "FORCE_COLOR": "1"})
    assert code == 0, said
    assert b"samples/s" in said
    assert not re.search(rb"\x1b\[[\d;]*m", said)


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    words = [*launch(1), *FLAGS, "--epochs=1", f"--run-dir={tmp_path / 'run'}"]
    code, said = terminal.record(words, environment={"TERM": "dumb"})
    assert code == 0, said
    assert plain(said.decode().replace("\r\n", "\n"))


def test_a_pipe_gets_lines_without_control_characters(tmp_path: Path) -> None:
    ended = command(tmp_path, *launch(2), *FLAGS, "--run-dir=run")
    assert ended.code == 0, ended.err
    assert plain(ended.out)
    assert plain(ended.err)
    require_story(ended.out.splitlines(), tmp_path / "run")


def test_force_color_is_honoured_in_a_pipe(tmp_path: Path) -> None:
    words = [*launch(1), *FLAGS, "--epochs=1", "--run-dir=run"]
    ended = command(tmp_path, *words, environment={"FORCE_COLOR": "1", "NO_COLOR": ""})
    assert "\x1b[32m" in ended.out
    assert "\r" not in ended.out + ended.err, "colours, but no progress that is drawn over"


def run_with_many_lines(directory: str, flags: list[str]) -> Ended:
    """The job in this rank, which does not wait 10 s between two lines of progress."""
    from mnist_dist.run import console

    console._LINE_EVERY_S = 0.05
    return run_main(directory, flags)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_log_file_gets_lines_within_long_epochs(processes: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*FLAGS, f"--run-dir={run}"]
    first, *others = run_ranks(run_with_many_lines, processes, str(tmp_path), flags)
    assert first.code == 0, first.err
    assert plain(first.out)
    require_progress(PROGRESS.findall(first.out))
    for line in first.out.splitlines():
        if found := re.match(r"  in epoch (\d)/3  step ([\d,]+)/", line):
            assert -(-int(found[2].replace(",", "")) // STEPS) == int(found[1])
    require_story(first.out.splitlines(), run)
    assert [other.out + other.err for other in others] == [""] * (processes - 1)


def test_progress_continues_where_the_run_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*DATA, f"--run-dir={run}"]
    run_ranks(run_main, 1, str(tmp_path), [*flags, "--epochs=1"])
    (ended,) = run_ranks(run_with_many_lines, 1, str(tmp_path), [*flags, "--epochs=2"])
    steps = [int(step.replace(",", "")) for step, _, _ in PROGRESS.findall(ended.out)]
    assert steps
    assert min(steps) > STEPS
    assert f"epoch 2/2  step {2 * STEPS}  " in ended.out


def test_the_commands_that_it_ends_with_can_be_typed(tmp_path: Path) -> None:
    """`check` and `view` have tests of their own; this one extends the run as it says."""
    ended = command(tmp_path, *launch(2), *FLAGS, "--epochs=1", "--run-dir=a run/f\udce9rst")
    says = {line.split()[0]: line.split(maxsplit=1)[1] for line in ended.out.splitlines()}
    assert says["view"] == "tensorboard --logdir 'a run'"
    assert says["check"].endswith(r" evaluate $'a run/f\xe9rst'")
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    again = command(tmp_path, "bash", "-c", says["extend"], environment=path)
    assert again.code == 0, again.err
    assert f"resume at step {STEPS}, 1 epoch done" in again.out
    assert [r["epoch"] for r in metrics(tmp_path / "a run" / "f\udce9rst")] == [1, 1, 2, 2]


def test_a_run_whose_length_is_part_of_its_schedule_is_not_said_to_extend(tmp_path: Path) -> None:
    (ended,) = run_ranks(run_main, 1, str(tmp_path), [*FLAGS, "--epochs=1", "--schedule=onecycle"])
    assert ended.code == 0, ended.err
    assert "\nview " in ended.out
    assert "\nextend " not in ended.out


def test_a_warning_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    from mnist_dist.run.console import Console

    console = Console(enabled=True)
    for line in ("the disk is full", "the disk is full", "the data are few"):
        console.warn(line)
    assert capfd.readouterr().err.splitlines() == [
        "mnist-dist: warning: the disk is full",
        "mnist-dist: warning: the data are few",
    ]
