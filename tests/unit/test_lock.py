"""One process at a time holds a lock file, by whatever means the file system has."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mnist_dist.lock import FileLock, LockHeldError, LockLostError, is_held


def held(path: Path) -> FileLock:
    lock = FileLock(path)
    lock.acquire(0, print)
    return lock


@contextmanager
def held_by_another_process(path: Path) -> Iterator[int]:
    """A forked child that holds the lock, until the block ends."""
    ready, ended = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ended[1])
        lock = held(path)
        os.write(ready[1], b"." if lock else b"")
        os.read(ended[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"."
        yield child
    finally:
        for end in (*ready, *ended):
            os.close(end)
        os.waitpid(child, 0)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, which cannot be mounted here."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_held_lock_names_its_holder_and_announces_a_long_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_dist.lock._SILENT_S", 0.0)
    lines: list[str] = []
    with held_by_another_process(tmp_path / ".lock") as pid:
        with pytest.raises(LockHeldError) as caught:
            FileLock(tmp_path / ".lock").acquire(0.2, lines.append)
        assert is_held(tmp_path / ".lock")
    holder = f"process {pid} on {socket.gethostname()}, since 20"
    assert str(caught.value).startswith(holder)
    (line,) = lines
    assert holder in line
    assert not is_held(tmp_path / ".lock")
    assert held(tmp_path / ".lock").missing is None, "it is free once its holder is gone"


def test_only_its_owner_can_read_a_lock_file_even_one_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "old").touch(0o644)
    for name in ("old", "new"):
        lock = held(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert lock.missing is None


@pytest.mark.parametrize(
    "content", [b"", b"4711\nhost\n", b"{", b"[" * 1000, b"\xff", b'{"host": 1}', b"x" * 5000]
)
def test_a_damaged_record_only_leaves_the_holder_unnamed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock = held(path)
    path.write_bytes(content)
    with pytest.raises(LockHeldError, match=r"^another process$"):
        held(path)
    lock.check()


def test_a_terminal_escape_in_a_record_is_not_printed(tmp_path: Path) -> None:
    lock = held(tmp_path / ".lock")
    record = json.loads((tmp_path / ".lock").read_bytes())
    (tmp_path / ".lock").write_text(json.dumps(record | {"host": "\x1b[31mred"}))
    with pytest.raises(LockHeldError, match=r"^another process$"):
        held(tmp_path / ".lock")
    lock.check()


def move(run: Path) -> None:
    run.rename(run.with_name("moved"))


def restore_from_a_copy(run: Path) -> None:
    shutil.copytree(run, run.with_name("copy"))
    shutil.rmtree(run)
    run.with_name("copy").rename(run)


def lock_again(run: Path) -> None:
    (run / ".lock").unlink()
    held(run / ".lock")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (move, "it was moved to .*moved"),
        (restore_from_a_copy, "lock was replaced"),
        (lock_again, "lock was replaced"),
        (shutil.rmtree, "it was deleted"),
        (lambda run: (run / ".lock").unlink(), "lock was deleted"),
    ],
)
def test_a_holder_finds_out_what_became_of_its_directory(
    change: Any, words: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = held(run / ".lock")
    lock.check()
    change(run)
    with pytest.raises(LockLostError, match=words):
        lock.check()


def test_no_link_is_followed_and_no_other_file_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "broken").symlink_to("target")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "broken", "loop", "directory", "fifo"):
        with pytest.raises(OSError, match=name):
            held(tmp_path / name)
    (tmp_path / "hard").hardlink_to(tmp_path / "mine")
    held(tmp_path / "hard")
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "target").exists()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_process_of_this_host_is_found_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with held_by_another_process(path) as pid:
        assert is_held(path)
        with pytest.raises(LockHeldError, match=f"process {pid}"):
            held(path)
    assert is_held(path) is False
    assert held(path).missing is not None


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_holder_of_another_host_is_replaced_and_finds_out(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    first = held(path)
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"host": "elsewhere"}))
    assert is_held(path) is None
    with pytest.raises(LockLostError, match=r"elsewhere.* took it over"):
        first.check()
    assert held(path).missing is not None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_any_other_fault_of_a_lock_is_an_error_that_names_the_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"\.lock") as caught:
        held(tmp_path / ".lock")
    assert caught.value.errno == number
