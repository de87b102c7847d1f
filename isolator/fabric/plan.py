"""What the fabric holds in the kernel: from the cluster's facts to routes, neighbours and tunnels. Pure.

    block of n2    10.64.3.0/26  -->  via fe80::(n2's MAC) dev mfbvxlan    the frame goes to n2's MAC,
                                      fe80::(n2's MAC) -> n2's MAC         a tunnel leads it to n2's underlay
                                      n2's MAC -> 192.0.2.2, UDP 4789      address
                   with hostgw:  via 192.0.2.2 dev eth0
    away from its  10.64.9.7/32  -->  as above, to the node that has it
    own block      10.64.1.0/26  -->  dropped, where no container's own route is better

Addresses that nodes' own networks use are cut out of all of them (ipam/nodes_networks.py).

One next hop serves both families, IPv4 routes have it as an IPv6 one: it follows from the node's MAC alone, so a
node can be reached before its device has any address, and IPv6 over an underlay that has only IPv4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2s
from ipaddress import IPv6Address, ip_network
from typing import NamedTuple

from ipam.isolation import unicast
from ipam.keys import Family, IPNetwork
from ipam.ranges import Ranges, without
from ipam.records import Node
from isolator.model import IPAddress

VXLAN_DEVICE = "mfbvxlan"
VNI = 0x6D6F6F
"""The network identifier of every moorage: "moo"."""
VXLAN_PORT = 4789
"""UDP, as registered for VXLAN (RFC 7348 section 8)."""

OVERHEAD = {4: 50, 6: 70}
"""Bytes that a tunnel over that family adds: outer IP 20 or 40, UDP 8, VXLAN 8, inner Ethernet 14."""


@dataclass(frozen=True, slots=True)
class Route:
    """via: the next hop. device: the link, "" for whichever leads to ``via``. Without either it drops.

    source: for the node's own packets, None as the kernel likes.
    """

    destination: IPNetwork
    via: IPAddress | None = None
    device: str = ""
    source: IPAddress | None = None

    @property
    def drops(self) -> bool:
        return self.via is None and not self.device

    @property
    def is_tunnelled(self) -> bool:
        return self.device == VXLAN_DEVICE


class Remote(NamedTuple):
    """The far end of a tunnel. port: UDP; 0 if it is the same as here, which is how the kernel tells it."""

    ip: IPAddress
    port: int


@dataclass(slots=True)
class Plan:
    """Routes by destination; on the VXLAN device, MACs by next hop and remotes by MAC."""

    routes: dict[IPNetwork, Route] = field(default_factory=dict)
    neighbours: dict[IPAddress, str] = field(default_factory=dict)
    tunnels: dict[str, Remote] = field(default_factory=dict)

    def add(self, other: Plan) -> None:
        self.routes |= other.routes
        self.neighbours |= other.neighbours
        self.tunnels |= other.tunnels

    def over(self, older: Plan) -> Plan:
        """All of both; where they differ, this one."""
        both = Plan()
        both.add(older)
        both.add(self)
        return both


@dataclass(frozen=True, slots=True)
class Here:
    """What this node is, as far as its fabric is concerned.

    tunnel_family: of the underlay that its tunnels run over; None if it has no device for them.
    port: of its VXLAN device. link: of the underlay; "" if there is none, or several. sources: addresses of its
    VXLAN device.
    """

    name: str
    tunnel_family: Family | None
    port: int = VXLAN_PORT
    link: str = ""
    sources: Mapping[int, IPAddress] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's facts, parsed.

    underlay: its first address of each family. link_local: on its underlay. mac: "" if it has no tunnel.
    """

    name: str
    underlay: Mapping[int, IPAddress]
    link_local: IPAddress | None
    mac: str
    port: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Addresses of one node: a block, or one away from its block. fabric: of their network."""

    destination: IPNetwork
    fabric: str


def mac_of(node: str) -> str:
    """The MAC of a node's VXLAN device, from its name: ``06`` and 40 bits of a hash; unicast, locally administered."""
    return (b"\x06" + blake2s(node.encode(), digest_size=5).digest()).hex(":")


def next_hop(mac: str) -> IPv6Address:
    """The link-local address that a MAC stands for (modified EUI-64, RFC 4291 appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])


def parse_peer(node: Node) -> Peer:
    """A node's facts from its record. What is no address, MAC or port counts as not said."""
    underlay: dict[int, IPAddress] = {}
    link_local = None
    for ip in (ip for text in node.underlay if (ip := unicast(text))):
        if ip.version == 6 and ip.is_link_local:
            link_local = link_local or ip
        else:
            underlay.setdefault(ip.version, ip)
    port = node.vxlan_port if 0 < node.vxlan_port < 65536 else VXLAN_PORT
    return Peer(node.name, underlay, link_local, _mac(node.mac), port)


def _mac(text: str) -> str:
    """A MAC of one host as the kernel prints it; "" for any other text."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        return ""
    raw = bytes.fromhex(text.replace(":", ""))
    return "" if raw[0] & 1 or not any(raw) else raw.hex(":")


def towards(peer: Peer, pieces: Iterable[Piece], here: Here) -> tuple[Plan, list[str]]:
    """What leads to another node's addresses, and sentences about what cannot."""
    plan, problems = Plan(), []
    for piece in pieces:
        if piece.fabric == "hostgw":
            hop = _direct(peer, piece.destination.version)
            if hop is None:
                problems.append(
                    f"{piece.destination} of node {peer.name} is unreachable: the node says no "
                    f"IPv{piece.destination.version} underlay address; start its agent with --underlay"
                )
            else:
                plan.routes[piece.destination] = Route(piece.destination, hop, here.link)
        elif piece.fabric == "vxlan":
            remote = _far_end(peer, here)
            if isinstance(remote, str):
                problems.append(f"{piece.destination} of node {peer.name} is unreachable: {remote}")
                continue
            hop = next_hop(peer.mac)
            source = here.sources.get(piece.destination.version)
            plan.routes[piece.destination] = Route(piece.destination, hop, VXLAN_DEVICE, source)
            plan.neighbours[hop] = peer.mac
            plan.tunnels[peer.mac] = remote
    return plan, problems


def _direct(peer: Peer, family: int) -> IPAddress | None:
    """The next hop to a node; IPv4 routes may have an IPv6 one, where a segment has only that."""
    return peer.underlay.get(family) or peer.underlay.get(6) or peer.link_local


def _far_end(peer: Peer, here: Here) -> Remote | str:
    if here.tunnel_family is None:
        return "this node has no VXLAN device; `moorage status` here says why"
    if not peer.mac:
        return "that node has no VXLAN device yet; see that its agent runs and is of this version"
    remote = peer.underlay.get(here.tunnel_family)
    if remote is None:
        return (
            f"the tunnel of this node runs over IPv{here.tunnel_family}, and that node says no such underlay address; "
            "start both agents with an --underlay that has the same family"
        )
    return Remote(remote, 0 if peer.port == here.port else peer.port)


def cut(piece: Piece, closed: Ranges, assigned: Iterable[IPAddress]) -> list[Piece]:
    """A piece without what nodes' own networks use, but with each assigned address in there: the fewest routes.

    assigned: those of the piece that lie in ``closed`` and stay reachable; never one that a node itself uses.
    """
    if not closed:
        return [piece]
    parts = [*without(piece.destination, closed), *map(host, assigned)]
    return [Piece(part, piece.fabric) for part in parts]


def released(
    actual: Plan, closed_in: Callable[[IPNetwork], Ranges], is_firm: Callable[[IPAddress], bool]
) -> Plan:
    """A plan that an earlier agent left in the kernel, without what takes nodes' own networks for containers'.

    closed_in: what of a network is closed. is_firm: whether an address is a node's, a gateway's, ... Routes to single
    addresses go only if it is: the others may be those of containers that had theirs before.
    """
    kept = Plan(neighbours=actual.neighbours, tunnels=actual.tunnels)
    for destination, route in actual.routes.items():
        if destination.num_addresses == 1:
            parts = [] if is_firm(destination.network_address) else [destination]
        else:
            parts = without(destination, closed_in(destination))
        for part in parts:
            if part == destination or part not in actual.routes:
                kept.routes[part] = replace(route, destination=part)
    return kept


def at_home(pieces: Iterable[Piece]) -> Plan:
    """What keeps the unused addresses of our own blocks from being sent away."""
    return Plan({p.destination: Route(p.destination) for p in pieces if p.fabric != "none"})


def host(ip: IPAddress) -> IPNetwork:
    """The network of one address."""
    return ip_network(ip)
