"""The machines under the containers, as far as the store ever said: whose tunnel packets this node takes, and where
the store listens.

An underlay address that is missing cuts a node's containers off; one too many lets whoever gets that address later send
into the tunnel. So an address is taken up as soon as a node's record has it. It goes only when that record has others,
or when the store told that the node was removed: never because a listing lacks it, which may be empty, partial, or of a
store that went back in time. What an earlier agent left in the kernel is kept in the same way. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ipam.isolation import addresses_of_node, underlay_of_node
from ipam.keys import IPAddress
from ipam.records import Node
from ipam.taken import Kind, parse_all
from isolator.policy import Hosts


@dataclass(frozen=True, slots=True)
class _Tunnel:
    """A node's end of the tunnel. port: UDP."""

    underlay: frozenset[IPAddress]
    port: int


class Registered:
    """See the module's docstring. node: the own one."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._tunnels: dict[str, _Tunnel] = {}
        self._inherited = Hosts()

    def inherit(self, hosts: Hosts) -> None:
        """What an earlier agent knew: without names, so it is kept until a node says that it is its own."""
        self._inherited = hosts

    def hear(self, nodes: Mapping[str, Node]) -> None:
        """The nodes that the store has now. One that says no underlay address for the moment keeps those it had."""
        for name, node in nodes.items():
            underlay = frozenset(underlay_of_node(node))
            if underlay or name not in self._tunnels:
                port = node.vxlan_port if 0 < node.vxlan_port < 65536 else 0
                self._tunnels[name] = _Tunnel(underlay, port)

    def remove(self, name: str) -> None:
        """A node was removed."""
        gone = self._tunnels.pop(name, None)
        if gone is not None:
            left = self._inherited.underlays - gone.underlay
            self._inherited = replace(self._inherited, underlays=left)

    @property
    def unnamed(self) -> list[IPAddress]:
        """Underlay addresses that are taken for a node's although no node says so any more; in order."""
        named = {ip for tunnel in self._tunnels.values() for ip in tunnel.underlay}
        return sorted(self._inherited.underlays - named, key=lambda ip: (ip.version, int(ip)))

    def hosts(
        self, nodes: Mapping[str, Node], own_of_nodes: Iterable[IPAddress], *, tunnelled: bool
    ) -> Hosts:
        """What the firewall is to know.

        nodes: as the store has them now. own_of_nodes: addresses of pools that nodes have themselves.
        tunnelled: whether any network uses the tunnel; this node's UDP port may be another program's otherwise.
        """
        own = self._tunnels.get(self._node)
        here = own.underlay if own is not None else frozenset()
        port = own.port if own is not None else 0
        return Hosts(
            nodes=frozenset(own_of_nodes).union(*map(addresses_of_node, nodes.values())),
            underlays=self._inherited.underlays.union(*(t.underlay for t in self._tunnels.values())),
            here=here or self._inherited.here,
            tunnels=self._inherited.tunnels.union(t.port for t in self._tunnels.values() if t.port),
            tunnel=(port or self._inherited.tunnel) if tunnelled else 0,
            stores=frozenset(stores_of(nodes.values())),
        )


def stores_of(nodes: Iterable[Node]) -> set[tuple[IPAddress, int]]:
    """Where the store listens: its endpoints, and all other addresses of the nodes that it runs on, because it may
    listen on those, too. With TCP ports."""
    stores: set[tuple[IPAddress, int]] = set()
    addresses: list[set[IPAddress]] = []
    for node in nodes:
        said = parse_all(node.surroundings)
        stores |= {
            (at.ip, at.port) for one in said if (at := one.endpoint) is not None and at.protocol == "tcp"
        }
        of_node = {one.ip for one in said if one.kind is Kind.ADDRESS}
        addresses.append(of_node.union(addresses_of_node(node)))
    return stores.union(
        (ip, port) for store, port in stores for has in addresses if store in has for ip in has
    )
