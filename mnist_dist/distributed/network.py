"""How this host reaches the meeting point: its name, its port, and the interface towards it.

`python -m mnist_dist.distributed.network HOST PORT NODE_RANK` checks and waits, then prints the
interface and the address of this host that lead there, for launch scripts. Imports nothing slow.
"""

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable

from mnist_dist.errors import MeetingError, ReportedError

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of linux/sockios.h
_NOTICE_S = 10.0
# A name that nobody knows by then is a typing error; a name server may be busy for a moment.
_RESOLVE_S = 15.0
# How long a killed predecessor of this job may still hold the port.
_PREDECESSOR_S = 5.0
# Made by virtual machines and containers: they lead to no other host.
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel")


def resolve(host: str, port: int, deadline: float) -> str:
    """The IPv4 address, else the IPv6 one, of `host`.

    Args:
        host: a name or an address.
        port: named in the error, for a person.
        deadline: `time.monotonic()` at which to give up; a name that stays unknown ends sooner.

    Raises:
        MeetingError: nothing knows the name.
    """
    deadline = min(deadline, time.monotonic() + _RESOLVE_S)
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise MeetingError(
                    f"the name of the meeting point {host}:{port} is not known on "
                    f"{socket.gethostname()} ({error.strerror}); give a name that every host can "
                    "resolve, or the address"
                ) from error
            time.sleep(0.5)


def wait_until_reachable(
    host: str, port: int, deadline: float, notify: Callable[[str], None]
) -> None:
    """Knock until somebody listens at host:port; `notify` is told once why it takes so long.

    Torch's own client says a failure in forty lines of C++, and only at the end.

    Raises:
        MeetingError: the name stays unknown, or nobody answers until `deadline`.
    """
    address = resolve(host, port, deadline)
    begun, noticed = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            why = f"nobody answers at the meeting point {host}:{port} ({address}: {_why(error)})"
            now = time.monotonic()
            if now > deadline:
                raise MeetingError(
                    f"{why}; see that the first host is up, its name resolves to an address that "
                    "this host can reach, and no firewall is in between"
                ) from error
            if not noticed and now - begun > _NOTICE_S:
                notify(f"{socket.gethostname()} is waiting: {why}")
                noticed = True
            time.sleep(0.2)


def require_free(host: str, port: int) -> None:
    """Check that this host can offer `port` to the others, who know it as host:port.

    Raises:
        MeetingError: another program listens there, and goes on doing so.
    """
    deadline = time.monotonic() + _PREDECESSOR_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise MeetingError(
                        f"the port of the meeting point {host}:{port} cannot be used on "
                        f"{socket.gethostname()} ({_why(error)}); choose another port"
                    ) from error
        time.sleep(0.2)


def interfaces() -> dict[str, str]:
    """This host's network interfaces, each with its IPv4 address, else an empty string."""
    return {name: _address_of(name) or "" for _, name in socket.if_nameindex()}


def interface_towards(address: str) -> tuple[str, str] | None:
    """Name and IPv4 address of the interface by which this host talks to `address`.

    On the host of `address` itself, whose name may well mean the loopback there, it is the
    interface that has the address, else the first that leads anywhere.

    Returns:
        None where it cannot be told: no IPv4, or not Linux.
    """
    addresses = interfaces()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: it only asks which way it would go
            source = probe.getsockname()[0]
        except OSError:
            return None
    outward = {n: a for n, a in addresses.items() if a and not a.startswith("127.")}
    for name, own in outward.items():
        if own == source:
            return name, own
    real = [(n, a) for n, a in outward.items() if not n.startswith(_VIRTUAL)]
    return real[0] if source.startswith("127.") and real else None


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface, if it has one."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply: bytes = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def main() -> int:
    """See the head of this module."""
    host, port, node_rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    timeout = float(os.environ.get("SETUP_TIMEOUT", "600"))
    deadline = time.monotonic() + timeout
    try:
        if node_rank == 0:
            address = resolve(host, port, deadline)
            require_free(host, port)
        else:
            wait_until_reachable(
                host, port, deadline, lambda line: print(f"mnist-dist: {line}", file=sys.stderr)
            )
            address = resolve(host, port, deadline)
    except ReportedError as error:
        print(f"mnist-dist: error: {error}", file=sys.stderr)
        return error.exit_code
    print(*(interface_towards(address) or ("", "")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
