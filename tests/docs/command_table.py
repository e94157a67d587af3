"""Every command that the documentation names, and who runs it.

A new command in a document needs a row here; the tests in test_docs.py say which is missing, and
which row has lost its command. Commands `python -m benchmarks.NAME` need none: they take minutes,
so that only their names and flags are checked.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Here:
    """Run by test_docs.py as it is written; `...` stands for `python`."""

    says: str
    """What is to be read on its standard output: a regular expression."""


@dataclass(frozen=True)
class By:
    """Run elsewhere."""

    test: str
    """FILE::TEST, or a script of .ci/."""
    as_text: str
    """How the command, or the part of it that is the program, stands in that file or in one of the
    files of tests/ and benchmarks/ that it imports."""


@dataclass(frozen=True)
class Never:
    """Run by nobody."""

    why: str


_README = By(
    "tests/commands/test_readme.py::"
    "test_the_commands_and_the_program_of_use_the_model_run_as_written",
    "Use the model",
)
_EXAMPLE = (
    "tests/examples/test_small_cnn.py::"
    "test_the_new_model_learns_the_same_on_one_and_two_processes_and_is_evaluated_and_exported"
)
_SLURM = "tests/slurm/test_slurm.py::"
_COMPLETES = _SLURM + "test_each_script_completes_with_the_loss_of_one_process"
_SRUN_DOCTOR = _SLURM + "test_srun_starts_the_doctor_on_all_nodes_and_rank_0_has_the_last_word"
_HOSTS = By(
    "tests/hosts/test_hosts.py::test_hosts_train_together_with_the_losses_of_one_process", "host.sh"
)
_SCANCEL = By(_SLURM + "test_scancel_leaves_no_process_on_any_node", '"scancel", job.id')
_WARNED = By(
    _SLURM + "test_a_warning_before_the_time_limit_saves_and_the_requeued_job_completes",
    '"scancel", "--batch", "--signal=USR1", job.id',
)
_TENSORBOARD = By(
    "tests/screen/test_tensorboard.py::test_time_series_has_a_drawn_card_for_every_figure",
    "--logdir",
)
_RESTARTED = By(
    "tests/faults/test_stops_and_kills.py::"
    "test_a_killed_rank_is_restarted_by_torchrun_and_nothing_is_lost",
    "--max-restarts=3",
)
_TORCHRUN_DOCTOR = By(
    "tests/doctor/test_doctor.py::test_torchrun_examines_the_processes_it_starts",
    '"-m", "mnist_dist", "doctor"',
)
_COMPARE = By(
    "tests/commands/test_compare.py::test_runs_of_1_2_and_4_processes_are_within_the_tolerance",
    '["compare", *map(str, words), "--json"]',
)
_ONE_PROCESS = r"world  1 process, cpu(.|\n)*\ntest   loss "

COMMANDS: dict[str, Here | By | Never] = {
    # From nothing
    "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e . && "
    "torchrun --nproc_per_node=4 train_ddp.py": By(".ci/run", '$(readme_command "run")'),
    "python3 -m venv .venv && . .venv/bin/activate && "
    "pip install -c constraints.txt -e '.[test]' && pytest": By(
        ".ci/run", '$(readme_command "test")'
    ),
    "python3 -m venv .venv && . .venv/bin/activate && "
    "pip install -c constraints.txt -e '.[dev]'": By(
        ".ci/run", "pip install -c constraints.txt -e '.[dev]'"
    ),
    "pip install -e '.[onnx]'": Never("installs packages; the extra is part of '.[test]'"),
    "pip install -e '.[compare]'": Never("installs the peers, which only the benchmarks run"),
    "pytest": By(".ci/run", '$(readme_command "test")'),
    "pytest tests/unit": Never("a part of the suite that is running"),
    "pytest tests/hosts -rP": Never("a part of the suite that is running"),
    "pytest tests/FOLDER": Never("a part of the suite that is running"),
    "ruff check . && ruff format --check . && mypy": By(
        ".ci/run", "ruff check .\nruff format --check .\nmypy\n"
    ),
    ".ci/run": Never("runs this suite, in an environment that it makes"),
    ".ci/matrix": Never("runs this suite, in environments that it makes"),
    ".ci/constraints": Never("reads the package registry; test_packaging.py checks its file"),
    "apt-get install slurm-wlm munge": By(".ci/run", "slurm-wlm munge"),
    # Training
    "python train_ddp.py": Here(_ONE_PROCESS),
    "python train_ddp.py --epochs 1": Here(_ONE_PROCESS),
    "python train_ddp.py --help": By(
        "tests/launcher/test_torchrun.py::test_help_starts_no_process_group_and_names_every_flag",
        '"python", SCRIPT, "--help"',
    ),
    "... train_ddp.py --data path/to/mnist.pkl.gz": Here(_ONE_PROCESS),
    "torchrun --nproc_per_node=4 train_ddp.py --recipe tuned": _README,
    "torchrun --nproc_per_node=4 train_ddp.py": By(
        "tests/launcher/test_torchrun.py::test_torchrun_trains_to_the_end_and_one_rank_speaks",
        "torchrun(tmp_path, 4, *SMALL)",
    ),
    "torchrun --nproc_per_node=4 train_ddp.py --recipe tuned --run-dir runs/tuned": _README,
    "torchrun --max-restarts": _RESTARTED,
    "torchrun --max-restarts=3": _RESTARTED,
    "torchrun --nproc_per_node=4 --max-restarts=3 train_ddp.py": _RESTARTED,
    "launch/local.sh": By(
        "tests/launcher/test_scripts.py::test_local_sh_trains_and_passes_flags_on", '"local.sh"'
    ),
    "launch/host.sh": _HOSTS,
    "launch/host.sh HEAD:PORT NODES NODE_RANK": _HOSTS,
    "launch/host.sh HOST0:29400 2 0": _HOSTS,
    "launch/host.sh HOST0:29400 2 1": _HOSTS,
    "launch/host.sh n1:29400 2 0 --epochs 5": _HOSTS,
    "launch/host.sh n1:29400 2 1 --epochs 5": _HOSTS,
    # Slurm
    "sbatch launch/slurm_single_node.sbatch": By(_COMPLETES, "slurm_single_node.sbatch"),
    "sbatch launch/slurm_single_node.sbatch --epochs 1": By(_COMPLETES, "slurm_single_node.sbatch"),
    "sbatch launch/slurm_multi_node.sbatch": By(_COMPLETES, "slurm_multi_node.sbatch"),
    "sbatch launch/slurm_srun.sbatch": By(_COMPLETES, "slurm_srun.sbatch"),
    "sbatch launch/slurm_srun.sbatch --epochs 1": By(_COMPLETES, "slurm_srun.sbatch"),
    "sbatch launch/slurm_srun.sbatch --epochs 1000": By(_COMPLETES, "slurm_srun.sbatch"),
    "srun --account=A --partition=P --gpus-per-node=2": Never(
        "the tests' Slurm has no accounts and no GPUs"
    ),
    "sbatch launch/slurm_srun.sbatch --run-dir runs/mine": By(_COMPLETES, "slurm_srun.sbatch"),
    "sbatch --export=ALL,MAX_REQUEUES=3,INTERFACE=ib0 launch/slurm_srun.sbatch --epochs 100": By(
        _SLURM + "test_requeues_are_bounded", "MAX_REQUEUES="
    ),
    "sbatch --array=0-2 launch/slurm_srun.sbatch": By(
        _SLURM + "test_an_array_of_three_seeds_is_three_runs", "--array="
    ),
    "sbatch --dependency=afterany:JOBID launch/slurm_srun.sbatch --run-dir runs/mine": Never(
        "the dependency is Slurm's; that a run of this name continues is in test_resume.py"
    ),
    "srun --ntasks=8 python train_ddp.py": Never(
        "two nodes of the tests' Slurm have no 8 CPUs; slurm_srun.sbatch runs it with 4 tasks"
    ),
    "srun python -m mnist_dist doctor": By(_SRUN_DOCTOR, '"srun", "--nodes=2"'),
    "srun --nodes=2 --ntasks-per-node=2 python -m mnist_dist doctor": By(
        _SRUN_DOCTOR, '"srun", "--nodes=2", "--ntasks-per-node=2"'
    ),
    "srun --nodes=2 --ntasks-per-node=2 python -m mnist_dist doctor --train": By(
        _SRUN_DOCTOR, '"-m", "mnist_dist", "doctor", "--train"'
    ),
    "srun -N1 bash -c '. .venv/bin/activate && "
    'python -c "import torch; print(torch.__version__)"\'': Never(
        "is about the environment of a cluster; no part of this program"
    ),
    "srun -N1 python -m pip show torch": Never(
        "is about the environment of a cluster; no part of this program"
    ),
    "scancel JOBID": _SCANCEL,
    "scancel --signal": _WARNED,
    "scancel --batch --signal=USR1 JOBID": _WARNED,
    "srun -w NODE pgrep -f train_ddp.py": Never(
        "the tests look for processes in /proc of their nodes, which are one machine"
    ),
    # A trained model, and what was run
    "mnist-dist evaluate": By(_EXAMPLE, '"mnist-dist", "evaluate"'),
    "mnist-dist evaluate runs/tuned": _README,
    "torchrun --nproc_per_node=2 -m mnist_dist evaluate runs/tuned": By(
        "tests/commands/test_evaluate.py::test_under_torchrun_one_process_prints_what_a_person_reads",
        '"torchrun", "--nproc_per_node=2", "-m", "mnist_dist", "evaluate"',
    ),
    "mnist-dist predict runs/tuned docs/digit.jpg": _README,
    "mnist-dist export runs/tuned --format torch": _README,
    "mnist-dist export runs/tuned --format onnx --output model.onnx": _README,
    "mnist-dist runs": _README,
    "mnist-dist compare": _COMPARE,
    "mnist-dist compare runs/one runs/two": _COMPARE,
    "mnist-dist compare runs/one runs/two runs/seed1": _COMPARE,
    "tensorboard --logdir runs": _TENSORBOARD,
    "tensorboard --logdir runs --port 6006": _TENSORBOARD,
    "tensorboard ... --bind_all": Never("shows a page to everybody on the network"),
    "ssh -L 6006:localhost:6006 you@cluster": Never("needs a cluster to log in to"),
    "ssh -L 6006:NODE:6006 you@cluster": Never("needs a cluster to log in to"),
    # Machines
    "mnist-dist doctor": By(
        "tests/doctor/test_doctor.py::test_one_process_alone_is_healthy_and_leaves_nothing_behind",
        '"mnist-dist", "doctor"',
    ),
    "torchrun --nproc_per_node=2 -m mnist_dist doctor": _TORCHRUN_DOCTOR,
    "torchrun --nproc_per_node=4 -m mnist_dist doctor": _TORCHRUN_DOCTOR,
    "torchrun --nproc_per_node=4 -m mnist_dist doctor --train": _TORCHRUN_DOCTOR,
    "torchrun --nnodes=2 --node-rank=0 --master-addr=n1 -m mnist_dist doctor": Never(
        "needs two hosts; test_doctor_on_hosts.py starts the same ranks there without torchrun"
    ),
    "sysctl net.ipv4.tcp_retries2": Never("shows a setting of Linux, where sysctl is installed"),
    # examples/
    "git apply examples/small_cnn.patch": By(_EXAMPLE, '"git", "apply", PATCH'),
    "torchrun --nproc_per_node=2 train_ddp.py --data fashion --lr 0.02 --run-dir runs/cnn": By(
        _EXAMPLE, '"torchrun", "--nproc_per_node=2"'
    ),
    "mnist-dist evaluate runs/cnn": By(_EXAMPLE, '"mnist-dist", "evaluate"'),
    "mnist-dist export runs/cnn --format torch": By(_EXAMPLE, '"mnist-dist", "export"'),
}
