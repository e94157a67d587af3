"""Check how this node reaches the rendezvous endpoint: its name, its port, and the interface.

`python -m mnist_dist.distributed.network HOST PORT NODE_RANK` checks and waits, then prints this
node's interface and address towards HOST, for launch scripts. They need it to start fast, which is
why it is a module apart from `rendezvous`: it must not import torch.
"""

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable

from mnist_dist.errors import RendezvousError, ReportedError

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of linux/sockios.h
_NOTICE_S = 10.0
# A name that is still unknown by then is a typing error; a name server may be busy for a moment.
_RESOLVE_S = 15.0
# How long a killed predecessor of this job may still hold the port.
_PREDECESSOR_S = 5.0
# Made by virtual machines and containers: they lead to no other node.
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel")


def resolve(host: str, port: int, deadline: float) -> str:
    """Return the IPv4 address of `host`, else its IPv6 address.

    Args:
        host: a name or an address.
        port: for the error's text.
        deadline: `time.monotonic()` at which to give up; an unknown name fails sooner.

    Raises:
        RendezvousError: the name cannot be resolved.
    """
    deadline = min(deadline, time.monotonic() + _RESOLVE_S)
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"cannot resolve the rendezvous endpoint {host}:{port} on "
                    f"{socket.gethostname()} ({error.strerror}); give a name that every node can "
                    "resolve, or an IP address"
                ) from error
            time.sleep(0.5)


def wait_until_reachable(
    host: str, port: int, deadline: float, notify: Callable[[str], None]
) -> None:
    """Retry until host:port accepts a connection; call `notify` once with the reason for the wait.

    Torch's client reports a failure in forty lines of C++, and only at the end.

    Raises:
        RendezvousError: the name cannot be resolved, or nothing accepts until `deadline`.
    """
    address = resolve(host, port, deadline)
    started, notified = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            problem = (
                f"cannot connect to the rendezvous endpoint {host}:{port} "
                f"({address}: {_reason(error)})"
            )
            now = time.monotonic()
            if now > deadline:
                raise RendezvousError(
                    f"{problem}; check that the first node is up, that its name resolves to an "
                    "address this node can reach, and that no firewall blocks the port"
                ) from error
            if not notified and now - started > _NOTICE_S:
                notify(f"{socket.gethostname()} is waiting: {problem}")
                notified = True
            time.sleep(0.2)


def require_free(host: str, port: int) -> None:
    """Check that this node can listen on `port`, which other nodes know as host:port.

    Raises:
        RendezvousError: another program keeps listening there.
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
                    raise RendezvousError(
                        f"cannot open the rendezvous endpoint {host}:{port} on "
                        f"{socket.gethostname()} ({_reason(error)}); choose another port"
                    ) from error
        time.sleep(0.2)


def interfaces() -> dict[str, str]:
    """Return this node's network interfaces with their IPv4 addresses, "" for those without."""
    return {name: _address_of(name) or "" for _, name in socket.if_nameindex()}


def interface_towards(address: str) -> tuple[str, str] | None:
    """Return the name and IPv4 address of the interface through which this node reaches `address`.

    On the node that has `address`, where it may resolve to the loopback, this is the interface
    with that address, else the first that is neither loopback nor virtual.

    Returns:
        None if it cannot be determined: no IPv4, or not Linux.
    """
    addresses = interfaces()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: asks for the route only
            source = probe.getsockname()[0]
        except OSError:
            return None
    outward = {n: a for n, a in addresses.items() if a and not a.startswith("127.")}
    for name, outward_address in outward.items():
        if outward_address == source:
            return name, outward_address
    real = [(n, a) for n, a in outward.items() if not n.startswith(_VIRTUAL)]
    return real[0] if source.startswith("127.") and real else None


def _address_of(interface: str) -> str | None:
    """Return the IPv4 address of an interface, or None."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply: bytes = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def main() -> int:
    """Check, wait and print as the module's docstring says; return the exit code."""
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
