"""One entry a data set, made once, never half there; and what happens where it cannot be kept."""

import contextlib
import errno
import fcntl
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from data_files import (
    REPOSITORY,
    assert_holds,
    assert_one_line,
    digits,
    isolate,
    race,
    read,
    unprivileged,
    write_idx,
    write_npz,
)

from mnist_dist.data import DataError, DataLocation, find_data, load
from mnist_dist.data.splits import MNIST_SHA256

MADE = digits()


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the kernel's lock on a file, as another process would."""
    with Path(path).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "made.npz", MADE)


def entry_of(source: Path) -> Path:
    """The cache entry of `source`, made if need be."""
    entry = find_data(str(source), None).cache_file
    assert entry is not None
    return entry


def temporary_files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix not in (".pt", ".lock")]


def test_a_data_location_is_plain_and_picklable(source: Path) -> None:
    location = find_data(str(source), None)
    again = pickle.loads(pickle.dumps(location))
    assert again == location
    assert_holds(load(again), MADE)


def test_a_second_start_reads_the_cache_and_not_the_source(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_data(str(source), None)
    monkeypatch.setattr("mnist_dist.data.formats.Source.read", None)
    assert find_data(str(source), None) == first


def test_a_changed_file_is_converted_anew(source: Path) -> None:
    stale = entry_of(source)
    write_npz(source, digits(seed=1))
    assert entry_of(source) != stale
    assert_holds(read(source), digits(seed=1))


def test_each_of_several_files_counts_as_changed(tmp_path: Path) -> None:
    directory = write_idx(tmp_path / "idx", MADE)
    before = entry_of(directory)
    labels = directory / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\7")
    assert entry_of(directory) != before


@pytest.mark.parametrize("in_place", [True, False])
def test_other_content_of_the_same_size_and_time_is_converted(
    in_place: bool, tmp_path: Path
) -> None:
    """As tar, rsync -t, cp -p and image layers leave it."""
    directory = write_idx(tmp_path / "idx", MADE)
    assert_holds(read(directory), MADE)
    other = write_idx(tmp_path / "other", digits(seed=1))
    for file in directory.iterdir():
        was = file.stat()
        if in_place:
            file.write_bytes((other / file.name).read_bytes())
        else:
            (other / file.name).replace(file)
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert file.stat().st_size == was.st_size
    assert_holds(read(directory), digits(seed=1))


def test_labels_and_images_that_change_places_are_other_data(tmp_path: Path) -> None:
    directory = write_idx(tmp_path / "idx", digits(train=60, test=60))
    first = read(directory)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        train, test, spare = (directory / f"{part}-{kind}" for part in ("train", "t10k", "x"))
        train.rename(spare)
        test.rename(train)
        spare.rename(test)
    assert torch.equal(read(directory).test.images[:50], first.train.images)


def test_the_same_content_elsewhere_needs_no_conversion_and_is_called_by_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_idx(tmp_path / "a" / "raw", MADE)
    second = write_idx(tmp_path / "b" / "raw", MADE)
    read(first)
    monkeypatch.setattr("mnist_dist.data.formats.Source.read", None)
    dataset = read(second)
    assert_holds(dataset, MADE)
    assert dataset.description.endswith(f"from {second}")


def test_writing_into_loaded_images_does_not_change_the_cache(source: Path) -> None:
    read(source).train.images.zero_()
    assert_holds(read(source), MADE)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-500],
    "half": lambda content: content[: len(content) // 2],
    "no zip": lambda content: b"x" * len(content),
    "zeros": lambda content: bytes(len(content)),
    "a pickle": lambda content: pickle.dumps({"format": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_refused_by_load_and_rebuilt_by_find_data(
    damage: Callable[[bytes], bytes], source: Path
) -> None:
    entry = entry_of(source)
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.raises(DataError) as caught:
        load(DataLocation(entry, ""))
    assert_one_line(caught.value, str(entry), "remove it")
    assert_holds(read(source), MADE)


ALTERATIONS: dict[str, dict[str, object]] = {
    "another version": {"format": 0},
    "an unknown key": {"extra": 1},
    "no fingerprint": {"fingerprint": None},
    "short labels": {"test_labels": torch.zeros(3, dtype=torch.uint8)},
    "no samples": {
        "test_images": torch.zeros(0, 784, dtype=torch.uint8),
        "test_labels": torch.zeros(0, dtype=torch.uint8),
    },
    "floats": {"train_images": torch.zeros(50, 784)},
    "labels of 11": {"test_labels": torch.full((10,), 11, dtype=torch.uint8)},
    "no tensor": {"test_labels": [1, 2, 3]},
    "other pixels": {"test_images": torch.zeros(10, 784, dtype=torch.uint8)},
    "a fingerprint of other data": {"fingerprint": MNIST_SHA256},
    "the name of another entry": {"entry": "mnist.pt"},
}
# Only comparing the content with what it claims to be finds these.
CONSISTENT = ("other pixels", "a fingerprint of other data", "the name of another entry")


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_an_entry_of_other_content_is_rebuilt(kind: str, source: Path) -> None:
    entry = entry_of(source)
    torch.save(torch.load(entry) | ALTERATIONS[kind], entry)
    if kind not in CONSISTENT:
        with pytest.raises(DataError):
            load(DataLocation(entry, ""))
    assert_holds(read(source), MADE)


def test_an_entry_that_is_a_program_is_not_run(source: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    torch.save({"format": Touch()}, entry_of(source))
    assert_holds(read(source), MADE)
    assert not (tmp_path / "marker").exists()


def test_an_entry_removed_since_is_an_error_that_names_it(source: Path) -> None:
    entry = entry_of(source)
    entry.unlink()
    with pytest.raises(DataError) as caught:
        load(DataLocation(entry, ""))
    assert_one_line(caught.value, str(entry), "No such file")


def test_an_entry_that_is_cut_or_removed_after_the_start_harms_no_process(source: Path) -> None:
    location = find_data(str(source), None)
    before = load(location)
    entry = entry_of(source)
    os.truncate(entry, 10)
    assert_holds(before, MADE)
    entry.unlink()
    child = os.fork()
    if child == 0:  # another process of the node that comes late
        os._exit(0 if torch.equal(load(location).test.images, before.test.images) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_memory_to_hold_the_data_the_entry_is_mapped(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", refused)
    location = find_data(str(source), None)
    assert location.memory == location.cache_file
    assert_holds(load(location), MADE)


def fifo(path: Path) -> None:
    os.mkfifo(path)


OBSTACLES: dict[str, Callable[[Path], None]] = {
    "FIFO": fifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "link to a stranger's file": lambda path: path.symlink_to(path.parent.parent / "stranger"),
}


@pytest.mark.timeout(60)  # opening a FIFO would wait for a writer
@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("suffix", ["", ".lock"])
def test_what_is_no_file_in_the_place_of_an_entry_or_its_lock_is_no_obstacle(
    suffix: str, obstacle: str, source: Path, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"mine")
    entry = entry_of(source)
    entry.unlink()
    Path(f"{entry}.lock").unlink()
    OBSTACLES[obstacle](Path(f"{entry}{suffix}"))
    location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    assert len(location.warnings) <= 1
    assert stranger.read_bytes() == b"mine"


def test_a_temporary_file_never_overwrites_what_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"mine")
    entry = entry_of(source)
    entry.unlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    entry.with_name(f".{entry.name}.{os.getpid()}.known.tmp").symlink_to(stranger)
    location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    assert stranger.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_obstacle(
    error: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refused)
    location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    assert location.warnings == ()
    assert location.cache_file == entry_of(source)


def test_an_entry_that_others_can_write_is_not_believed(source: Path) -> None:
    entry = entry_of(source)
    entry.chmod(0o666)
    location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    (warning,) = location.warnings
    assert str(entry) in warning
    assert "can be written by other users" in warning
    assert find_data(str(source), None).warnings == ()  # made anew, for its owner alone


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_entry_is_not_believed_and_its_text_not_printed(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    source = write_npz(tmp_path / "made.npz", MADE)
    entry = find_data(str(source), shared).cache_file
    assert entry is not None
    content = torch.load(entry) | {"description": "MNIST \x1b]0;owned\a\x1b[31m"}
    torch.save(content, entry)
    assert_holds(load(find_data(str(source), shared)), MADE)
    torch.save(content, entry)
    os.chown(entry, 12345, -1)
    location = find_data(str(source), shared)
    assert_holds(load(location), MADE)
    (warning,) = location.warnings
    assert "belongs to another user (uid 12345)" in warning
    assert (location.description + warning).isprintable()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_lock_that_another_user_could_hold_for_ever_is_not_waited_for(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "made.npz", MADE)
    entry = entry_of(source)
    entry.unlink()
    os.chown(f"{entry}.lock", 12345, -1)
    with locked(f"{entry}.lock"):
        location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    assert "belongs to another user" in location.warnings[0]


def test_another_data_sets_entry_under_this_ones_name_is_not_taken(source: Path) -> None:
    entry = entry_of(source)
    other = entry_of(write_npz(source.with_name("other.npz"), digits(seed=1)))
    entry.write_bytes(other.read_bytes())
    assert_holds(read(source), MADE)


def test_noise_that_is_called_mnist_is_not_taken_for_it(tmp_path: Path) -> None:
    entry = entry_of(write_npz(tmp_path / "made.npz", MADE))
    forged = {"entry": "mnist.pt", "fingerprint": MNIST_SHA256, "description": "MNIST"}
    torch.save(torch.load(entry) | forged, entry.with_name("mnist.pt"))
    assert find_data("auto", None).cache_file is None  # the bundled digits
    torch.save(torch.load(entry) | {"entry": "mnist.pt"}, entry.with_name("mnist.pt"))
    assert find_data("auto", None).cache_file is None


def test_several_processes_at_once_convert_once(source: Path, tmp_path: Path) -> None:
    fingerprints = race(4, source, tmp_path / "log")
    assert fingerprints == [read(source).fingerprint] * 4
    assert (tmp_path / "log").read_text() == "converted\n"
    assert temporary_files(tmp_path / "cache") == []


def test_a_lock_that_is_never_released_is_an_error_that_names_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(source)
    entry.unlink()
    monkeypatch.setattr("mnist_dist.data.cache.LOCK_WAIT_S", 0.1)
    with locked(f"{entry}.lock"), pytest.raises(DataError) as caught:
        find_data(str(source), None)
    assert_one_line(caught.value, f"{entry}.lock", "held by another process")


def test_an_entry_in_place_needs_no_lock(source: Path) -> None:
    with locked(f"{entry_of(source)}.lock"):
        assert_holds(read(source), MADE)


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_is_not(
    source: Path,
) -> None:
    entry = entry_of(source)
    entry.unlink()
    old, new = (entry.with_name(f".{entry.name}.{n}.tmp") for n in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    entry_of(source)
    assert temporary_files(entry.parent) == [new]


def test_the_directory_is_the_argument_else_ours_else_xdg_else_home(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def home(cache_dir: Path | None = None) -> Path:
        entry = find_data(str(source), cache_dir).cache_file
        assert entry is not None
        return entry.parent

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home(tmp_path / "argument") == tmp_path / "argument"
    assert home() == tmp_path / "cache"
    monkeypatch.delenv("MNIST_DIST_CACHE")
    assert home() == tmp_path / "xdg" / "mnist-dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home() == tmp_path / "home" / ".cache" / "mnist-dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == tmp_path / "home" / ".cache" / "mnist-dist"


def unwritable(tmp_path: Path) -> Path:
    """A directory that not even root can make: below a file."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache"


def test_an_unwritable_cache_works_with_a_warning(source: Path, tmp_path: Path) -> None:
    location = find_data(str(source), unwritable(tmp_path))
    assert_holds(load(location), MADE)
    (warning,) = location.warnings
    assert str(tmp_path / "file" / "cache") in warning
    assert "MNIST_DIST_CACHE" in warning
    assert len(warning.splitlines()) == 1


def test_the_cache_of_one_run_goes_with_its_process(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from mnist_dist.data import find_data\n"
        "print(find_data(*sys.argv[1:]).cache_file, flush=True)\n"
        # A forked child has the exit handlers too, and must not remove what its parent uses.
        "child = os.fork()\n"
        "if child == 0: sys.exit()\n"
        "os.waitpid(child, 0); print(os.listdir(os.environ['TMPDIR']))"
    )
    (tmp_path / "tmp").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", script, str(source), str(unwritable(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path / "tmp")},
    )
    entry, after_child = run.stdout.splitlines()
    assert Path(entry).parts[-2] in after_child
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_unwritable_cache_that_has_the_entry_is_used_without_warning(tmp_path: Path) -> None:
    with unprivileged() as home:
        source = write_npz(home / "made.npz", MADE)
        entry = find_data(str(source), home / "cache").cache_file
        (home / "cache").chmod(0o555)
        found = find_data(str(source), home / "cache")
        assert (found.cache_file, found.warnings) == (entry, ())
        write_npz(source, digits(seed=1))
        location = find_data(str(source), home / "cache")
        assert_holds(load(location), digits(seed=1))
        assert "Permission denied" in location.warnings[0]
        (home / "cache").chmod(0o755)


def test_another_users_lock_file_is_no_obstacle() -> None:
    with unprivileged() as home:
        source = write_npz(home / "made.npz", MADE)
        entry = find_data(str(source), home / "cache").cache_file
        assert entry is not None
        entry.unlink()
        Path(f"{entry}.lock").chmod(0)
        location = find_data(str(source), home / "cache")
        assert_holds(load(location), MADE)
        assert len(location.warnings) == 1


def test_a_full_disk_is_gone_round(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, cache = os.fsync, Path(os.environ["MNIST_DIST_CACHE"])

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().parent == cache:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    location = find_data(str(source), None)
    assert_holds(load(location), MADE)
    assert "No space left on device" in location.warnings[0]
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_no_room_anywhere_is_one_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError) as caught:
        find_data(str(source), unwritable(tmp_path))
    assert_one_line(caught.value, str(tmp_path / "file" / "cache"), "TMPDIR", "--cache-dir")
