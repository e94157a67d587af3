"""Where Linux's own functions are missing, as on macOS, everything falls back to something else."""

import builtins
import fcntl
import importlib
import io
import os
import pkgutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import ROOT, Ended, command, run_main, run_ranks

LINUX_ONLY: dict[Any, tuple[str, ...]] = {
    os: (
        *("sched_", "SCHED_", "memfd_create", "MFD_", "eventfd", "EFD_", "pidfd_open", "splice"),
        *("O_TMPFILE", "O_DIRECT", "O_PATH", "O_NOATIME", "posix_fadvise", "POSIX_FADV_"),
        *("posix_fallocate", "fdatasync", "copy_file_range", "getrandom", "getxattr", "unshare"),
        "timerfd",
    ),
    socket: ("AF_NETLINK", "SO_PEERCRED", "SO_BINDTODEVICE", "SOCK_CLOEXEC", "MSG_CMSG_CLOEXEC"),
    fcntl: ("F_SEAL_", "F_ADD_SEALS", "F_GET_SEALS", "F_NOTIFY", "F_OFD_"),
    signal: ("SIGRTM", "SIGPWR", "SIGPOLL", "SIGSTKFLT"),
}
KEPT = {"O_DIRECTORY"}
SMALL = ["--data=bundled", "--train-samples=200", "--epochs=1", "--run-dir=run"]


def leave_linux() -> None:
    """Remove from this process what only Linux has, and the file systems /proc and /sys."""
    for module, prefixes in LINUX_ONLY.items():
        for name in [n for n in vars(module) if n.startswith(prefixes) and n not in KEPT]:
            delattr(module, name)
    vars(tempfile)["_O_TMPFILE_WORKS"] = False  # found out when it was imported
    for module in (builtins, io, os):
        for name in ("open", "listdir", "scandir", "stat", "readlink"):
            if hasattr(module, name):
                setattr(module, name, without_proc(getattr(module, name)))


def without_proc(function: Any) -> Any:
    def call(path: Any = ".", *args: Any, **options: Any) -> Any:
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *args, **options)

    return call


def elsewhere(directory: str, flags: list[str], door: str) -> Ended:
    leave_linux()
    return run_main(directory, flags, door)


def test_two_ranks_train_and_pass_the_doctor_over_gloo(tmp_path: Path) -> None:
    """In processes that have imported everything before."""
    first, second = run_ranks(elsewhere, 2, str(tmp_path), SMALL, "train_ddp")
    assert (first.code, second.code) == (0, 0), first.out + first.err + second.err
    assert "gradients over gloo" in first.out
    door = "mnist_dist.commands.doctor.command"
    first, second = run_ranks(elsewhere, 2, str(tmp_path), ["--train"], door)
    assert (first.code, second.code) == (0, 0), first.out + first.err + second.err
    assert "cannot share memory" in first.out


def test_every_module_can_be_imported_and_one_process_trains(tmp_path: Path) -> None:
    """In a process that imports this project only then."""
    script = Path(__file__).stem
    words = ["python", "-c", f"import {script}; {script}.import_and_train()"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    ended = command(tmp_path, *words, environment={"PYTHONPATH": path})
    assert ended.code == 0, ended.out + ended.err
    assert "test   loss" in ended.out


def import_and_train() -> None:
    for module in [name for name in sys.modules if name.startswith(("mnist_dist", "train_ddp"))]:
        raise AssertionError(f"{module} was imported too early")
    leave_linux()
    import mnist_dist

    for found in pkgutil.walk_packages(mnist_dist.__path__, "mnist_dist."):
        importlib.import_module(found.name)
    sys.exit(importlib.import_module("train_ddp").main(SMALL))
