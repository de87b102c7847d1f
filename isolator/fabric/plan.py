"""What the fabric holds in the kernel: from the cluster's facts to routes, neighbours and tunnels. Pure.

    block of n2    10.64.3.0/26  -->  via fe80::(n2's MAC) dev mfbvxlan    the frame goes to n2's MAC,
                                      fe80::(n2's MAC) -> n2's MAC         a tunnel leads it to n2's underlay
                                      n2's MAC -> 192.0.2.2, UDP 4789      address
                   with hostgw:  via 192.0.2.2 dev eth0
    away from its  10.64.9.7/32  -->  as above, to the node that has it
    at home        10.64.1.0/26  -->  dropped, where no container's own route is better: this node's blocks, and the
                   10.64.9.9/32       addresses it holds away from them

The tunnel runs over a family that both nodes' underlays have (``tunnel_family``). Most nodes need one device for that;
one whose underlay has both families has a second device while a node is registered that it shares only the other with.

Addresses that nodes' own networks use are cut out of all of them (ipam/nodes_networks.py).

One next hop serves both families, IPv4 routes have it as an IPv6 one: it follows from the node's MAC alone, so a
node can be reached before its device has any address, and IPv6 over an underlay that has only IPv4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
SECOND_DEVICE: Mapping[Family, str] = {4: f"{VXLAN_DEVICE}4", 6: f"{VXLAN_DEVICE}6"}
"""By family of the underlay: what the device for tunnels over the family that is not the first is called."""
VXLAN_DEVICES = (VXLAN_DEVICE, *SECOND_DEVICE.values())
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
        return self.device in VXLAN_DEVICES


class Remote(NamedTuple):
    """The far end of a tunnel. port: UDP; 0 if it is the same as here, which is how the kernel tells it."""

    ip: IPAddress
    port: int


class Hop(NamedTuple):
    """A next hop on a VXLAN device."""

    device: str
    ip: IPAddress


class Station(NamedTuple):
    """A MAC behind a VXLAN device."""

    device: str
    mac: str


@dataclass(slots=True)
class Plan:
    """Routes by destination; on VXLAN devices, MACs by next hop and remotes by MAC."""

    routes: dict[IPNetwork, Route] = field(default_factory=dict)
    neighbours: dict[Hop, str] = field(default_factory=dict)
    tunnels: dict[Station, Remote] = field(default_factory=dict)

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

    families: that its underlay has addresses of, in its own order. devices: for tunnels, by the family that these run
    over. port: of those. link: of the underlay; "" if there is none, or several. sources: addresses of its first
    VXLAN device.
    """

    name: str
    families: tuple[Family, ...]
    devices: Mapping[Family, str] = field(default_factory=dict)
    port: int = VXLAN_PORT
    link: str = ""
    sources: Mapping[int, IPAddress] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's facts, parsed.

    underlay: its first address of each family, in its own order. link_local: on its underlay. mac: "" if it has no
    tunnel.
    """

    name: str
    underlay: Mapping[Family, IPAddress]
    link_local: IPAddress | None
    mac: str
    port: int

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(self.underlay)


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
    underlay: dict[Family, IPAddress] = {}
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


def tunnel_family(one: Sequence[Family], other: Sequence[Family]) -> Family | None:
    """What a tunnel between two underlays runs over, the same seen from either; None if they have nothing in common.

    It is a family that both have and that is the first of one of them: so nodes with the same underlay need one device,
    and of two first ones it is IPv4, which adds less to each packet.
    """
    return min(set(one) & set(other) & {*one[:1], *other[:1]}, default=None)


def towards(peer: Peer, pieces: Iterable[Piece], here: Here) -> tuple[Plan, list[str]]:
    """What leads to another node's addresses, and sentences about what cannot."""
    plan, problems = Plan(), []
    for piece in pieces:
        if piece.fabric == "hostgw":
            hop = _direct(peer, piece.destination.version, here.families)
            if hop is None:
                problems.append(
                    f"{piece.destination} of node {peer.name} is unreachable: the node says no underlay address that "
                    f"IPv{piece.destination.version} can be sent to from here; start both agents with an --underlay "
                    "that has the same family"
                )
            else:
                plan.routes[piece.destination] = Route(piece.destination, hop, here.link)
        elif piece.fabric == "vxlan":
            far = _far_end(peer, here)
            if isinstance(far, str):
                problems.append(f"{piece.destination} of node {peer.name} is unreachable: {far}")
                continue
            device, remote = far
            hop = next_hop(peer.mac)
            source = here.sources.get(piece.destination.version)
            plan.routes[piece.destination] = Route(piece.destination, hop, device, source)
            plan.neighbours[Hop(device, hop)] = peer.mac
            plan.tunnels[Station(device, peer.mac)] = remote
    return plan, problems


def _direct(peer: Peer, family: Family, here: Collection[Family]) -> IPAddress | None:
    """The next hop to a node, of a family that this one has as well; IPv4 routes may have an IPv6 one, where a segment
    has only that. Every node with IPv6 has a link-local address.
    """
    common = [peer.underlay[found] for found in (family, 6) if found in peer.underlay and found in here]
    return common[0] if common else peer.link_local


def _far_end(peer: Peer, here: Here) -> tuple[str, Remote] | str:
    """The device that leads to a node, and where to."""
    if not peer.mac:
        return "that node has no VXLAN device yet; see that its agent runs and is of this version"
    family = tunnel_family(here.families, peer.families)
    if family is None:
        return (
            f"the underlay of this node has {_families(here.families)}, and that node's {_families(peer.families)}; "
            "start both agents with an --underlay that has the same family"
        )
    if family not in here.devices:
        return f"this node has no VXLAN device over IPv{family}; `moorage status` here says why"
    return here.devices[family], Remote(peer.underlay[family], 0 if peer.port == here.port else peer.port)


def _families(families: Iterable[Family]) -> str:
    return " and ".join(f"IPv{family}" for family in sorted(families)) or "no address"


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
    """What keeps the unused addresses of our own blocks, and single ones that we hold, from being sent away: to a node
    that would send them back, or by the default route.
    """
    return Plan({p.destination: Route(p.destination) for p in pieces if p.fabric != "none"})


def host(ip: IPAddress) -> IPNetwork:
    """The network of one address."""
    return ip_network(ip)
