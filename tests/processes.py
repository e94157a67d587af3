"""Real processes for the tests: ranks that join a real gloo group, and the job's real launchers.

Ranks are forked from a server that has imported torch already, so that a test pays for its
processes' work and not for seven imports of torch on two cores.
"""

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["train_ddp", "mnist_dist.run.tensorboard"])


@dataclass(frozen=True)
class Ended:
    """How one process of a job ended, and what it said."""

    code: int
    out: str
    err: str


def torchrun_environment(rank: int, world_size: int, port: int, run_id: str) -> dict[str, str]:
    """The variables that torchrun sets for a worker on one host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
    }


def hosts_of(*ranks_on: int) -> list[dict[str, str]]:
    """What torchrun tells the ranks of several hosts, here all on this one."""
    world_size, port = sum(ranks_on), free_port()
    environments: list[dict[str, str]] = []
    for host, count in enumerate(ranks_on):
        for local_rank in range(count):
            own = torchrun_environment(len(environments), world_size, port, f"test-{port}")
            own |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(count)}
            environments.append(own | {"GROUP_RANK": str(host)})
    return environments


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    environments: Sequence[dict[str, str]] | None = None,
    timeout: float = 200,
) -> list[Any]:
    """Call `target(*args)` in `world_size` processes at once; what each returned, in rank order.

    One process gets no launcher's environment at all, as under plain python.
    """
    port = free_port()
    if environments is None:
        environments = (
            [
                torchrun_environment(rank, world_size, port, f"test-{port}")
                for rank in range(world_size)
            ]
            if world_size > 1
            else [{}]
        )
    pipes = [_FORKSERVER.Pipe(duplex=False) for _ in environments]
    ranks = [
        _FORKSERVER.Process(target=_rank, args=(sender, environment, target, args), daemon=True)
        for (_, sender), environment in zip(pipes, environments, strict=True)
    ]
    try:
        for rank, (_, sender) in zip(ranks, pipes, strict=True):
            rank.start()
            sender.close()  # so that a rank that dies ends its pipe
        results = []
        for number, (receiver, _) in enumerate(pipes):
            if not receiver.poll(timeout):
                _print_stacks(ranks)
                raise TimeoutError(f"rank {number} of {world_size} gave nothing in {timeout} s")
            try:
                ok, value = receiver.recv()
            except EOFError:
                ranks[number].join()
                code = ranks[number].exitcode
                raise RuntimeError(
                    f"rank {number} of {world_size} died, exit code {code}"
                ) from None
            if not ok:
                raise RuntimeError(f"rank {number} of {world_size} failed:\n{value}")
            results.append(value)
        for rank in ranks:
            rank.join(timeout)
        return results
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()


def _print_stacks(ranks: Sequence[BaseProcess]) -> None:
    """Let each rank print where it is, see `faulthandler.enable` below, and die of it."""
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, signal.SIGABRT)
            rank.join(5)


def _rank(
    sender: Connection, environment: dict[str, str], target: Callable[..., Any], args: tuple[Any]
) -> None:
    launcher = ("SLURM_", "TORCHELASTIC_", "MASTER_")
    for name in list(os.environ):
        if name.startswith(launcher) or name in torchrun_environment(0, 1, 0, ""):
            del os.environ[name]
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.enable()
    try:
        sender.send((True, target(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def run_main(directory: str, flags: list[str], door: str = "train_ddp") -> Ended:
    """The module `door`'s `main` in `directory` in this process, and what it said."""
    main = importlib.import_module(door).main
    os.chdir(directory)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(flags)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out.seek(0)
        err.seek(0)
        return Ended(code or 0, out.read(), err.read())


def run_job(directory: Path, world_size: int, *flags: str, **options: Any) -> list[Ended]:
    """Run `train_ddp.main` in `directory` in each of `world_size` processes."""
    return run_ranks(run_main, world_size, str(directory), list(flags), **options)


def completed_run(directory: Path, world_size: int, *flags: str) -> Path:
    """Run the job to its end; its run directory."""
    directory.mkdir(exist_ok=True)
    run = directory / f"run-{world_size}"
    for rank, ended in enumerate(run_job(directory, world_size, f"--run-dir={run}", *flags)):
        assert ended.code == 0, f"rank {rank} ended with {ended.code}:\n{ended.out}{ended.err}"
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A TCP port of this host that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(
    directory: Path, *words: str, environment: dict[str, str] | None = None, timeout: float = 200
) -> Ended:
    """Run a command of the installed environment, such as `torchrun`, in `directory`."""
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [str(program) if program.exists() else words[0], *words[1:]],
        cwd=directory,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
