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

Place = tuple[IPAddress, int]
"""An address and a TCP port."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a node's record says. port: UDP, 0 if it says none. own: what it calls from. addresses: all that it has.
    stores: where it finds the store."""

    record: Node
    underlay: frozenset[IPAddress]
    port: int
    own: frozenset[IPAddress]
    addresses: frozenset[IPAddress]
    stores: frozenset[Place]


def _facts(node: Node) -> _Facts:
    said = parse_all(node.surroundings)
    own = frozenset(addresses_of_node(node))
    endpoints = (one.endpoint for one in said)
    return _Facts(
        record=node,
        underlay=frozenset(underlay_of_node(node)),
        port=node.vxlan_port if 0 < node.vxlan_port < 65536 else 0,
        own=own,
        addresses=own.union(one.ip for one in said if one.kind is Kind.ADDRESS),
        stores=frozenset((at.ip, at.port) for at in endpoints if at is not None and at.protocol == "tcp"),
    )


class Registered:
    """See the module's docstring. node: the own one."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._facts: dict[str, _Facts] = {}
        self._listed: set[str] = set()
        self._inherited = Hosts()

    def inherit(self, hosts: Hosts) -> None:
        """What an earlier agent knew: without names, so it is kept until a node says that it is its own."""
        self._inherited = hosts

    def hear(self, nodes: Mapping[str, Node]) -> None:
        """The nodes that the store has now. One that says no underlay address for the moment keeps those it had."""
        self._listed = set(nodes)
        for name, node in nodes.items():
            before = self._facts.get(name)
            if before is not None and before.record is node:
                continue
            now = _facts(node)
            if before is not None and not now.underlay:
                now = replace(now, underlay=before.underlay, port=before.port)
            self._facts[name] = now
        named = frozenset().union(*(facts.underlay for facts in self._facts.values()))
        left = self._inherited.underlays - named
        # Ports have no names either: those of nodes that are known are in their records.
        tunnels = self._inherited.tunnels if left or not self._facts else frozenset()
        self._inherited = replace(self._inherited, underlays=left, tunnels=tunnels)

    def remove(self, name: str) -> None:
        """A node was removed."""
        self._facts.pop(name, None)

    @property
    def unnamed(self) -> list[IPAddress]:
        """Underlay addresses that are taken for a node's although no node of the store has them; in order."""
        listed = frozenset().union(
            *(self._facts[name].underlay for name in self._listed & self._facts.keys())
        )
        return sorted(self._underlays() - listed, key=lambda ip: (ip.version, int(ip)))

    def _underlays(self) -> frozenset[IPAddress]:
        return self._inherited.underlays.union(*(facts.underlay for facts in self._facts.values()))

    def hosts(self, own_of_nodes: Iterable[IPAddress], *, tunnelled: bool) -> Hosts:
        """What the firewall is to know.

        own_of_nodes: addresses of pools that nodes have themselves. tunnelled: whether any network uses the tunnel;
        this node's UDP port may be another program's otherwise.
        """
        here = self._facts.get(self._node)
        listed = [self._facts[name] for name in self._listed & self._facts.keys()]
        return Hosts(
            nodes=frozenset(own_of_nodes).union(*(facts.own for facts in listed)),
            underlays=self._underlays(),
            here=(here.underlay if here is not None else frozenset()) or self._inherited.here,
            tunnels=self._inherited.tunnels.union(f.port for f in self._facts.values() if f.port),
            tunnel=((here.port if here is not None else 0) or self._inherited.tunnel) if tunnelled else 0,
            stores=_everywhere(listed),
        )


def stores_of(nodes: Iterable[Node]) -> frozenset[Place]:
    """Where the store listens: its endpoints, and all other addresses of the nodes that it runs on, because it may
    listen on those, too."""
    return _everywhere([_facts(node) for node in nodes])


def _everywhere(facts: Iterable[_Facts]) -> frozenset[Place]:
    known = list(facts)
    stores = frozenset().union(*(one.stores for one in known))
    return stores.union(
        (ip, port)
        for store, port in stores
        for one in known
        if store in one.addresses
        for ip in one.addresses
    )
