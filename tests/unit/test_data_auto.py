"""`--data auto`: the cache, the local file, one download, and at last the bundled digits."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_files import (
    CLOSED_PORT,
    assert_holds,
    digits,
    isolate,
    pickled,
    race,
    read,
    write_bytes,
    write_npz,
    write_pickle,
)

from mnist_dist.data import DataLocation, find_data, load
from mnist_dist.data.source import LOCAL_FILE

MADE = digits()
BUNDLED = "bundled 5,000-digit subset"


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def made_is_genuine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the made digits pass for MNIST, which takes seconds less than the full set."""
    fingerprint = read(write_npz(tmp_path / "made.npz", MADE), tmp_path / "other").fingerprint
    monkeypatch.setattr("mnist_dist.data.source.MNIST_SHA256", fingerprint)


class Mirror:
    """A server that answers everything with one body, and remembers what was asked."""

    def __init__(self, body: bytes, status: int, pause: float) -> None:
        self.requests: list[str] = []
        self.bytes_sent = 0
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):
                    self.send_body()

            def send_body(self) -> None:
                if not pause:
                    self.wfile.write(body)
                    return
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    mirror.bytes_sent += 1
                    time.sleep(pause)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/mnist.pkl.gz"


@contextmanager
def serving(
    body: bytes, monkeypatch: pytest.MonkeyPatch, status: int = 200, pause: float = 0
) -> Iterator[Mirror]:
    """Let MNIST_DIST_URL name a mirror that serves `body`, byte by byte if it pauses between."""
    mirror = Mirror(body, status, pause)
    thread = threading.Thread(target=mirror.server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("MNIST_DIST_URL", mirror.url)
    try:
        yield mirror
    finally:
        mirror.server.shutdown()
        thread.join()
        mirror.server.server_close()


def packed(tmp_path: Path) -> bytes:
    return write_pickle(tmp_path / "served.pkl.gz", MADE).read_bytes()


def left_in_cache(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def assert_bundled(location: DataLocation, *words: str) -> None:
    """The bundled digits, and one warning of one line with `words` in it."""
    assert location.cache_file is None
    assert BUNDLED in location.description
    assert len(load(location).train) == 4000
    (warning,) = location.warnings
    assert len(warning.splitlines()) == 1
    for word in (BUNDLED, "--data", *words):
        assert word in warning


def test_a_refused_connection_ends_in_the_bundled_digits_with_one_warning(tmp_path: Path) -> None:
    location = find_data("auto", None)
    assert_bundled(location, f"{LOCAL_FILE}: no such file", f"{CLOSED_PORT}: Connection refused")
    assert left_in_cache(tmp_path) == {"mnist.pt.lock"}


@pytest.mark.parametrize("status", [404, 500])
def test_an_http_error_ends_in_the_bundled_digits_with_one_warning(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(b"sorry", monkeypatch, status) as mirror:
        assert_bundled(find_data("auto", None), f"{mirror.url}: HTTP {status}")


@pytest.mark.parametrize(
    "url", ["mnist.pkl.gz", "nonsense://x", "http://", "http://[", "file:///x"]
)
def test_an_address_that_is_none_ends_in_the_bundled_digits(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_DIST_URL", url)
    assert_bundled(find_data("auto", None), f"{url}: ")


def test_other_data_than_mnist_is_not_accepted_from_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(packed(tmp_path), monkeypatch) as mirror:
        assert_bundled(find_data("auto", None), f"{mirror.url}: serves data other than MNIST")
    assert left_in_cache(tmp_path) == {"mnist.pt.lock"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!DOCTYPE html>", "is an HTML page"),
        (b"", "is cut short"),
        (b"\x1f\x8b", "is cut short"),
        (b"\x80\x02cos\nsystem\n.", "is refused: the pickle asks for os.system"),
    ],
)
def test_a_page_or_a_program_from_the_network_is_refused(
    body: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(body, monkeypatch) as mirror:
        assert_bundled(find_data("auto", None), f"{mirror.url}: {words}")
    assert left_in_cache(tmp_path) == {"mnist.pt.lock"}


@pytest.mark.usefixtures("made_is_genuine")
def test_a_truncated_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(packed(tmp_path)[:-5000], monkeypatch) as mirror:
        assert_bundled(find_data("auto", None), f"{mirror.url}: is cut short")


def test_an_endless_download_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.data.download._MAX_BYTES", 1000)
    with serving(b"x" * 1001, monkeypatch):
        assert_bundled(find_data("auto", None), "serves more than 1,000 bytes")
    monkeypatch.setattr("mnist_dist.data.download._TOTAL_TIMEOUT_S", -1)
    with serving(b"x", monkeypatch):
        assert_bundled(find_data("auto", None), "not complete after")


def test_a_server_that_trickles_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.data.download._TOTAL_TIMEOUT_S", 0.2)
    with serving(b"x" * 100, monkeypatch, pause=0.05) as mirror:
        assert_bundled(find_data("auto", None), "not complete after")
        assert mirror.bytes_sent < 100


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.data.download._IDLE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(5))
    assert_bundled(find_data("auto", None), f"{CLOSED_PORT}: no answer within 0.1 s")


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.data.download._IDLE_TIMEOUT_S", 0.1)
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{silent.server_port}/mnist.pkl.gz"
    monkeypatch.setenv("MNIST_DIST_URL", url)
    assert_bundled(find_data("auto", None), f"{url}: ")
    silent.server_close()


@pytest.mark.usefixtures("made_is_genuine")
def test_a_download_is_kept_and_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(packed(tmp_path), monkeypatch) as mirror:
        first, second = find_data("auto", None), find_data("auto", None)
    assert first == second
    assert first.warnings == ()
    assert mirror.url in first.description
    assert_holds(load(first), MADE)
    assert len(mirror.requests) == 1
    assert left_in_cache(tmp_path) == {"mnist.pt", "mnist.pt.lock"}


@pytest.mark.usefixtures("made_is_genuine")
def test_other_gzip_bytes_of_the_same_content_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(pickled(MADE, protocol=2), monkeypatch):
        assert_holds(read("auto"), MADE)


@pytest.mark.usefixtures("made_is_genuine")
def test_a_download_works_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with serving(packed(tmp_path), monkeypatch):
        location = find_data("auto", tmp_path / "file" / "cache")
    assert_holds(load(location), MADE)
    assert len(location.warnings) == 1


def test_the_fallback_has_one_warning_where_the_cache_cannot_be_written_too(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    assert_bundled(find_data("auto", tmp_path / "file" / "cache"))


def test_full_mnist_from_the_network_is_one_request_for_several_jobs_at_once(
    full_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving((full_mnist / "mnist.pkl.gz").read_bytes(), monkeypatch) as mirror:
        fingerprints = race(3, "auto", tmp_path / "log")
    assert mirror.requests == ["/mnist.pkl.gz"]
    assert len(set(fingerprints)) == 1
    assert read("auto").description == f"MNIST, 50,000 / 10,000 / 10,000 from {mirror.url}"
    assert left_in_cache(tmp_path) == {"mnist.pt", "mnist.pt.lock"}


@pytest.mark.usefixtures("made_is_genuine")
def test_the_local_file_comes_before_the_network_and_is_kept_for_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickle(LOCAL_FILE, MADE)
    with serving(packed(tmp_path), monkeypatch) as mirror:
        location = find_data("auto", None)
    assert mirror.requests == []
    assert location.warnings == ()
    assert location.description.endswith(f"from {LOCAL_FILE.resolve()}")
    monkeypatch.chdir(tmp_path)
    assert find_data("auto", None) == location


def test_a_local_file_of_other_data_is_used_but_never_called_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickle(LOCAL_FILE, MADE)
    location = find_data("auto", None)
    assert_holds(load(location), MADE)
    assert location == find_data(str(LOCAL_FILE), None)
    assert location.description.startswith("Dataset, ")
    monkeypatch.chdir(tmp_path)
    assert_bundled(find_data("auto", None))


def test_a_local_file_of_other_data_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickle(LOCAL_FILE, MADE)
    first = find_data("auto", None)
    monkeypatch.setattr("mnist_dist.data.formats.Source.read", None)
    assert find_data("auto", None) == first


def test_a_damaged_local_file_and_no_network_are_both_in_the_one_warning() -> None:
    write_bytes(LOCAL_FILE, pickled(MADE)[:-100])
    assert_bundled(find_data("auto", None), f"{LOCAL_FILE}: is cut short", "Connection refused")


@pytest.mark.usefixtures("made_is_genuine")
def test_a_damaged_local_file_is_warned_of_where_the_download_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(LOCAL_FILE, pickled(MADE)[:-100])
    with serving(packed(tmp_path), monkeypatch):
        location = find_data("auto", None)
    assert_holds(load(location), MADE)
    assert len(location.warnings) == 1
    assert f"{LOCAL_FILE}: is cut short" in location.warnings[0]


def test_a_path_never_falls_back_and_never_asks_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickle(LOCAL_FILE, MADE)
    with (
        serving(packed(tmp_path), monkeypatch) as mirror,
        pytest.raises(Exception, match="no such"),
    ):
        find_data(str(tmp_path / "nowhere"), None)
    assert mirror.requests == []
