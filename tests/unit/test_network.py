"""How a host reaches the meeting point, asked of this machine's own network."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from processes import free_port

from mnist_dist.distributed.network import (
    interface_towards,
    require_free,
    resolve,
    wait_until_reachable,
)
from mnist_dist.distributed.rendezvous import meet
from mnist_dist.errors import MeetingError


def test_an_address_and_localhost_resolve() -> None:
    soon = time.monotonic() + 5
    assert resolve("127.0.0.1", 1, soon) == "127.0.0.1"
    assert resolve("localhost", 1, soon) == "127.0.0.1"


def test_an_unknown_name_is_said_with_its_port_and_this_host() -> None:
    with pytest.raises(MeetingError, match=r"no\.such\.host\.invalid:29400 is not known on"):
        resolve("no.such.host.invalid", 29400, time.monotonic())


def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    require_free("here", port)
    with socket.create_server(("", port)):
        expected = f"here:{port} cannot be used on {re.escape(socket.gethostname())}"
        with pytest.raises(MeetingError, match=expected):
            require_free("here", port)


def test_one_notice_comes_before_the_error_when_nobody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnist_dist.distributed.network._NOTICE_S", 0.1)
    port, said = free_port(), list[str]()
    with pytest.raises(MeetingError, match=f"nobody answers at the meeting point 127.0.0.1:{port}"):
        wait_until_reachable("127.0.0.1", port, time.monotonic() + 1, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"{socket.gethostname()} is waiting: nobody answers")


def test_whoever_listens_is_reached_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = list[str]()
        wait_until_reachable(
            "localhost", server.getsockname()[1], time.monotonic() + 5, said.append
        )
        assert said == []


def test_a_program_that_only_listens_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        expected = f"the meeting point 127.0.0.1:{port} is open but silent"
        with pytest.raises(MeetingError, match=expected):
            meet(1, 2, "127.0.0.1", port, hosts_store=False, timeout=1)


def test_the_interface_towards_another_host_has_this_hosts_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of the range for documentation: nobody's
        except OSError:
            assert interface_towards("192.0.2.1") is None
            return
        own = probe.getsockname()[0]
    found = interface_towards("192.0.2.1")
    assert found is not None
    name, address = found
    assert (name in os.listdir("/sys/class/net"), address) == (True, own)  # noqa: PTH208


def test_launch_scripts_are_told_in_one_line_what_is_wrong() -> None:
    words = [
        sys.executable,
        "-m",
        "mnist_dist.distributed.network",
        "127.0.0.1",
        str(free_port()),
        "1",
    ]
    done = subprocess.run(
        words, env={**os.environ, "SETUP_TIMEOUT": "0"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"mnist-dist: error: nobody answers at .*\n", done.stderr)
