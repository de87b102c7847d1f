"""The lab's underlay: a bridge in a namespace of its own, which nodes and etcd members are plugged into.

    node namespace  up0 --- p1  [br0 in the switch's namespace]  p2 --- up0  another namespace

What passes between two ports is decided by a table in the switch, so a cut is a cut of the wire: neither
side is told.
"""

from __future__ import annotations

from moorage.lab.namespace import Namespace, unique

UNDERLAY4 = "198.18.0.{}/24"
UNDERLAY6 = "fd98::{}/64"
"""Addresses by host number: the benchmarking range (RFC 2544) and a unique local one."""

UPLINK = "up0"
"""What the underlay's interface is called in every namespace that is plugged in."""

_TABLE = """
table bridge mrglab {
    set cut { type ifname . ifname; }
    chain forward { type filter hook forward priority 0; iifname . oifname @cut drop; }
}
"""


class Switch:
    """See the module's docstring. A context manager."""

    def __init__(self) -> None:
        self.namespace = Namespace(unique("switch"))
        self._ports: dict[str, str] = {}

    def __enter__(self) -> Switch:
        self.namespace.create()
        self.namespace.run("ip", "link", "add", "br0", "type", "bridge")
        self.namespace.run("ip", "link", "set", "br0", "up")
        self.namespace.run("nft", _TABLE)
        return self

    def __exit__(self, *_: object) -> None:
        self.namespace.delete()

    def plug(self, namespace: Namespace, host: int) -> str:
        """Give a namespace the underlay addresses of ``host`` (1 to 253); returns the IPv4 one."""
        port = f"p{host}"
        self.namespace.run(
            "ip", "link", "add", port, "type", "veth", "peer", "name", UPLINK, "netns", namespace.name
        )
        self.namespace.run("ip", "link", "set", port, "master", "br0", "up")
        for address in (UNDERLAY4.format(host), UNDERLAY6.format(host)):
            namespace.run("ip", "address", "add", address, "dev", UPLINK, *(["nodad"] * (":" in address)))
        namespace.run("ip", "link", "set", UPLINK, "up")
        namespace.run("ip", "route", "add", "default", "via", "198.18.0.254")
        self._ports[namespace.name] = port
        return UNDERLAY4.format(host).split("/")[0]

    def cut(self, one: Namespace, other: Namespace) -> None:
        """Nothing passes between the two any more, in either direction."""
        a, b = self._ports[one.name], self._ports[other.name]
        self.namespace.run("nft", f"add element bridge mrglab cut {{ {a} . {b}, {b} . {a} }}")

    def heal(self) -> None:
        """Every wire is whole again."""
        self.namespace.run("nft", "flush set bridge mrglab cut")
