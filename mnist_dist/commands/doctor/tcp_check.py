"""Send messages between every two ranks, over the interface that training uses.

Plain TCP, because a backend's failure names no pair of ranks. Each rank listens on a port that the
system picks, as gloo does, so that a firewall between nodes shows here too.
"""

import dataclasses
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.commands.doctor.facts import Facts

_ROUNDS = 5
# Longer than any packet: a path that drops large ones lets the small ones through.
_LARGE = 64 * 1024
_MAX_CONNECTIONS = 32


class Listener(socketserver.ThreadingTCPServer):
    """Answers each line with its token and this host's clock, until the process ends."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: str) -> None:
        """Listen on `address`, an IPv4 or IPv6 address of this host.

        Raises:
            OSError: the address is not this host's.
        """
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Answer)
        self.token = uuid.uuid4().hex
        threading.Thread(target=self.serve_forever, name="doctor-listener", daemon=True).start()

    @property
    def endpoint(self) -> dict[str, Any]:
        """What other ranks need to connect."""
        host, port, *_ = self.server_address
        return {"address": host, "port": port, "token": self.token}


class _Answer(socketserver.StreamRequestHandler):
    timeout = 30
    disable_nagle_algorithm = True

    def handle(self) -> None:
        assert isinstance(self.server, Listener)
        try:
            while self.rfile.readline():
                self.wfile.write(f"{self.server.token} {time.time()!r}\n".encode())
        except OSError:  # the client left, or never sent anything
            return


def listen(facts: Facts) -> tuple[Facts, dict[str, Any]]:
    """Listen for the other ranks where gloo would.

    Returns:
        `facts`, with an `interface_error` if that is impossible, and the endpoint.
    """
    if facts.interface_error:
        return facts, {}
    try:
        return facts, Listener(facts.address).endpoint
    except OSError as error:
        reason = error.strerror or str(error)
        text = f"cannot listen on {facts.interface} {facts.address} ({reason})"
        return dataclasses.replace(facts, interface_error=text), {}


@dataclass(frozen=True)
class Connection:
    """The result of one rank's connection to another."""

    error: str | None = None
    round_trip: float = 0.0
    """Seconds, the shortest of a few."""
    clock: float = 0.0
    """Seconds that the other clock is ahead of this one, to half of the round trip."""


def connect(endpoint: Mapping[str, Any], seconds: float) -> Connection:
    """Send small messages and a large one to a listener, which must answer each."""
    deadline, answered = time.monotonic() + seconds, 0
    best = Connection(round_trip=float("inf"))
    try:
        address = (endpoint["address"], endpoint["port"])
        with socket.create_connection(address, seconds) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with line.makefile("rb") as answers:
                for size in [1] * _ROUNDS + [_LARGE]:
                    line.settimeout(max(0.1, deadline - time.monotonic()))
                    sent, start = time.time(), time.perf_counter()
                    line.sendall(b"?" * size + b"\n")
                    token, _, clock = answers.readline().decode().partition(" ")
                    took = time.perf_counter() - start
                    if token != endpoint["token"]:
                        return Connection(error="another program answers there")
                    answered += 1
                    if took < best.round_trip:
                        best = Connection(None, took, float(clock) - sent - took / 2)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if answered == _ROUNDS:
            reason = f"small messages pass, one of {_LARGE // 1024} KiB does not: {reason}"
        return Connection(error=reason)
    return best


def connect_to_all(
    endpoints: Mapping[int, Mapping[str, Any]], seconds: float
) -> dict[str, dict[str, Any]]:
    """Connect to every endpoint by rank; return each `Connection` in JSON's types."""
    with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
        made = {rank: pool.submit(connect, each, seconds) for rank, each in endpoints.items()}
        return {str(rank): asdict(connection.result()) for rank, connection in made.items()}
