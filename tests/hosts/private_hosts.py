"""Several network hosts on this machine: namespaces, joined by a switch in one of its own.

Each host has its own interface, address, hostname and /etc/hosts; all share this machine's disk and
processes. Nothing is added to the machine's own network, and only what was made here is removed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

PROGRAMS = ("ip", "nsenter", "unshare")
_SUBNET = "10.77.0"


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(absent)} (Debian: iproute2 util-linux)"
    probe = f"probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "this machine allows no network namespaces"
    _ip("netns", "del", probe)
    return None


class Hosts:
    """Hosts n1 to nN, which reach each other as n1 to nN."""

    def __init__(self, directory: Path, count: int) -> None:
        """Make them. `directory` takes the hosts file that all of them have."""
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self._tag = f"hosts{os.getpid()}"
        self._file = directory / "hosts"
        entries = [f"{_SUBNET}.{number} {name}" for number, name in enumerate(self.names, 1)]
        # A name that resolves to an address where nobody is.
        entries += ["127.0.0.1 localhost", f"{_SUBNET}.99 nobody"]
        self._file.write_text("\n".join(entries) + "\n")
        switch = self._namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(self.names, 1):
            host = self._namespace(name)
            _ip("netns", "add", host)
            # Both ends are born inside namespaces: this machine never sees them.
            ends = ["netns", switch, "type", "veth", "peer", "name", "eth0", "netns", host]
            _ip("link", "add", name, *ends)
            _ip("-n", switch, "link", "set", name, "master", "br0", "up")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "addr", "add", f"{_SUBNET}.{number}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    def _namespace(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def start(
        self, host: str, directory: Path, log: Path, *words: str, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a command on `host`, with its output in `log`."""
        own = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(host)}"]
        enter += ["unshare", "--uts", "--mount", "--propagation", "private"]
        stream: IO[bytes]
        with log.open("ab") as stream:
            return subprocess.Popen(
                [*enter, "bash", "-c", own, "_", host, str(self._file), *words],
                cwd=directory,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def use_ipv6_alone(self) -> None:
        """Take the IPv4 addresses from all hosts, and give them fd77::1 to fd77::N."""
        for number, host in enumerate(self.names, 1):
            name = self._namespace(host)
            _ip("-n", name, "-4", "addr", "flush", "dev", "eth0")
            _ip("-n", name, "addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")

    def processes(self, host: str, marker: str = "") -> list[int]:
        """What runs on `host` with `marker` in its command."""
        found = []
        for pid in map(int, _ip("netns", "pids", self._namespace(host)).split()):
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self, host: str) -> None:
        """End everything on `host` at once, as a power cut does."""
        for _ in range(50):
            if not (pids := self.processes(host)):
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def cut(self, host: str) -> None:
        """Pull the host's cable: nobody is told, packets are lost."""
        _ip("-n", self._namespace("switch"), "link", "set", host, "down")

    def disturb(self, host: str, *netem: str) -> bool:
        """Add latency or loss to what `host` sends; False if this kernel cannot."""
        words = ["tc", "-n", self._namespace(host), "qdisc", "add", "dev", "eth0", "root", "netem"]
        return subprocess.run([*words, *netem], capture_output=True).returncode == 0

    def remove(self) -> None:
        """End what still runs there, then the hosts."""
        for host in self.names:
            self.kill(host)
        for name in ("switch", *self.names):
            with contextlib.suppress(RuntimeError):
                _ip("netns", "del", self._namespace(name))


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
