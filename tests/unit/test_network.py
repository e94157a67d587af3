"""How a node reaches the rendezvous endpoint, on this machine's network."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from processes import free_port

from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.network import (
    interface_towards,
    require_free,
    resolve,
    wait_until_reachable,
)
from mnist_dist.distributed.rendezvous import rendezvous
from mnist_dist.errors import RendezvousError


def test_an_address_and_localhost_resolve() -> None:
    soon = time.monotonic() + 5
    assert resolve("127.0.0.1", 1, soon) == "127.0.0.1"
    assert resolve("localhost", 1, soon) == "127.0.0.1"


def test_the_error_for_an_unknown_name_has_its_port_and_this_host() -> None:
    expected = "cannot resolve the rendezvous endpoint no.such.host.invalid:29400 on "
    with pytest.raises(RendezvousError, match=re.escape(expected + socket.gethostname())):
        resolve("no.such.host.invalid", 29400, time.monotonic())


def test_a_name_of_digits_is_refused_at_once_on_several_nodes() -> None:
    """Resolvers take 1001 for 0.0.3.233."""
    for rank in range(2):
        launch = Launch("srun", rank, 0, 2, 1, rank, "1001", 15_000, is_store_host=rank == 0)
        with pytest.raises(RendezvousError, match=r"1001 is all digits, .* set MASTER_ADDR"):
            rendezvous(launch, 30)
    with pytest.raises(RendezvousError, match="name 1001 is all digits"):
        resolve("1001", 15_000, time.monotonic() + 30)


def test_a_port_is_free_until_a_program_listens() -> None:
    port = free_port()
    require_free("here", port)
    with socket.create_server(("", port)):
        expected = f"cannot open .* here:{port} on {re.escape(socket.gethostname())} "
        with pytest.raises(RendezvousError, match=expected):
            require_free("here", port)


def test_one_notice_comes_before_the_error_when_no_program_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mnist_dist.distributed.network._NOTICE_S", 0.1)
    port, notices = free_port(), list[str]()
    expected = f"cannot connect to the rendezvous endpoint 127.0.0.1:{port}"
    with pytest.raises(RendezvousError, match=expected):
        wait_until_reachable("127.0.0.1", port, time.monotonic() + 1, notices.append)
    assert len(notices) == 1
    assert notices[0].startswith(f"{socket.gethostname()} is waiting: {expected}")


def test_a_program_that_listens_is_reached_without_a_notice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        notices = list[str]()
        wait_until_reachable(
            "localhost", server.getsockname()[1], time.monotonic() + 5, notices.append
        )
        assert notices == []


def test_the_wait_for_a_program_that_only_listens_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        launch = Launch("srun", 1, world_size=2, master_addr="127.0.0.1", master_port=port)
        expected = f"endpoint 127.0.0.1:{port} accepts connections but does not respond"
        with pytest.raises(RendezvousError, match=expected):
            rendezvous(launch, timeout=1)


def test_the_interface_towards_another_host_has_this_hosts_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of the range for documentation: unused
        except OSError:
            assert interface_towards("192.0.2.1") is None
            return
        own = probe.getsockname()[0]
    found = interface_towards("192.0.2.1")
    assert found is not None
    name, address = found
    assert (name in os.listdir("/sys/class/net"), address) == (True, own)  # noqa: PTH208


def test_launch_scripts_get_one_line_that_says_what_is_wrong() -> None:
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
    expected = r"mnist-dist: error: cannot connect to the rendezvous endpoint .*\n"
    assert re.fullmatch(expected, done.stderr)


@pytest.mark.parametrize("module", ["network", "launcher", "gpu_count"])
def test_what_runs_before_torch_does_not_import_it(module: str) -> None:
    code = f"import sys, mnist_dist.distributed.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
