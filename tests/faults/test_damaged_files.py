"""A sample of damaged files: every command works on them, or ends with a line that names the file.

`python -m benchmarks.damaged_files --combinations 1000` tries more.
"""

import pytest

from benchmarks.damaged_files import Combination, Outcome, Trials

_SEED = 3
_COUNT = 12


def test_no_command_hangs_raises_executes_or_changes_another_file(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    trials = Trials(tmp_path_factory.mktemp("damaged"), ["train", "evaluate", "predict", "runs"])
    faults = []
    for combination in trials.combinations(_SEED, _COUNT):
        outcome, fault = trials.run(combination)
        if fault:
            faults.append(f"{combination}: {fault}\n{outcome.out}{outcome.err}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, "[]", "", ()), None),
        (Outcome(2, "", "mnist-dist: error: run/status.json: empty\n", ()), None),
        (Outcome(None, "", "", ()), "hangs"),
        (Outcome(1, "", "Traceback (most recent call last):\n", ()), "traceback"),
        (Outcome(0, "\x1b[31m", "", ()), "prints control characters"),
        (Outcome(0, "[]", "", ("executed",)), "executed"),
        (Outcome(0, "[]", "", ("other/file",)), "changed other/file"),
        (Outcome(1, "", "", ()), "exit code 1 with 0 lines of error"),
        (Outcome(2, "", "mnist-dist: error: run: no run\n", ()), "names another file"),
    ],
)
def test_what_a_command_must_not_do_is_seen(outcome: Outcome, fault: str | None) -> None:
    combination = Combination("run/status.json", "empty", "runs", 0)
    assert outcome.fault(combination, Outcome(0, "[]", "", ())) == fault
