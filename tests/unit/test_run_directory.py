"""A run directory is opened on any file system, by one job, through no link of another user."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from file_systems import directories_cannot_be_flushed

from mnist_dist.errors import JobError, UserError
from mnist_dist.files import overwrite, write_atomically
from mnist_dist.run.directory import RunDirectory, read_status


def opened(path: Path) -> tuple[RunDirectory, list[str]]:
    """Open it, and return the warnings that this printed."""
    warnings: list[str] = []
    run = RunDirectory(path, 3, warnings.append)
    run.open()
    return run, warnings


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_that_cannot_flush_directories_is_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories_cannot_be_flushed(number, monkeypatch)
    run, (warning,) = opened(tmp_path / "run")
    assert "power loss" in warning
    run.checkpoints.save({"step": 1}, 1, {})
    run.flush()
    assert run.checkpoints.newest_step == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_any_other_fault_of_a_flush_is_an_error_that_names_the_place(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = opened(tmp_path / "run")
    directories_cannot_be_flushed(number, monkeypatch)
    run.checkpoints.save({"step": 1}, 1, {})
    with pytest.raises(JobError, match=os.strerror(number) + ".*checkpoints"):
        run.flush()
    with pytest.raises(UserError, match=os.strerror(number)):
        opened(tmp_path / "other")


def test_a_file_system_without_locks_is_one_warning_that_names_the_risk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    _, (warning,) = opened(tmp_path / "run")
    assert "no locks (No locks available)" in warning
    assert "no second job" in warning


def test_a_second_job_is_refused_with_the_process_that_holds_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_dist.run.directory._LOCK_WAIT_S", 0.0)
    first, warnings = opened(tmp_path / "run")
    with pytest.raises(UserError, match=f"another job is writing there .process {os.getpid()} on "):
        opened(tmp_path / "run")
    assert first.find_fault() is None
    assert warnings == []


def test_links_and_fifos_under_names_of_temporary_files_are_removed_and_not_followed(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".status.json.partial").symlink_to(tmp_path / "mine")
    (run / ".config.json.partial").symlink_to(tmp_path / "new")
    os.mkfifo(run / ".0123456789abcdef.partial")
    (run / ".directory.partial").mkdir()
    opened(run)
    write_atomically(run / "status.json", b"{}")
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "new").exists()
    names = {path.name for path in run.iterdir()}
    assert names == {".lock", "checkpoints", "status.json", ".directory.partial"}


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "status.json").symlink_to("mine")
    write_atomically(tmp_path / "status.json", b"{}")
    assert not (tmp_path / "status.json").is_symlink()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_directory_in_the_place_of_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"status\.json"):
        write_atomically(tmp_path / "status.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_file_is_overwritten_only_in_its_own_space(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(b"x" * 300)
    overwrite(path, b"y" * 200)
    assert path.read_bytes() == b"y" * 200
    with pytest.raises(OSError, match="No space left"):
        overwrite(path, b"z" * 100_000)
    assert path.read_bytes() == b"y" * 200
    (tmp_path / "mine").hardlink_to(path)
    with pytest.raises(OSError, match=r"status\.json"):
        overwrite(path, b"z")
    assert (tmp_path / "mine").read_bytes() == b"y" * 200


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"[]", b'{"status": [1]}', None])
def test_a_damaged_status_is_no_status_and_no_traceback(
    content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    assert read_status(tmp_path) != "completed"
    run, _ = opened(tmp_path)
    assert run.status != "completed"
    write_atomically(file, json.dumps({"status": "running"}).encode())
    assert run.status == "running"
