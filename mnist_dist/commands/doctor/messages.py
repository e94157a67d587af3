"""Real messages between every two ranks, over the interface that training uses.

Plain TCP, because a backend's own failure names no pair. Each rank listens on a port that the
system picks, as gloo does, so a firewall between hosts shows here too.
"""

import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

_ROUNDS = 5
# Longer than any packet: a path that drops large ones lets the small ones through.
_LARGE = 64 * 1024
_AT_ONCE = 32


class Listener(socketserver.ThreadingTCPServer):
    """Answers each line with a word of its own and this host's clock, until the process ends."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: str) -> None:
        """Listen on `address`, an IPv4 or IPv6 one of this host.

        Raises:
            OSError: the address is not this host's.
        """
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Answer)
        self.token = uuid.uuid4().hex
        threading.Thread(target=self.serve_forever, name="doctor-listener", daemon=True).start()

    @property
    def seat(self) -> dict[str, Any]:
        """What the others need in order to call."""
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
        except OSError:  # the caller left, or never asked
            return


@dataclass(frozen=True)
class Call:
    """What came of one rank's call to another."""

    error: str | None = None
    round_trip: float = 0.0
    """Seconds, the quickest of a few."""
    clock: float = 0.0
    """Seconds that the other's clock is ahead of this one's, to half of the round trip."""


def call(seat: Mapping[str, Any], seconds: float) -> Call:
    """Send small messages to a listener and a large one; each must be answered by itself."""
    deadline, answered = time.monotonic() + seconds, 0
    best = Call(round_trip=float("inf"))
    try:
        with socket.create_connection((seat["address"], seat["port"]), seconds) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with line.makefile("rb") as answers:
                for size in [1] * _ROUNDS + [_LARGE]:
                    line.settimeout(max(0.1, deadline - time.monotonic()))
                    sent, begun = time.time(), time.perf_counter()
                    line.sendall(b"?" * size + b"\n")
                    token, _, clock = answers.readline().decode().partition(" ")
                    took = time.perf_counter() - begun
                    if token != seat["token"]:
                        return Call(error="another program answers there")
                    answered += 1
                    if took < best.round_trip:
                        best = Call(None, took, float(clock) - sent - took / 2)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if answered == _ROUNDS:
            why = f"small messages pass, one of {_LARGE // 1024} KiB does not: {why}"
        return Call(error=why)
    return best


def call_all(seats: Mapping[int, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Call every seat, by rank; each `Call` as a dictionary, by the rank as a string (JSON)."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        calls = {rank: pool.submit(call, seat, seconds) for rank, seat in seats.items()}
        return {str(rank): asdict(made.result()) for rank, made in calls.items()}
