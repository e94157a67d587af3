"""Messages and failure causes in a real store, also after its host is gone."""

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from processes import free_port
from torch.distributed import HashStore, Store, TCPStore

from mnist_dist.distributed.failures import FailureStore, format_ranks, wait_until_printed
from mnist_dist.distributed.store import StoreMailbox

HOST = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("localhost", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("up", flush=True)
time.sleep(100)
"""


@pytest.fixture
def dead_store() -> Store:
    """The client of a store whose host was killed."""
    port = free_port()
    words = [sys.executable, "-c", HOST, str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as host:
        try:
            assert host.stdout is not None
            assert host.stdout.readline() == "up\n"
            client = TCPStore("localhost", port, timeout=timedelta(seconds=30))
            client.set("alive", "yes")
        finally:
            host.kill()
    return client


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.distributed.failures._SEARCH_S", 0.3)
    monkeypatch.setattr("mnist_dist.distributed.failures._LAUNCHER_S", 0.0)


def test_a_payload_is_read_as_it_was_published_and_only_under_its_prefix() -> None:
    store = HashStore()
    mailbox = StoreMailbox(store, "a")
    payload = {"text": "\u00e9", "numbers": [1, 2.5], "none": None}
    mailbox.publish("key", payload)
    assert mailbox.read("key") == mailbox.wait_for("key") == payload
    assert mailbox.read("other") is None
    assert StoreMailbox(store, "b").read("key") is None


def test_payloads_come_in_the_order_of_their_keys_and_none_for_those_that_are_late() -> None:
    mailbox = StoreMailbox(HashStore(), "a")
    mailbox.publish("2", "second")
    mailbox.publish("1", 0)
    assert mailbox.collect(["1", "2"], time.monotonic() + 60) == [0, "second"]
    assert mailbox.collect(["1", "3", "2"], time.monotonic() + 0.1) == [0, None, "second"]


def test_causes_that_other_ranks_published_are_found(short_search: None) -> None:
    store = HashStore()
    FailureStore(store, 1, 3).publish("ValueError: x")
    assert str(FailureStore(store, 0, 3).find_cause()) == "rank 1 failed: ValueError: x"


def test_ranks_that_did_not_respond_are_named(short_search: None) -> None:
    store = HashStore()
    assert str(FailureStore(store, 1, 4).find_cause()) == (
        "ranks 0, 2-3 did not respond: they were killed or stopped, or their node is unreachable"
    )
    assert str(FailureStore(store, 0, 2).find_cause()) == (
        "all ranks lost their connections: the network between their nodes failed"
    ), "rank 1 has looked for a cause, too"
    assert str(FailureStore(HashStore(), 0, 2).find_cause()) == (
        "rank 1 did not respond: it was killed or stopped, or its node is unreachable"
    )


def test_a_dead_store_is_an_error_of_a_mailbox_and_a_cause_of_a_failure(
    dead_store: Store, short_search: None
) -> None:
    with pytest.raises(RuntimeError):
        StoreMailbox(dead_store, "a").read("key")
    failures = FailureStore(dead_store, 1, 2)
    failures.publish("it does not matter")
    assert str(failures.find_cause()).startswith(
        "the rendezvous endpoint did not respond: rank 0 or"
    )
    wait_until_printed(dead_store, 1, 2)


def test_other_ranks_wait_until_rank_0_has_printed() -> None:
    store = HashStore()
    other = threading.Thread(target=wait_until_printed, args=(store, 1, 2))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    wait_until_printed(store, 0, 2)
    assert StoreMailbox(store, "errors").read("read/1"), "rank 0 has waited for it"
    other.join(10)
    assert not other.is_alive()


def test_rank_numbers_are_formatted_as_ranges() -> None:
    assert format_ranks([1]) == "rank 1"
    assert format_ranks([6, 0, 1, 2, 3]) == "ranks 0-3, 6"
