"""Rooms to test in: network namespaces of this test alone, with a thread inside each.

A socket made in a room stays there, whoever uses it; so tests send and receive from their own thread.

    world 192.0.2.2, 2001:db8::2  <-- uplink -->  machine 192.0.2.1, 2001:db8::1  <-- mrg… -->  containers
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from isolator.drivers import Wiring
from isolator.drivers.naming import host_ifname, mac_for
from isolator.drivers.routed import Routed
from isolator.model import EndpointKey, IPAddress
from isolator.netlink import Node
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import Admission, Isolation, Policy, Surroundings
from isolator.policy.table import wrong_in
from isolator.sysctl import enable_forwarding
from tests.patience import PATIENCE

P = ParamSpec("P")
T = TypeVar("T")

POOLS = (ip_network("10.0.0.0/16"), ip_network("10.1.0.0/16"), ip_network("fd00::/64"))
AROUND = Surroundings(pools=POOLS, nat_pools=(POOLS[0], POOLS[2]))
WORLD4, WORLD6 = ip_address("192.0.2.2"), ip_address("2001:db8::2")
NODE4, NODE6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def sh(command: str) -> str:
    """What a shell command prints. Raises CalledProcessError."""
    return subprocess.run(["sh", "-ec", command], check=True, text=True, stdout=subprocess.PIPE).stdout


class Room:
    """A network namespace with ``lo`` up and a thread inside; deleted when its context ends."""

    def __init__(self, what: str) -> None:
        self.name = f"mrg-{what}-{os.urandom(4).hex()}"
        self.path = f"/run/netns/{self.name}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        sh(f"ip netns add {self.name}")
        self.do(self._enter)
        self.sh("ip link set lo up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._sockets:
            one.close()
        self._thread.shutdown()
        self.delete()

    def _enter(self) -> None:
        with open(self.path, "rb") as file:
            assert _libc.setns(file.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def delete(self) -> None:
        """Delete it; no error if it is gone."""
        if Path(self.path).exists():
            sh(f"ip netns delete {self.name}")

    def do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it on the room's thread, inside."""
        return self._thread.submit(work, *args, **kwargs).result()

    def sh(self, command: str) -> str:
        """What a shell command prints inside. Raises CalledProcessError."""
        return self.do(sh, command)

    def delivers(self, ip: str) -> None:
        """Wait until an IPv6 address added inside is usable: the kernel adds its route in the background."""
        deadline = time.monotonic() + PATIENCE
        while f"local {ip} " not in self.sh("ip -6 route show table local"):
            assert time.monotonic() < deadline, f"{ip} stays unusable"

    def unbound(self, family: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """A socket inside that waits for what has to come; what must not is waited for until SILENCE."""
        made = self.do(socket.socket, family, kind)
        made.settimeout(PATIENCE)
        self._sockets.append(made)
        return made

    def udp(self, ip: IPAddress, port: int = 0) -> socket.socket:
        """A UDP socket bound to an address inside."""
        made = self.unbound(socket.AF_INET if ip.version == 4 else socket.AF_INET6)
        made.bind((str(ip), port))
        return made


SILENCE = 0.3
"""Seconds after which a packet that did not come is taken for lost."""


def heard(
    server: Room, ip: IPAddress, client: Room, source: IPAddress | None = None, *, within: float = PATIENCE
) -> str | None:
    """Whom the server's ``ip`` saw asking when the client asked; None if question or answer was lost."""
    listening = server.udp(ip)
    any_ip = ip_address("0.0.0.0" if ip.version == 4 else "::")
    asking = client.udp(source or any_ip)
    try:
        for each in (listening, asking):
            each.settimeout(within)
        asking.sendto(b"hello?", listening.getsockname()[:2])
        question, seen = listening.recvfrom(64)
        listening.sendto(b"hello " + question, seen[:2])
        assert asking.recv(64) == b"hello hello?"
    except OSError:
        return None
    return str(seen[0])


class Machine(Room):
    """A node: uplink to the world, forwarding, the policy and the driver, all on its thread."""

    def __init__(self) -> None:
        super().__init__("node")
        self.world = Room("world")

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.world.__enter__()
            self.sh(
                "ip link add uplink index 1001 address 02:00:00:00:00:01 type veth "
                f"peer name up0 index 1002 address 02:00:00:00:00:02 netns {self.world.name}\n"
                "ip addr add 192.0.2.1/24 dev uplink\n"
                "ip addr add 2001:db8::1/64 dev uplink nodad\n"
                "ip link set uplink up\n"
            )
            self.world.sh(
                "ip addr add 192.0.2.2/24 dev up0\n"
                "ip addr add 2001:db8::2/64 dev up0 nodad\n"
                "ip link set up0 up\n"
                "ip route add default via 192.0.2.1\n"
                "ip route add default via 2001:db8::1\n"
            )
            self.sh("ip route add default via 192.0.2.2; ip route add default via 2001:db8::2")
            # So that no test waits for neighbour discovery between the two.
            for room, link, number, mac in ((self, "uplink", 2, "02"), (self.world, "up0", 1, "01")):
                for ip in (f"192.0.2.{number}", f"2001:db8::{number}"):
                    room.sh(f"ip neigh replace {ip} dev {link} lladdr 02:00:00:00:00:{mac} nud permanent")
            self.delivers("2001:db8::1")
            self.world.delivers("2001:db8::2")
            self.node = self.do(Node)
            self.do(enable_forwarding, self.node)
            self.policy = self.do(Policy)
            self.do(self.policy.restore, [], AROUND)
            self.driver = Routed(self.node)
        except BaseException:
            self.world.__exit__(None, None, None)
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.do(self.policy.close)
        self.do(self.node.close)
        self.world.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

    def attach(
        self,
        container: Room,
        ifname: str,
        *ips: str,
        default_route: bool = False,
        next_hop: int = 1,
        pools: tuple[str, ...] = (),
        **policy: Any,
    ) -> Wiring:
        """Admit and wire an interface of a container. policy: as ``admission`` has it."""
        wiring = replace(
            wire(container, ifname, *ips, default_route=default_route),
            next_hop=next_hop,
            pools=tuple(map(ip_network, pools)),
        )
        self.do(self.policy.admit, admission(wiring, **policy))
        self.do(self.driver.setup, wiring)
        return wiring

    def detach(self, *wirings: Wiring) -> None:
        """The whole way out."""
        for wiring in wirings:
            self.do(self.driver.withdraw, wiring)
            self.do(self.policy.revoke, [wiring.host_ifname])
        self.do(self.driver.remove, wirings)

    def holds(self) -> dict[str, list[str]]:
        """Everything of ours in the node's kernel, but for the table itself."""
        return {
            "links": [
                line.split(":")[1].split("@")[0].strip()
                for line in lines(self.sh("ip -o link"))
                if ": mrg" in line
            ],
            "routes": lines(
                self.sh("ip -4 route show table all proto 157; ip -6 route show table all proto 157")
            ),
            "neighbours": lines(self.sh("ip neigh show nud permanent | grep mrg || true")),
            "elements": sorted(f"{name} {ip}" for name, ip in self.do(self.policy.elements)),
        }


ALLOWED = Isolation(allow_from=(ip_network(WORLD4), ip_network(WORLD6)))
"""A network that the world may call."""


def admission(wiring: Wiring, *netgroups: str, **policy: Any) -> Admission:
    """What the policy is told of an interface: in netgroup web and callable by the world, or as ``policy`` says."""
    told = {"network": "web", "netgroups": netgroups or ("web",), "isolation": ALLOWED, **policy}
    return Admission(wiring.host_ifname, wiring.mac, wiring.ips, **told)


def wrong_sets(policy: Policy) -> dict[str, set[str]]:
    """What isolator/kernel.py finds of the policy's sets, in the room whose thread runs this."""
    snapshot = policy.snapshot()
    if snapshot is None:
        return {}
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        wrong = wrong_in(netfilter, snapshot)
    if not wrong:
        policy.trust_sets(snapshot)
    return wrong


NOTHING: dict[str, list[str]] = {"links": [], "routes": [], "neighbours": [], "elements": []}


def wire(container: Room, ifname: str, *ips: str, default_route: bool = False, mtu: int = 1450) -> Wiring:
    """The wiring of an interface of a container."""
    addresses = tuple(ip_address(ip) for ip in ips)
    return Wiring(
        host_ifname=host_ifname(EndpointKey(container.name, ifname)),
        ifname=ifname,
        netns=container.path,
        ips=addresses,
        mac=mac_for(addresses),
        mtu=mtu,
        default_route=default_route,
    )


def holds_inside(container: Room) -> dict[str, list[str]]:
    """Everything of ours in a container's kernel."""
    return {
        "links": [line for line in lines(container.sh("ip -o link show")) if " lo:" not in line],
        "routes": lines(
            container.sh("ip -4 route show table all proto 157; ip -6 route show table all proto 157")
        ),
        "rules": lines(container.sh("ip -4 rule show; ip -6 rule show"), without="from all"),
    }


NOTHING_INSIDE: dict[str, list[str]] = {"links": [], "routes": [], "rules": []}


def lines(text: str, without: str | None = None) -> list[str]:
    """The lines of a command's output that hold something."""
    return [line for line in text.splitlines() if line.strip() and (without is None or without not in line)]


def settings(room: Room, names: Iterable[str]) -> dict[str, str]:
    """The values of kernel settings inside."""
    return {name: room.do(Path("/proc/sys", name).read_text).strip() for name in names}
