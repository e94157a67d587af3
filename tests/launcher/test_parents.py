"""Whether a rank lives on or exits, by what became of the process that started it."""

import subprocess
import sys
import tempfile

import pytest
from processes import ROOT

# What every rank does first; it is read without torch, so that this costs little.
CODE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from mnist_dist.distributed.launcher import exit_with_parent
exit_with_parent(0)
open(os.environ["STARTED"], "w").close()
time.sleep(1.5)
print("lives", flush=True)
"""
BY_HAND = "RANK=0 WORLD_SIZE=2"
TORCHRUN = f"{BY_HAND} TORCHELASTIC_RUN_ID=x"
SRUN = "SLURM_STEP_ID=0 SLURM_PROCID=0"
_WAIT = 'until [ -e "$STARTED" ]; do sleep 0.05; done'


def output_of(script: str, *before: str) -> tuple[str, str]:
    """Run a script of bash in which `rank` is the command of a rank; its stdout and stderr.

    `$STARTED` is a file that appears once the rank watches its parent.
    """
    words = [*before, "bash", "-c", f'rank() {{ exec "$PY" -c "$CODE"; }}; {script}']
    with tempfile.TemporaryDirectory() as directory:
        variables = {"PY": sys.executable, "CODE": CODE, "PATH": "/usr/bin:/bin"}
        variables["STARTED"] = f"{directory}/started"
        # The pipes end with the last process that has them, so with a rank that outlives the rest.
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


@pytest.fixture
def container() -> list[str]:
    """The words before a command that make it process 1 of its own process namespace."""
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user cannot make process namespaces here")
    return words


@pytest.mark.parametrize(
    "script",
    [
        f"{BY_HAND} rank & wait",
        f"{SRUN} rank & wait",
        f"{BY_HAND} rank",
        f"({SRUN} rank & ); {_WAIT}; sleep 3",
    ],
    ids=["entry-script", "init-and-srun-task", "rank-is-process-1", "left-to-init-at-once"],
)
def test_a_rank_below_process_1_of_a_container_is_no_orphan(
    script: str, container: list[str]
) -> None:
    assert output_of(script, *container) == ("lives\n", "")


def test_a_rank_that_torchrun_left_to_process_1_exits(container: list[str]) -> None:
    out, err = output_of(f"({TORCHRUN} rank & ); sleep 4", *container)
    assert out == ""
    assert "rank 0: the launcher is gone" in err


@pytest.mark.parametrize("variables", [BY_HAND, TORCHRUN, SRUN])
def test_a_rank_exits_with_the_shell_that_started_it(variables: str) -> None:
    out, err = output_of(f"({variables} rank & {_WAIT})")
    assert out == ""
    assert "rank 0: the launcher is gone" in err


@pytest.mark.parametrize(
    ("variables", "lives"), [(BY_HAND, True), (TORCHRUN, False)], ids=["by-hand", "torchrun"]
)
def test_only_a_rank_started_by_hand_outlives_its_shell_by_nohup(
    variables: str, lives: bool
) -> None:
    """Torchrun's ranks inherit that SIGHUP is ignored, and still have to end with it."""
    out, _ = output_of(f"trap '' HUP; ({variables} rank & {_WAIT})")
    assert out == ("lives\n" if lives else "")
