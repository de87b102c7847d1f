"""Ways from one namespace to another: ours, between containers of a lab's nodes, and bare ones made by plain ``ip``.

    bare veth     client -------------------------------- server
    routed veth   client --- node --- server
    hostgw, vxlan client --- node --- [switch] --- node --- server

The bare ones forward and do nothing else; underlay, MTUs and kinds of devices are those of ours.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from moorage.lab import Lab, LabNode, Namespace, unique
from moorage.lab.switch import UPLINK, address

PATIENCE = 20.0
"""Seconds that a node has to learn of the other's containers."""

HOSTS = (101, 102)
"""Numbers of the bare nodes on the underlay."""

FABRICS = {"hostgw": "10.64.0.0/16", "vxlan": "10.65.0.0/16"}
"""Fabric, and name of a network of it -> its pool."""

VXLAN_OVERHEAD = 50


Way: TypeAlias = tuple[str, str]
"""Which way, and whose."""


@dataclass(frozen=True, slots=True)
class Path:
    """From ``client`` to ``server``, which has ``ip``."""

    client: Namespace
    server: Namespace
    ip: str


@contextlib.contextmanager
def paths() -> Iterator[dict[Way, Path]]:
    """All ways, working."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=2, etcd=1))
        lab.start()
        for fabric, pool in FABRICS.items():
            lab.nodes[0].cli("network", "create", fabric, "--pool", pool, "--fabric", fabric)
        bare = stack.enter_context(_Bare(lab))
        one, two = lab.nodes
        found = {
            ("one node", "ours"): _ours(stack, "hostgw", one, one),
            ("one node", "routed"): bare.on_one_node(),
            ("one node", "bare"): bare.pair(),
            ("hostgw", "ours"): _ours(stack, "hostgw", one, two),
            ("hostgw", "routed"): bare.routed(),
            ("vxlan", "ours"): _ours(stack, "vxlan", one, two),
            ("vxlan", "routed"): bare.tunnelled(),
        }
        for path in found.values():
            _wait(path)
        yield found


def _ours(stack: contextlib.ExitStack, network: str, one: LabNode, two: LabNode) -> Path:
    client, server = (stack.enter_context(node.container()) for node in (one, two))
    for container in (client, server):
        answer = container.add(network)
        if answer.exit:
            raise RuntimeError(f"a container of the benchmark did not start: {answer.stdout}")
    return Path(client.namespace, server.namespace, answer.ips[4])


def _wait(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.client.pings(path.ip, wait=1):
        if time.monotonic() > until:
            raise RuntimeError(f"{path.ip} was not reached from {path.client.name} within {PATIENCE:g} s")


class _Bare(contextlib.ExitStack):
    """Namespaces that nobody but ``ip`` has wired."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._switch = lab.switch
        self._count = 0

    def __enter__(self) -> _Bare:
        try:
            self._nodes = [self._node(), self._node()]
            for node, host in zip(self._nodes, HOSTS, strict=True):
                self._switch.plug(node, host)
        except BaseException:
            self.close()
            raise
        self._underlay = [address(host) for host in HOSTS]
        return self

    def pair(self) -> Path:
        client, server = self._namespace(), self._namespace()
        self._wire(client, "10.99.254.1/30", server, "10.99.254.2/30")
        return Path(client, server, "10.99.254.2")

    def on_one_node(self) -> Path:
        client, _ = self._container(self._nodes[0])
        server, ip = self._container(self._nodes[0])
        return Path(client, server, ip)

    def routed(self) -> Path:
        return self._across(self._underlay, UPLINK, 1500)

    def tunnelled(self) -> Path:
        for number, node in enumerate(self._nodes):
            node.run(
                "ip", "link", "add", "vx0", "type", "vxlan", "id", "42", "dstport", "4790", "nolearning",
                "local", self._underlay[number], "remote", self._underlay[1 - number],
            )  # fmt: skip
            node.run("ip", "address", "add", f"10.98.0.{number + 1}/30", "dev", "vx0")
            node.run("ip", "link", "set", "vx0", "up")
        return self._across(["10.98.0.1", "10.98.0.2"], "vx0", 1500 - VXLAN_OVERHEAD)

    def _across(self, hops: list[str], device: str, mtu: int) -> Path:
        client, source = self._container(self._nodes[0], mtu)
        server, ip = self._container(self._nodes[1], mtu)
        self._nodes[0].run("ip", "route", "add", ip, "via", hops[1], "dev", device)
        self._nodes[1].run("ip", "route", "add", source, "via", hops[0], "dev", device)
        return Path(client, server, ip)

    def _node(self) -> Namespace:
        node = self._namespace()
        node.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        return node

    def _container(self, node: Namespace, mtu: int = 1500) -> tuple[Namespace, str]:
        """A namespace behind a node, and its address."""
        self._count += 1
        inside, outside = f"10.99.{self._count}.2", f"10.99.{self._count}.1"
        container = self._namespace()
        self._wire(container, f"{inside}/30", node, f"{outside}/30", mtu)
        container.run("ip", "route", "add", "default", "via", outside)
        return container, inside

    def _wire(self, one: Namespace, first: str, other: Namespace, second: str, mtu: int = 1500) -> None:
        name = f"c{self._count}"
        one.run(
            "ip",
            "link",
            "add",
            name,
            "mtu",
            str(mtu),
            "type",
            "veth",
            "peer",
            "name",
            name,
            "mtu",
            str(mtu),
            "netns",
            other.name,
        )
        for place, own in ((one, first), (other, second)):
            place.run("ip", "address", "add", own, "dev", name)
            place.run("ip", "link", "set", name, "up")

    def _namespace(self) -> Namespace:
        return self.enter_context(Namespace(unique("bare")))
