"""What a node's own networks use: addresses that no container may have, whatever the pools say.

Pure. Each agent says it in its node's record (``Node.surroundings``), one line of text for each:

    address 198.18.0.1 eth0          connected 198.18.0.0/24 eth0
    gateway 198.18.0.254 eth0        route 10.0.0.0/8 tun0
    resolver 198.18.0.53             several 198.18.0.0/28
    store 198.18.0.9 tcp/2379        aggregated 12

A line that cannot be parsed counts as not said: newer agents may say more.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_network
from typing import NamedTuple

from ipam.isolation import underlay_of_node
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import BITS, UNROUTABLE, overlap
from ipam.ranges import collapse
from ipam.records import Node

LIMIT = 64
"""Lines of one node's record. It is followed by every agent: with a thousand nodes 64 lines of 40 bytes are 2.5 MB."""

_MERGED_AT_MOST = {4: 16, 6: 64}
"""Host bits of what several networks are merged into; more would keep pools from being used that no node is near."""

_NOTE = re.compile(r"[!-~]{1,40}", re.ASCII)
_PORT = re.compile(r"(tcp|udp)/([1-9][0-9]{0,4})", re.ASCII)


class Kind(enum.StrEnum):
    """What uses an address or prefix; the order is that of how much is lost when it is not known.

    STORE: an endpoint of the store. ADDRESS: of the node itself. GATEWAY: a next hop. RESOLVER: a name server.
    SEVERAL: a prefix that stands for several of those, because there were too many.
    CONNECTED: the prefix of one of the node's interfaces. ROUTE: any other route but the default one.
    """

    STORE = "store"
    ADDRESS = "address"
    GATEWAY = "gateway"
    RESOLVER = "resolver"
    SEVERAL = "several"
    CONNECTED = "connected"
    ROUTE = "route"


SINGLE = frozenset({Kind.STORE, Kind.ADDRESS, Kind.GATEWAY, Kind.RESOLVER})
"""Kinds that are one address each."""

FIRM = SINGLE | {Kind.SEVERAL}
"""Kinds that no pool ever gets an address of, forced or not."""

_WORDS = {
    Kind.STORE: "the store's endpoint",
    Kind.ADDRESS: "the address",
    Kind.GATEWAY: "the gateway",
    Kind.RESOLVER: "the name server",
    Kind.SEVERAL: "several addresses of",
    Kind.CONNECTED: "the network",
    Kind.ROUTE: "a route to",
}


class StoreEndpoint(NamedTuple):
    """Where the store listens. protocol: tcp or udp."""

    ip: IPAddress
    protocol: str
    port: int


@dataclass(frozen=True, slots=True)
class Taken:
    """An address or prefix that a node uses. note: the interface, or ``tcp/2379`` of a store; may be ""."""

    kind: Kind
    network: IPNetwork
    note: str = ""

    def __str__(self) -> str:
        where = str(self.network.network_address) if self.kind in SINGLE else str(self.network)
        return f"{self.kind.value} {where} {self.note}".rstrip()

    @property
    def ip(self) -> IPAddress:
        """The address, of those that are one."""
        return self.network.network_address

    @property
    def endpoint(self) -> StoreEndpoint | None:
        """Of a store: where it listens; None of anything else, and if the port is not said."""
        match = _PORT.fullmatch(self.note) if self.kind is Kind.STORE else None
        if match is None or int(match[2]) > 65535:
            return None
        return StoreEndpoint(self.ip, match[1], int(match[2]))

    def in_words(self, node: str) -> str:
        """For sentences: ``the gateway 198.18.0.254 (eth0) of node n1``."""
        where = self.ip if self.kind in SINGLE else self.network
        note = f" ({self.note})" if self.note else ""
        return f"{_WORDS[self.kind]} {where}{note} of node {node}"


def taken(kind: Kind, network: IPNetwork | IPAddress, note: str = "") -> Taken | None:
    """One entry; None for what no pool can share an address with, and for a default route.

    A note that does not fit the text form is told without what does not fit.
    """
    whole = ip_network(network)
    never = whole.prefixlen == 0 or whole.is_reserved or whole.is_loopback
    if never or any(overlap(whole, other) for _, other in UNROUTABLE):
        return None
    return Taken(kind, whole, re.sub(r"[^!-~]", "?", note)[:40])


def parse(text: str) -> Taken | None:
    """A line of a node's record; None if it says nothing that is known here."""
    words = text.split(" ")
    if not 2 <= len(words) <= 3 or (len(words) == 3 and not _NOTE.fullmatch(words[2])):
        return None
    try:
        kind, network = Kind(words[0]), ip_network(words[1])
    except ValueError:
        return None
    if kind in SINGLE and network.prefixlen != BITS[network.version]:
        return None
    if isinstance(network, IPv6Network) and network.network_address.scope_id is not None:
        return None
    return taken(kind, network, words[2] if len(words) == 3 else "")


def parse_all(lines: Iterable[str]) -> tuple[Taken, ...]:
    """What a node's record says; beyond LIMIT lines nobody listens."""
    found = (parse(text) for text, _ in zip(lines, range(LIMIT), strict=False))
    return tuple(one for one in found if one is not None)


def taken_of(node: Node) -> tuple[Taken, ...]:
    """What a node's networks use, by its record. Of one whose agent does not say it yet: its underlay addresses."""
    if node.surroundings:
        return parse_all(node.surroundings)
    found = (taken(Kind.ADDRESS, ip, "underlay") for ip in underlay_of_node(node))
    return tuple(one for one in found if one is not None)


def aggregated(lines: Iterable[str]) -> int:
    """How many entries of a record do not stand for themselves any more; 0 if all do."""
    for text in lines:
        word, _, number = text.partition(" ")
        if word == "aggregated" and number.isascii() and number.isdigit() and len(number) < 10:
            return int(number)
    return 0


def lines(found: Iterable[Taken], limit: int = LIMIT) -> list[str]:
    """The text of a record: sorted, each once, at most ``limit`` lines.

    What is lost first if there are more: routes, which only warn (merged, then the narrowest ones); the difference
    between neighbouring interfaces' prefixes; that between neighbouring addresses, which then stand for all of a small
    prefix. What does not fit even so is left out. The last line says how many entries that concerned.
    """
    entries = _sorted(set(found))
    if len(entries) <= limit:
        return [str(one) for one in entries]
    room = limit - 1
    kept = _fitted(entries, room)
    known = set(kept)
    return [*map(str, kept), f"aggregated {sum(one not in known for one in entries)}"]


def _fitted(entries: Sequence[Taken], room: int) -> list[Taken]:
    routes = [one for one in entries if one.kind is Kind.ROUTE]
    others = [one for one in entries if one.kind is not Kind.ROUTE]
    if len(others) <= room:
        merged = [Taken(Kind.ROUTE, network) for network in collapse(one.network for one in routes)]
        fewer = merged if len(merged) < len(routes) else routes
        fewer = sorted(fewer, key=lambda one: one.network.prefixlen)
        return _sorted([*others, *fewer[: room - len(others)]])
    for mergeable, into in (
        ({Kind.CONNECTED}, Kind.CONNECTED),
        ({Kind.GATEWAY, Kind.RESOLVER, Kind.ADDRESS}, Kind.SEVERAL),
    ):
        rest = [one for one in others if one.kind not in mergeable]
        some = [one for one in others if one.kind in mergeable]
        for host_bits in range(1, max(_MERGED_AT_MOST.values()) + 1):
            some = _merged(some, host_bits, into)
            if len(rest) + len(some) <= room:
                return _sorted([*rest, *some])
        others = _sorted([*rest, *some])
    return others[:room]


def _merged(entries: Sequence[Taken], host_bits: int, into: Kind) -> list[Taken]:
    """Those that lie in one network with that many host bits become the smallest one that has them all."""
    groups: dict[IPNetwork, list[Taken]] = {}
    for one in entries:
        bits = min(host_bits, _MERGED_AT_MOST[one.network.version])
        length = min(BITS[one.network.version] - bits, one.network.prefixlen)
        groups.setdefault(_widened(one.network, length), []).append(one)
    return [
        group[0] if len(group) == 1 else Taken(into, _spanning([one.network for one in group]))
        for group in groups.values()
    ]


def _spanning(networks: Sequence[IPNetwork]) -> IPNetwork:
    """The smallest network of all of them; they are of one family."""
    first = min(int(network.network_address) for network in networks)
    last = max(int(network.broadcast_address) for network in networks)
    return _widened(networks[0], BITS[networks[0].version] - (first ^ last).bit_length())


def _widened(network: IPNetwork, length: int) -> IPNetwork:
    return network.supernet(new_prefix=length) if length < network.prefixlen else network


_ORDER = {kind: place for place, kind in enumerate(Kind)}


def _place(one: Taken) -> tuple[int, int, int, int, str]:
    network = one.network
    return _ORDER[one.kind], network.version, int(network.network_address), network.prefixlen, one.note


def _sorted(entries: Iterable[Taken]) -> list[Taken]:
    return sorted(entries, key=_place)
