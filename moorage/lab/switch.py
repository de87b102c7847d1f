"""The lab's underlay: a bridge in a namespace of its own, which nodes and etcd members are plugged into.

    node namespace  up0 --- p1  [br0 in the switch's namespace]  p2 --- up0  another namespace

What passes between two ports is decided by a table in the switch, so a cut is a cut of the wire: neither
side is told.
"""

from __future__ import annotations

import json
from ipaddress import ip_interface

from moorage.lab.namespace import Namespace
from moorage.lab.resource import Resource

UNDERLAY4 = "198.18.0.{}/24"
UNDERLAY6 = "fd98::{}/64"
"""Addresses by host number: the benchmarking range (RFC 2544) and a unique local one."""

MAC = "02:6d:72:67:00:{:02x}"
"""By host number; of no manufacturer."""

UPLINK = "up0"
"""What the underlay's interface is called in every namespace that is plugged in."""

_TABLE = """
table bridge mrglab {
    set cut { type ifname . ifname; }
    chain forward { type filter hook forward priority 0; iifname . oifname @cut drop; }
}
"""


def address(host: int) -> str:
    """The IPv4 address of a host number."""
    return str(ip_interface(UNDERLAY4.format(host)).ip)


class Switch(Resource):
    """See the module's docstring. What is plugged in is known by its host number, 1 to 253."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def create(self) -> None:
        self.namespace.create()
        self.namespace.run("ip", "link", "add", "br0", "type", "bridge")
        self.namespace.run("ip", "link", "set", "br0", "up")
        self.namespace.run("nft", _TABLE)

    def delete(self) -> None:
        self.namespace.delete()

    def plug(self, namespace: Namespace, host: int) -> None:
        """Give a namespace the underlay addresses of ``host``, and its MAC, which a machine keeps all its life."""
        self.namespace.run(
            "ip", "link", "add", _port(host), "type", "veth",
            "peer", "name", UPLINK, "address", MAC.format(host), "netns", namespace.name,
        )  # fmt: skip
        self.namespace.run("ip", "link", "set", _port(host), "master", "br0", "up")
        for own in (UNDERLAY4.format(host), UNDERLAY6.format(host)):
            namespace.run("ip", "address", "add", own, "dev", UPLINK, *(["nodad"] * (":" in own)))
        namespace.run("ip", "link", "set", UPLINK, "up")
        namespace.run("ip", "route", "add", "default", "via", "198.18.0.254")

    def unplug(self, host: int) -> None:
        """Take away the wire of ``host``; no error if there is none. What was cut stays cut."""
        self.namespace.run("ip", "link", "delete", _port(host), check=False)

    def cut(self, one: int, other: int) -> None:
        """Nothing passes between the two hosts any more, in either direction."""
        a, b = _port(one), _port(other)
        self.namespace.run("nft", f"add element bridge mrglab cut {{ {a} . {b}, {b} . {a} }}")

    def cuts(self) -> set[tuple[int, int]]:
        """The pairs of hosts that are cut off from each other, the lower number first."""
        shown = json.loads(self.namespace.run("nft", "-j", "list", "set", "bridge", "mrglab", "cut").stdout)
        pairs = (
            [_host(port) for port in element["concat"]]
            for item in shown["nftables"]
            for element in item.get("set", {}).get("elem", [])
        )
        return {(min(pair), max(pair)) for pair in pairs}

    def heal(self) -> None:
        """Every wire is whole again."""
        self.namespace.run("nft", "flush set bridge mrglab cut")


def _port(host: int) -> str:
    return f"p{host}"


def _host(port: str) -> int:
    return int(port.removeprefix("p"))
