"""Check how this node reaches the rendezvous endpoint: its name, its port, and the interface.

`python -m mnist_dist.distributed.network HOST PORT NODE_RANK` checks and waits, then prints this
node's address and interface towards HOST, for launch scripts. It must start fast
and so must not import torch, which is why it is separate from `rendezvous`.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import RendezvousError, ReportedError, UserError, print_line

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of linux/sockios.h
_NOTICE_S = 10.0
# A name that is still unknown by then is a typo; a name server may be busy for a moment.
_RESOLVE_S = 15.0
# How long a killed predecessor of this job may still hold the port.
_PREDECESSOR_S = 5.0
# Made by virtual machines and containers: they lead to no other node.
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel")


def resolve(host: str, port: int, deadline: float) -> str:
    """Return the IPv4 address of `host`, a name or an address, else its IPv6 address.

    Raises:
        RendezvousError: the name cannot be resolved by `deadline`, or sooner if it is unknown.
    """
    refuse_digits(host)
    deadline = min(deadline, time.monotonic() + _RESOLVE_S)
    while True:
        try:
            return _look_up(host, port)[1]
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"cannot resolve the rendezvous endpoint {host}:{port} on "
                    f"{socket.gethostname()} ({error.strerror}); use a name that every node can "
                    "resolve, or an IP address"
                ) from error
            time.sleep(0.5)


def refuse_digits(host: str) -> None:
    """Raise RendezvousError if `host` is a number, which resolvers take for an IPv4 address."""
    if host.isdecimal():
        raise RendezvousError(
            f"the rendezvous endpoint's name {host} is all digits, which resolvers take for "
            "another address; set MASTER_ADDR (torchrun: --rdzv-endpoint) to its IP address"
        )


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
            socket.create_connection((host, port), timeout=5).close()
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
    """Return this node's network interfaces with an address of each, "" for those without.

    The address is the IPv4 address, else the global IPv6 address.
    """
    return {name: next(iter(_addresses_of(name)), "") for _, name in socket.if_nameindex()}


def interface_towards(address: str) -> tuple[str, str] | None:
    """Return the name and address of the interface through which this node reaches `address`.

    On the node that has `address`, where it may resolve to the loopback, this is the interface
    with that address, else the first that is neither loopback nor virtual.

    Returns:
        None if it cannot be determined: no route, or not Linux.
    """
    try:
        kind, target = _look_up(address, 9)
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing: asks for the route only
            source: str = probe.getsockname()[0]
    except OSError:
        return None
    known = interfaces()
    for name in known:
        if source in _addresses_of(name) and not _is_loopback(source):
            return name, source
    real = [(n, a) for n, a in known.items() if a and not _is_loopback(a)]
    real = [found for found in real if not found[0].startswith(_VIRTUAL)]
    return real[0] if _is_loopback(source) and real else None


@dataclass(frozen=True)
class Interface:
    """Where this rank listens for its peers."""

    name: str = ""
    """Empty where the address of the host's own name is used."""
    address: str = ""
    error: str | None = None
    """Why no peer can be reached through it; names the variable that selects it."""


def interface_remedy(known: Mapping[str, str], spans_nodes: bool) -> str:
    """Return what to set a variable to that names a wrong one of a node's interfaces."""
    outward = [name for name, address in known.items() if address and not _is_loopback(address)]
    choices = " or ".join([*outward, *([] if spans_nodes else ["lo"])])
    return f"set it to {choices}, or unset it" if choices else "unset it"


def gloo_interface(spans_nodes: bool, master_addr: str) -> Interface:
    """Return the interface for gloo: the user's, or the one that leads to the first node.

    Gloo's own choice is the one that this host's name resolves to, which is often the loopback.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not named:
        found = interface_towards(master_addr) if spans_nodes else None
        return Interface(*found) if found else Interface(address=_own_address())
    known = interfaces()
    chosen = {name: known.get(name) for name in named.split(",")}
    name, address = next(iter(chosen.items()))
    if unknown := next((name for name in chosen if chosen[name] is None), None):
        problem = f"there is no interface {unknown}"
    elif bare := next((name for name in chosen if not chosen[name]), None):
        problem = f"{bare} has no address"
    elif spans_nodes and address and _is_loopback(address):
        problem = f"{name} reaches no other node"
    else:
        return Interface(named, address or "")
    return Interface(named, "", f"GLOO_SOCKET_IFNAME={named}: {problem}")


def own_name_problem() -> str | None:
    """Return why other programs cannot reach this host by its own name, None if they can.

    Torchrun's agent connects to that name, and waits five minutes for it.
    """
    name = socket.gethostname()
    try:
        name = socket.getfqdn()  # as torchrun
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"{name} does not resolve ({getattr(error, 'strerror', None) or error})"
    for kind, _, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            return None
    return f"{name} resolves to {found[0][4][0]}, which is not an address of this host"


def torchrun_handler() -> Callable[[object], object]:
    """Warn of this host's own name in torchrun's process, before it waits for that name.

    Torchrun loads the entry points "torchrun.handlers" when it starts, and no other code here.
    They are for rendezvous backends; this one offers none.
    """

    def refuse(parameters: object) -> object:
        raise ValueError("--rdzv-backend=mnist-dist: there is no such backend; use c10d")

    given = ("--local-addr", "--local_addr", "--master", "--rdzv-backend=static")
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    is_ours = any(Path(word).name == "train_ddp.py" or word == "mnist_dist" for word in words)
    if program not in ("torchrun", "run.py") or not is_ours or "PET_LOCAL_ADDR" in os.environ:
        return refuse
    if not any(word.startswith(given) for word in words) and (problem := own_name_problem()):
        print_line(
            f"warning: torchrun waits five minutes for this host, since {problem}; stop it, and "
            "start torchrun with --local-addr=127.0.0.1 (on several hosts, this host's address)"
        )
    return refuse


def _look_up(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Return an address of `host` and its kind, IPv4 if it has one, or raise OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    kind, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return kind, str(address[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _own_address() -> str:
    """Return gloo's default: the address of the host's name, if the host has that address."""
    with contextlib.suppress(OSError, UnicodeError), socket.socket() as probe:
        address = socket.gethostbyname(socket.gethostname())
        probe.bind((address, 0))
        return address
    return "127.0.0.1"


def _addresses_of(interface: str) -> list[str]:
    """Return the IPv4 address of an interface, then its IPv6 addresses but for link-local ones."""
    addresses = [found] if (found := _address_of(interface)) else []
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if name == interface and scope in ("00", "10"):  # global, host
                addresses.append(str(ipaddress.IPv6Address(int(digits, 16))))
    return addresses


def _address_of(interface: str) -> str | None:
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
    """Check, wait and print as the module's docstring describes; return the exit code."""
    host, port, node_rank = sys.argv[1].strip("[]"), int(sys.argv[2]), int(sys.argv[3])
    deadline = time.monotonic() + float(os.environ.get("SETUP_TIMEOUT", "600"))
    try:
        if node_rank > 0:
            wait_until_reachable(host, port, deadline, print_line)
        address = resolve(host, port, deadline)
        if node_rank == 0:
            require_free(host, port)
        if name := os.environ.get("INTERFACE"):
            own = _address_of_chosen(name)
        else:
            name, own = interface_towards(address) or ("", address if node_rank == 0 else "")
    except ReportedError as error:
        print_line(f"error: {error}")
        return error.exit_code
    print(own, name)
    return 0


def _address_of_chosen(name: str) -> str:
    """Return the address of the interface `name`. Raises UserError if it has none."""
    known = interfaces()
    if address := known.get(name):
        return address
    problem = "has no address" if name in known else "is not an interface of this host"
    choices = ", ".join(each for each, address in known.items() if address)
    raise UserError(f"INTERFACE={name} {problem}; use one of {choices}")


if __name__ == "__main__":
    sys.exit(main())
