"""Run `mnist-dist doctor` as one process of the job that it checks.

mnist-dist doctor                                    one process
torchrun --nproc_per_node=4 -m mnist_dist doctor     four processes of this node
srun python -m mnist_dist doctor                     one process per Slurm task
"""

import os
import threading
from collections.abc import Sequence
from typing import NoReturn

# Before torch, which takes seconds to import: records the parent process to exit with.
from mnist_dist.distributed.launcher import Launch  # isort: skip

# The doctor prints each error in one line; torch's libraries would add forty.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from mnist_dist.commands.doctor.config import DoctorConfig, parse
from mnist_dist.commands.doctor.examination import Examination
from mnist_dist.distributed import process


def main(argv: Sequence[str]) -> int:
    """Run the checks; return the exit code of this process."""
    return process.run_rank(lambda launch: _examine(launch, parse(argv)))


def run(argv: Sequence[str]) -> NoReturn:
    """Run `main` as this process's only work, and exit."""
    process.run_process(lambda: main(argv))


def _examine(launch: Launch, config: DoctorConfig) -> int:
    examination = Examination(launch, config)
    # An unresponsive network disk or store may block forever; then it blocks only this thread.
    thread = threading.Thread(target=examination.run, daemon=True)
    thread.start()
    thread.join(config.timeout)
    if thread.is_alive():
        examination.time_out()
    return examination.exit_code
