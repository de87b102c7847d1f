"""What the nodes' own networks use, of all nodes together, and what that means for pools.

    firm        single addresses of nodes, gateways, name servers, the store   no pool gives them out
    connected   prefixes of nodes' interfaces                                  only a forced pool gives them out
    routes      whatever else nodes have routes to                             a warning when a pool is made

*Closed* to a pool is what it gives out nothing of, and what neither routes nor firewall take for containers'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ipam import keys
from ipam.errors import StoreError
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.pools import BITS, Geometry, overlap
from ipam.ranges import Range, Ranges, range_of, without
from ipam.records import Node
from ipam.store.base import Store, read_prefix
from ipam.taken import FIRM, Kind, StoreEndpoint, Taken, taken_of

FAMILIES: tuple[Family, ...] = (4, 6)


class _Place(NamedTuple):
    """A range that is closed. firm: to forced pools, too."""

    firm: bool
    family: Family
    range: Range


def _places(taken: Iterable[Taken]) -> list[_Place]:
    return [
        _Place(one.kind in FIRM, one.network.version, range_of(one.network))
        for one in taken
        if one.kind is not Kind.ROUTE
    ]


@dataclass(frozen=True, slots=True)
class Collision:
    """Something that a pool, or an address, has in common with nodes' networks. nodes: whose it is, by name."""

    taken: Taken
    nodes: tuple[str, ...]

    @property
    def in_words(self) -> str:
        """For sentences: ``the gateway 198.18.0.254 (eth0) of node n1 and 2 more``."""
        more = f" and {len(self.nodes) - 1} more" * (len(self.nodes) > 1)
        return f"{self.taken.in_words(self.nodes[0])}{more}"


class NodesNetworks:
    """See the module's docstring. Closed ranges are worked out when they are asked for, and kept."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._by_node: dict[str, tuple[Taken, ...]] = {}
        self._places: Counter[_Place] = Counter()
        self._closed: dict[tuple[Family, bool], Ranges] = {}
        for node in nodes:
            self.tell(node.name, taken_of(node))

    def tell(self, node: str, taken: Sequence[Taken]) -> bool:
        """What a node's networks use from now on; whether that changes what is closed to any pool."""
        before = self._by_node.get(node, ())
        now = tuple(taken)
        if now:
            self._by_node[node] = now
        else:
            self._by_node.pop(node, None)
        if now == before:
            return False
        old, new = Counter(_places(before)), Counter(_places(now))
        touched = old | new
        stood = {place for place in touched if place in self._places}
        self._places.update(new)
        self._places.subtract(old)
        for place in touched:
            if not self._places[place]:
                del self._places[place]
        if stood == {place for place in touched if place in self._places}:
            return False
        self._closed.clear()
        return True

    def taken_by(self, node: str) -> tuple[Taken, ...]:
        """What a node's networks use; () if nothing is known of it."""
        return self._by_node.get(node, ())

    def everything(self) -> Iterator[tuple[str, Taken]]:
        """(node, what it uses), of all nodes."""
        for node, taken in self._by_node.items():
            for one in taken:
                yield node, one

    def addresses(self) -> set[IPAddress]:
        """The addresses of all nodes' own interfaces."""
        return {one.ip for _, one in self.everything() if one.kind is Kind.ADDRESS}

    def stores(self) -> set[StoreEndpoint]:
        """Where the store listens, as all nodes see it."""
        return {at for _, one in self.everything() if (at := one.endpoint) is not None}

    # -- what is closed

    def closed(self, family: Family, *, forced: bool) -> Ranges:
        """What pools give out nothing of. forced: as a forced pool does."""
        known = self._closed.get((family, forced))
        if known is None:
            known = Ranges(
                place.range for place in self._places if place.family == family and (place.firm or not forced)
            )
            self._closed[family, forced] = known
        return known

    def closed_to(self, shape: Geometry) -> Ranges:
        """What of a pool is closed to it."""
        return self.closed(shape.family, forced=shape.forced).within(shape.first, shape.last)

    def is_firm(self, ip: IPAddress) -> bool:
        """Whether an address is a node's, a gateway's, a name server's or the store's."""
        return int(ip) in self.closed(ip.version, forced=True)

    def effective(self, shape: Geometry) -> Geometry:
        """The pool without what is closed to it."""
        return shape.without(self.closed(shape.family, forced=shape.forced))

    def open_parts(self, shape: Geometry) -> list[IPNetwork]:
        """The fewest networks that have all of a pool but what is closed to it."""
        return without(shape.cidr, self.closed_to(shape))

    # -- whose it is

    def collisions(self, network: IPNetwork, kinds: Iterable[Kind] = tuple(Kind)) -> list[Collision]:
        """What has an address in common with a network, each with all nodes that have it; the gravest first."""
        wanted = frozenset(kinds)
        found: dict[Taken, list[str]] = {}
        for node, one in self.everything():
            if one.kind in wanted and overlap(one.network, network):
                found.setdefault(one, []).append(node)
        order = list(Kind)
        return sorted(
            (Collision(taken, tuple(sorted(nodes))) for taken, nodes in found.items()),
            key=lambda one: (order.index(one.taken.kind), -one.taken.network.prefixlen, str(one.taken)),
        )

    def why_closed(self, ip: IPAddress, shape: Geometry) -> str:
        """Whose an address of a pool is, for sentences; "" if it is not closed."""
        if int(ip) not in self.closed(ip.version, forced=shape.forced):
            return ""
        host = type(shape.cidr)((int(ip), BITS[ip.version]))
        found = self.collisions(host, FIRM if shape.forced else FIRM | {Kind.CONNECTED})
        return found[0].in_words if found else ""


async def read_nodes_networks(store: Store) -> NodesNetworks:
    """What all nodes' records say now. A record that cannot be read says nothing. Raises StoreUnavailable."""
    items, _ = await read_prefix(store, keys.NODES)
    found = NodesNetworks()
    for kv in items:
        try:
            found.tell(kv.key.removeprefix(keys.NODES), taken_of(Node.decode(kv.key, kv.value)))
        except StoreError:
            continue  # `moorage node list` says so
    return found
