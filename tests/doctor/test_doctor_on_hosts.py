"""`mnist-dist doctor` on several network hosts: blocked ways, wrong interfaces, disks apart."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from private_hosts import Hosts, missing
from processes import ROOT

PORT = 29400
COMMAND = [sys.executable, "-m", "mnist_dist", "doctor"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    made = Hosts(tmp_path, 3)
    try:
        yield made
    finally:
        made.remove()


def doctor(
    hosts: Hosts,
    directory: Path,
    count: int,
    *flags: str,
    before: Sequence[str] = (),
    **variables: str,
) -> list[tuple[int, list[str]]]:
    """One rank on each of `count` hosts, its command behind `before`; exit code, lines of each."""
    directory.mkdir(exist_ok=True)
    ranks = []
    for rank, host in enumerate(hosts.names[:count]):
        environment = {
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": str(PORT),
        }
        log = directory / f"{host}.log"
        ranks.append(
            hosts.start(host, directory, log, *before, *COMMAND, *flags, **environment, **variables)
        )
    codes = [rank.wait(120) for rank in ranks]
    logs = [(directory / f"{host}.log").read_text() for host in hosts.names[:count]]
    return [(code, log.splitlines()) for code, log in zip(codes, logs, strict=True)]


def block(hosts: Hosts, host: str, address: str, directory: Path) -> None:
    """Let nothing that `host` sends reach `address`."""
    words = ["ip", "route", "add", "blackhole", f"{address}/32"]
    assert hosts.start(host, directory, directory / "ip.log", *words).wait(30) == 0


def line_of(check: str, lines: Sequence[str]) -> str:
    (line,) = [line for line in lines if line.split()[1:2] == [check] or f" {check} " in line[:21]]
    return line


def test_healthy_hosts_talk_by_the_interface_between_them(hosts: Hosts, tmp_path: Path) -> None:
    (code, lines), (second, nothing) = doctor(hosts, tmp_path / "job", 2, "--train")
    assert (code, second, nothing) == (0, 0, []), lines
    assert "eth0 10.77.0.1, eth0 10.77.0.2" in line_of("interface", lines)
    assert line_of("shared disk", lines).split()[0] == "ok", "both see this machine's disk"
    assert line_of("training", lines).split()[0] == "ok"
    assert lines[-1] == "OK: 2 ranks on 2 nodes can train together"


def test_a_way_that_is_blocked_between_two_hosts_is_named_by_its_ends(
    hosts: Hosts, tmp_path: Path
) -> None:
    block(hosts, "n2", "10.77.0.3", tmp_path)
    (code, lines), *others = doctor(hosts, tmp_path / "job", 3)
    assert [code, *(other for other, _ in others)] == [1, 1, 1], lines
    failed = [line for line in lines if line.startswith("  FAIL")]
    assert len(failed) == 2, "each direction"
    assert "rank 1 on n2 cannot reach rank 2 on n3 at 10.77.0.3 over eth0: " in failed[0]
    assert "rank 2 on n3 cannot reach rank 1 on n2 at 10.77.0.2 over eth0: " in failed[1]
    assert lines[-1].startswith("FAILED: messages: rank 1 on n2 cannot reach rank 2 on n3")
    assert "GLOO_SOCKET_IFNAME" in lines[-1]


def test_a_way_to_the_first_host_that_is_blocked_is_named_on_both(
    hosts: Hosts, tmp_path: Path
) -> None:
    block(hosts, "n2", "10.77.0.1", tmp_path)
    (code, lines), (second, there) = doctor(hosts, tmp_path / "job", 2, "--timeout=10")
    assert (code, second) == (1, 1)
    assert f"rank 1 of 2 did not reach the rendezvous endpoint n1:{PORT}" in lines[-1]
    expected = f"cannot connect to the rendezvous endpoint n1:{PORT} (10.77.0.1: "
    assert there[-1].startswith(f"FAILED: rendezvous: {expected}")
    assert "no firewall blocks the port" in there[-1]


def test_a_loopback_that_was_chosen_for_several_hosts_is_named(
    hosts: Hosts, tmp_path: Path
) -> None:
    (code, lines), (second, _) = doctor(hosts, tmp_path / "job", 2, GLOO_SOCKET_IFNAME="lo")
    assert (code, second) == (1, 1)
    expected = "interface: GLOO_SOCKET_IFNAME=lo: lo reaches no other node"
    assert lines[-1].startswith(f"FAILED: {expected}")
    assert lines[-1].endswith("set it to eth0, or unset it")


def test_hosts_with_disks_of_their_own_are_a_warning(hosts: Hosts, tmp_path: Path) -> None:
    """A tmpfs that is mounted in a host's own namespace, before its rank starts there."""
    own = tmp_path / "own"
    own.mkdir()
    mount = ["bash", "-c", 'mount -t tmpfs tmpfs "$1"; shift; exec "$@"', "_", str(own)]
    (code, lines), _ = doctor(hosts, tmp_path / "job", 2, f"--run-dir={own}", before=mount)
    assert code == 0, lines
    line = line_of("shared disk", lines)
    assert line.split()[0] == "warn"
    assert f"n2: {own} is not the directory that rank 0 on n1 writes to" in line
    assert lines[-1].startswith("OK, with 1 warning: ")
