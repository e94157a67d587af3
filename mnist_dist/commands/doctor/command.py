"""Run `mnist-dist doctor` as one process of the job that it checks.

mnist-dist doctor                                    one process
torchrun --nproc_per_node=4 -m mnist_dist doctor     four processes of this node
srun python -m mnist_dist doctor                     one process per Slurm task
"""

import os
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

# Before torch, which takes seconds to import: records the parent process to exit with.
from mnist_dist.distributed.launcher import (  # isort: skip
    Launch,
    exit_with_parent,
    read_launch,
    refuse_mpirun,
)

# The doctor prints each error in one line; torch's libraries would add forty.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from mnist_dist.commands.doctor.config import parse
from mnist_dist.commands.doctor.examination import Examination
from mnist_dist.distributed.process import exit_with_error, hard_exit
from mnist_dist.errors import ReportedError


def main(argv: Sequence[str]) -> int:
    """Run the checks; return the exit code of this process."""
    launch = Launch("none")
    try:
        launch = read_launch()
        refuse_mpirun(launch)
        config = parse(argv)
    except ReportedError as error:
        return exit_with_error(launch, error)
    if launch.launcher != "none":
        exit_with_parent(launch.rank)
    examination = Examination(launch, config)
    # An unresponsive network disk or store may block forever; then it blocks only this thread.
    thread = threading.Thread(target=examination.run, daemon=True)
    thread.start()
    thread.join(config.timeout)
    if thread.is_alive():
        examination.time_out()
    return examination.exit_code


def run(argv: Sequence[str]) -> NoReturn:
    """Run `main` as this process's only work, and exit."""
    try:
        code = main(argv)
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    hard_exit(code)
