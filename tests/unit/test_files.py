"""Only regular files are read, and nothing that is in the way is written into."""

import os
import socket
from pathlib import Path

import pytest

from mnist_dist.files import create_new, open_regular, read_regular


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_regular_file_is_an_error_that_names_kind_and_path(
    link: bool, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("fifo", "a FIFO"),
        ("directory", "Is a directory"),
        ("socket", "a socket"),
        ("device", "a device"),
        ("loop", "Too many levels"),
        ("nothing", "No such file"),
    ):
        path = tmp_path / name
        if link:
            path = tmp_path / f"link to {name}"
            path.symlink_to(tmp_path / name)
        with pytest.raises(OSError, match=words) as caught:
            open_regular(path)
        assert caught.value.filename in (path, str(path))
    server.close()


def test_a_file_is_read_up_to_its_limit_and_refused_beyond(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", 4)


def test_a_new_file_replaces_nothing_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "link", "broken", "fifo"):
        with pytest.raises(FileExistsError):
            create_new(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (tmp_path / "target").exists()
    with create_new(tmp_path / "new", 0o600) as file:
        file.write(b"new")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
