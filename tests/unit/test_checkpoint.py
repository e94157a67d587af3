"""A checkpoint is complete or absent, and a damaged one is never used."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_dist.errors import UserError
from mnist_dist.files import read_regular, write_atomically
from mnist_dist.lock import LockLostError
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import CheckpointStore, load_checkpoint


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), float(step))}, "step": step}


def opened(directory: Path, keep: int = 3) -> CheckpointStore:
    store = CheckpointStore(directory / "checkpoints", keep)
    store.open()
    return store


def write(store: CheckpointStore, step: int) -> Path:
    store.save(state(step), step, {})
    store.flush()
    return store.directory / f"step_{step:08d}.pt"


def newest(store: CheckpointStore) -> dict[str, Any]:
    store.flush()
    found, _ = store.load_latest()
    assert found is not None
    return found


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert opened(tmp_path).load_latest() == (None, [])


def test_the_newest_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (5, 300, 20):
        store.save(state(step), step, {"val/loss": 0.5})
    found = newest(store)
    assert found["step"] == 300
    assert torch.equal(found["model"]["w"], state(300)["model"]["w"])
    facts = json.loads((store.directory / "step_00000300.json").read_text())
    assert (facts["step"], facts["val/loss"]) == (300, 0.5)
    assert facts["bytes"] == (store.directory / "step_00000300.pt").stat().st_size


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    store = opened(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(state(step), step, {}, best=step == 2)
    store.flush()
    assert {p.name for p in store.directory.iterdir()} == {
        *("step_00000004.pt", "step_00000004.json", "step_00000005.pt", "step_00000005.json"),
        *("best.pt", "best.json"),
    }
    assert store.load_best()["step"] == 2


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write(store, 1)
    (store.directory / ".step_00000002.pt.partial").write_bytes(b"half")
    os.mkfifo(store.directory / ".step_00000003.pt.partial")
    (store.directory / "step_00000002.json").write_text("{}")
    (store.directory / "notes.txt").write_text("mine")
    store.open()
    names = {p.name for p in store.directory.iterdir()}
    assert names == {"step_00000001.pt", "step_00000001.json", "notes.txt"}


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "pickle", "no sidecar"])
def test_a_damaged_newest_is_named_and_the_older_one_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = opened(tmp_path)
    store.save(state(1), 1, {})
    path = write(store, 2)
    content = path.read_bytes()
    middle = len(content) // 2
    match damage:
        case "truncated":
            path.write_bytes(content[:middle])
        case "flipped":
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        case "empty":
            path.write_bytes(b"")
        case "pickle":
            path.write_bytes(pickle.dumps(Malicious()))
        case _:
            path.with_suffix(".json").unlink()
    found, damaged = store.load_latest()
    assert found is not None
    assert found["step"] == 1
    assert len(damaged) == 1
    assert "step_00000002" in damaged[0]
    assert not (tmp_path / "executed").exists()
    assert store.load_latest()[1] == [], "it is reported once, then set aside"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_file_with_a_matching_sidecar_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Malicious())
    (tmp_path / "x.pt").write_bytes(content)
    (tmp_path / "x.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(UserError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reads of `path` fail as on a disk or server with a fault; root may read anything."""

    def read(file: Path, limit: int) -> bytes:
        if file == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return read_regular(file, limit)

    monkeypatch.setattr("mnist_dist.run.checkpoint.read_regular", read)


def test_a_newest_that_cannot_be_read_now_is_passed_over_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it count among those to keep: it is newer than what the run goes on to save."""
    write(opened(tmp_path), 100)
    path = write(opened(tmp_path), 300)
    store = opened(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        unreadable(path, patch)
        found, passed_over = store.load_latest()
        assert found is not None
        assert found["step"] == 100
        assert passed_over == [f"{path}: Input/output error"]
        write(store, 200)
        assert store.newest_step == 200
    assert newest(store)["step"] == 200
    assert newest(opened(tmp_path))["step"] == 300


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "device", "huge", "deep", "wrong"])
def test_what_is_no_file_of_a_checkpoint_is_named_and_the_older_one_used(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    store = opened(tmp_path)
    write(store, 1)
    path = write(store, 2).with_suffix(suffix)
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        case "deep":
            path.write_text("[" * 100_000)
        case "wrong":
            path.write_text('{"sha256": ["a"], "replaces": {}}')
    found, (line,) = store.load_latest()
    assert found is not None
    assert found["step"] == 1
    assert str(path) in line
    assert "\n" not in line
    write(store, 2)
    assert newest(store)["step"] == 2, "the run can save at that step again"


def test_a_checkpoint_of_another_step_under_its_name_is_not_used(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = write(store, 1)
    for suffix in (".pt", ".json"):
        shutil.copy(path.with_suffix(suffix), path.with_name(f"step_00000009{suffix}"))
    found, (line,) = store.load_latest()
    assert found is not None
    assert found["step"] == 1
    assert "step_00000009.pt" in line
    assert "step 1" in line


def test_the_newest_is_found_by_number_beyond_eight_digits(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (99_999_999, 100_000_000):
        write(store, step)
    assert newest(store)["step"] == 100_000_000


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_directory_of_checkpoints_is_an_error_that_names_it(
    is_link: bool, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints"
    if is_link:
        path.symlink_to("nowhere")
    else:
        path.write_text("mine")
    with pytest.raises(OSError, match=r"Not a directory.*checkpoints"):
        opened(tmp_path)


def test_a_checkpoint_that_was_set_aside_is_refused_by_name(tmp_path: Path) -> None:
    damaged = tmp_path / "step_00000002.pt.damaged"
    torch.save({}, damaged)
    with pytest.raises(UserError, match=r"step_00000002\.pt\.damaged: was set aside because it is"):
        load_checkpoint(damaged, needs_sidecar=False)


def test_all_damaged_is_a_refusal_and_no_fresh_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        write(store, step).write_bytes(b"")
    with pytest.raises(UserError, match=r"every step_\*\.pt is damaged"):
        store.load_latest()
    with pytest.raises(UserError, match=r"every step_\*\.pt is damaged"):
        opened(tmp_path).load_latest()


def test_saving_again_replaces_the_file_whole(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.save(state(1), 1, {})
    store.save({**state(1), "more": 1}, 1, {})
    assert newest(store)["more"] == 1


class FullDisk:
    """Files that may not be created while `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: set[str] = set()
        monkeypatch.setattr(checkpoint, "write_atomically", self.write)

    def write(self, path: Path, content: bytes, check: Callable[[Path], None]) -> None:
        if path.stem.partition("_")[0] in self.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, content, check)


def test_a_checkpoint_that_could_not_be_written_keeps_none_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, disk = opened(tmp_path), FullDisk(monkeypatch)
    disk.full = {"step"}
    store.save(state(1), 1, {})  # returns the failure if the writer's thread was quick
    with pytest.raises(OSError, match="step_00000001"):
        store.flush()
    disk.full = set()
    assert store.save(state(2), 2, {}) == []
    store.flush()
    assert [path.name for path in store.directory.glob("*.pt")] == ["step_00000002.pt"]


def test_a_failure_is_reported_however_late_the_disk_was(tmp_path: Path) -> None:
    free = threading.Event()
    failures = iter([OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")])

    def wait_for_the_disk() -> None:
        free.wait(60)
        for failure in failures:
            raise failure

    store = CheckpointStore(tmp_path / "checkpoints", 3, wait_for_the_disk)
    store.open()
    assert store.save(state(1), 1, {}) == []
    free.set()
    (failure,) = store.flush()
    assert failure.filename == "metrics.jsonl"
    assert (store.newest_step, store.flush()) == (1, [])


def test_the_best_is_written_again_before_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, disk = opened(tmp_path), FullDisk(monkeypatch)
    store.save(state(1), 1, {}, best=True)
    store.flush()
    disk.full = {"best"}
    store.save(state(2), 2, {"val/loss": 0.5}, best=True)
    with pytest.raises(OSError, match="best"):
        store.flush()
    assert store.newest_step == 1, "it would know of a best epoch that is not in best.pt"
    disk.full = set()
    store.save(state(3), 3, {})
    store.flush()
    assert (store.load_best()["step"], store.newest_step) == (2, 3)
    assert json.loads((store.directory / "best.json").read_text())["val/loss"] == 0.5


def test_nothing_is_saved_before_the_metrics_of_its_epochs(tmp_path: Path) -> None:
    seen = []

    def sync_metrics() -> None:
        seen.append(sorted(path.name for path in store.directory.iterdir()))
        if len(seen) < 3:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    store = CheckpointStore(tmp_path / "checkpoints", 3, sync_metrics)
    store.open()
    store.save(state(1), 1, {}, best=True)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        store.flush()
    store.flush()
    assert seen == [[], [], []]
    assert (store.load_best()["step"], store.newest_step) == (1, 1)


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_a_directory_lost_during_a_save_gets_no_checkpoint_and_loses_none(
    steps_before: int, tmp_path: Path
) -> None:
    """Lost before the sidecar, the checkpoint, or the deletion of the oldest one."""
    sound = 100

    def check() -> None:
        nonlocal sound
        sound -= 1
        if sound < 0:
            raise LockLostError(errno.ESTALE, "it was replaced", "run")

    store = CheckpointStore(tmp_path / "checkpoints", 1, check=check)
    store.open()
    oldest = write(store, 1)
    sound = steps_before
    store.save(state(2), 2, {})
    with pytest.raises(LockLostError, match="replaced"):
        store.flush()
    assert oldest.exists()
    assert oldest.with_suffix(".json").exists()
    written = (store.directory / "step_00000002.pt").exists()
    assert written == (steps_before == 2)


def test_dying_between_the_two_files_of_a_replacement_leaves_the_old_one_sound(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    write(store, 1)
    path = store.directory / "step_00000001.pt"
    old = path.read_bytes()
    store.save({**state(1), "more": 1}, 1, {})
    store.flush()
    path.write_bytes(old)  # as if the second rename had not come to pass
    for _ in range(2):
        found, damaged = store.load_latest()
        assert found is not None
        assert "more" not in found
        assert damaged == []
        # Nor a second time, as on a disk that has room for sidecars only.
        write(store, 1)
        path.write_bytes(old)


def test_a_file_larger_than_its_sidecar_says_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Sixteen gigabytes of zeros would otherwise be read into memory first."""
    path = write(opened(tmp_path), 1)
    os.truncate(path, 1 << 34)
    with pytest.raises(UserError, match=r"step_00000001\.pt: File larger than"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_named_and_not_its_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"best\.pt: No such file"):
        opened(tmp_path).load_best()
