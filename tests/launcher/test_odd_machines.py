"""Machines that lack what most have: the job trains there all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, metrics

# A user without a name and a home, a read-only /dev/shm, few open files, odd numbers of threads.
HARSH = """
set -e
mount -t tmpfs -o size=64k,ro tmpfs /dev/shm
ulimit -n 64
export OMP_NUM_THREADS="$1"; shift
caps=-all,+dac_override,+dac_read_search  # the interpreter may lie below a private home
exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=$caps --ambient-caps=$caps "$@"
"""


@pytest.mark.parametrize("threads", ["", "banana"])
def test_a_user_without_a_name_and_a_machine_without_shared_memory_train(
    threads: str, tmp_path: Path
) -> None:
    private = ["unshare", "--mount", "--propagation=private"]
    if subprocess.run([*private, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user cannot mount here")
    processes = 1 if threads else 2
    program = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    flags = ["--data=bundled", "--train-samples=100", "--epochs=1", "--run-dir=run"]
    done = subprocess.run(
        [*private, "bash", "-c", HARSH, "_", threads, *program, str(ROOT / "train_ddp.py"), *flags],
        cwd=tmp_path,
        env={**os.environ, "MNIST_DIST_CACHE": str(tmp_path / "cache"), "HOME": "/nowhere"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "run")[0]["epoch"] == 1
