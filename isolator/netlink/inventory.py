"""What the kernel holds for us in the node's namespace, and its removal: for recovery, GC and status."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from ipam.keys import IPNetwork
from isolator.errors import KernelRefused
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.codec import Attributes, Message, Request
from isolator.netlink.messages import ENDPOINT_PREFIX, ROUTE_PROTOCOL, SHAPER_PREFIX
from isolator.netlink.node import Node
from isolator.netlink.seal import Ends, Seal
from isolator.netlink.socket import NetlinkSocket

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True)
class HostLink:
    """A link. mac: ``aa:bb:..``. mtu: bytes. arp: whether it speaks ARP. alias: whatever anybody wrote there.

    peer: the index of the other end of a veth pair. peer_namespace: the number of its peer's; None if that is here.
    group: of links. marked: the name that its alias says is its own, and said: what else, if that was said here
    (seal.py); "" otherwise, and where nobody looked at the seal.
    """

    name: str
    index: int
    up: bool
    mac: str
    mtu: int
    arp: bool = True
    peer: int = 0
    peer_namespace: int | None = None
    alias: str = ""
    group: int = 0
    marked: str = ""
    said: str = ""

    @property
    def ends(self) -> Ends:
        """What its alias is sealed for."""
        return Ends(self.index, self.peer, self.peer_namespace)

    @property
    def own_name(self) -> str:
        """What it is called by us; "" if it is none of ours."""
        return self.marked or (self.name if self.name.startswith(ENDPOINT_PREFIX) else "")

    @property
    def is_doomed(self) -> bool:
        """Whether its end has begun."""
        return self.group == messages.DOOMED

    @property
    def leads_elsewhere(self) -> bool:
        """Whether a namespace is behind it."""
        return self.peer_namespace is not None


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route. index: of its link; 0 if it has none. kind: RTN_UNICAST, RTN_BLACKHOLE, …

    source: the address that the node's own packets get.
    """

    destination: IPNetwork
    table: int
    index: int
    kind: int
    metric: int = 0
    gateway: IPAddress | None = None
    source: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class HostRule:
    """One of our rules. source: None matches everything."""

    family: int
    priority: int
    table: int
    source: IPNetwork | None


def link_by_name(route: NetlinkSocket, name: str) -> HostLink | None:
    """One link, in the namespace of the socket; None if there is none."""
    message = route.get(messages.get_link(name))
    return parse_link(message) if message is not None else None


def link_by_index(route: NetlinkSocket, index: int) -> HostLink | None:
    """The same, by its index."""
    message = route.get(messages.get_link_by_index(index))
    return parse_link(message) if message is not None else None


def namespace_number(route: NetlinkSocket, fd: int) -> int | None:
    """What the namespace of the socket calls another one (HostLink.peer_namespace); None if it has no link to it.

    fd: of the other one, open. Raises KernelRefused.
    """
    message = route.get(messages.get_namespace_number(fd))
    if message is None:
        return None
    found = codec.attributes(message.body, 4)
    (number,) = codec.S32.unpack(found[messages.NETNSA_NSID])
    return None if number < 0 else int(number)


def our_links(node: Node) -> dict[str, HostLink]:
    """All links of ours that endpoints have, by the names that we gave them: the node's ends, and what limits their
    traffic. One that somebody else renamed is among them; see ``name_back``."""
    links = [_opened(node.seal, parse_link(message)) for message in node.route.dump(messages.dump_links())]
    # One that has the name wins over one that had it.
    links.sort(key=lambda link: link.name == link.own_name)
    return {link.own_name: link for link in links if link.own_name}


def _opened(seal: Seal, link: HostLink) -> HostLink:
    """With what its alias says, if that was said here."""
    marked, said = seal.read(link.ends, link.alias)
    return replace(link, marked=marked, said=said) if marked else link


def say(node: Node, link: HostLink, name: str, said: str = "") -> Request:
    """Have a link's alias say its own name, by which it is found under another one, and what it is."""
    return messages.set_alias(link.index, name, node.seal.write(link.ends, name, said))


def name_back(node: Node, links: Iterable[HostLink]) -> list[KernelRefused]:
    """Give links that somebody renamed their own names again; what the kernel refused."""
    refused = []
    for link in links:
        rename = messages.rename_link(link.index, link.own_name)
        if errors := node.route.attempt([rename]):
            # By kernels that rename no link that is up. What goes with that is mended as all that somebody takes.
            down = messages.link_down_by_index(link.index, link.name)
            errors = node.route.attempt([down, rename])
        refused += errors
    return refused


def shaper_links(node: Node) -> set[str]:
    """Names of the links that limit endpoints' traffic."""
    return {name for name in our_links(node) if name.startswith(SHAPER_PREFIX)}


def our_routes(node: Node) -> list[HostRoute]:
    """Our routes: all tables, both families."""
    return [
        parse_route(message)
        for family in _FAMILIES
        for message in node.route.dump(messages.dump_routes(family, protocol=ROUTE_PROTOCOL))
    ]


def endpoint_routes(node: Node) -> list[HostRoute]:
    """Our routes to endpoints."""
    return [route for route in our_routes(node) if route.metric != messages.FABRIC_METRIC]


def fabric_routes(node: Node) -> list[HostRoute]:
    """Our routes to other nodes' addresses, and those that end what our blocks do not use."""
    return [route for route in our_routes(node) if route.metric == messages.FABRIC_METRIC]


def our_rules(node: Node) -> list[HostRule]:
    """Our rules, both families."""
    return [
        rule
        for family in _FAMILIES
        for message in node.route.dump(messages.dump_rules(family))
        if (rule := parse_rule(message)) is not None
    ]


_TUNNEL_PORTS = {
    "vxlan": messages.IFLA_VXLAN_PORT,
    "geneve": messages.IFLA_GENEVE_PORT,
    "bareudp": messages.IFLA_BAREUDP_PORT,
}
"""Kinds of links that listen on a UDP port by a socket of the kernel's, and what says on which."""


def tunnel_ports(node: Node) -> dict[int, str]:
    """UDP port -> a link of this namespace that is a tunnel on it, up or not."""
    found = {}
    for message in node.route.dump(messages.dump_links()):
        values = codec.attributes(message.body, messages.LINK.size)
        info = codec.attributes(values.get(messages.IFLA_LINKINFO, memoryview(b"")))
        kind = _TUNNEL_PORTS.get(codec.as_text(info.get(messages.IFLA_INFO_KIND)))
        options = codec.attributes(info.get(messages.IFLA_INFO_DATA, memoryview(b"")))
        if kind is not None and kind in options:
            port = int.from_bytes(options[kind], "big")
            found[port] = codec.as_text(values.get(messages.IFLA_IFNAME))
    return found


def delete_links(node: Node, names: Iterable[str]) -> None:
    """Delete links that are ours by name, all in one go; what is gone is fine.

    Each deletion waits some 16 ms for the kernel's grace periods. Links deleted as a group share that
    wait, so they are moved into one first.
    """
    ours = [name for name in names if name.startswith(ENDPOINT_PREFIX)]
    if len(ours) == 1:
        node.route.execute([messages.delete_link(ours[0])])
    elif ours:
        node.route.execute([messages.set_group(name, messages.DOOMED) for name in ours])
        node.route.execute([messages.delete_group(messages.DOOMED)])


def delete_routes(node: Node, routes: Iterable[HostRoute]) -> None:
    """Delete routes that the inventory found; what is gone is fine."""
    node.route.execute(
        [messages.delete_route(route.destination, route.table, route.index, route.kind) for route in routes]
    )


def parse_link(message: Message) -> HostLink:
    """A link from RTM_NEWLINK."""
    _, _, index, flags, _ = messages.LINK.unpack_from(message.body)
    found = codec.attributes(message.body, messages.LINK.size)
    return HostLink(
        name=codec.as_text(found.get(messages.IFLA_IFNAME)),
        index=index,
        up=bool(flags & messages.IFF_UP),
        mac=bytes(found.get(messages.IFLA_ADDRESS, b"")).hex(":"),
        mtu=codec.as_u32(found.get(messages.IFLA_MTU)),
        arp=not flags & messages.IFF_NOARP,
        # The kernel leaves it out where it is the link's own index.
        peer=codec.as_u32(found.get(messages.IFLA_LINK), index),
        peer_namespace=(
            codec.as_u32(found[messages.IFLA_LINK_NETNSID]) if messages.IFLA_LINK_NETNSID in found else None
        ),
        alias=codec.as_text(found.get(messages.IFLA_IFALIAS)),
        group=codec.as_u32(found.get(messages.IFLA_GROUP)),
    )


def parse_route(message: Message) -> HostRoute:
    """A route from RTM_NEWROUTE."""
    family, dst_len, _, _, table, _, _, kind, _ = messages.ROUTE.unpack_from(message.body)
    found = codec.attributes(message.body, messages.ROUTE.size)
    source = found.get(messages.RTA_PREFSRC)
    return HostRoute(
        destination=_network(family, found.get(messages.RTA_DST), dst_len),
        table=codec.as_u32(found.get(messages.RTA_TABLE), table),
        index=codec.as_u32(found.get(messages.RTA_OIF)),
        kind=kind,
        metric=codec.as_u32(found.get(messages.RTA_PRIORITY)),
        gateway=gateway_in(found),
        source=ip_address(bytes(source)) if source is not None else None,
    )


def gateway_in(found: Attributes) -> IPAddress | None:
    """The next hop that a route's attributes name; None if it is on the link."""
    gateway = found.get(messages.RTA_GATEWAY)
    if messages.RTA_VIA in found:  # of the other family, which comes before it in two bytes
        gateway = found[messages.RTA_VIA][2:]
    return ip_address(bytes(gateway)) if gateway is not None else None


def next_hops_of(message: Message) -> list[tuple[int, IPAddress | None]]:
    """(link index, gateway) of every next hop of a route from RTM_NEWROUTE."""
    found = codec.attributes(message.body, messages.ROUTE.size)
    if messages.RTA_OIF in found:
        return [(codec.as_u32(found[messages.RTA_OIF]), gateway_in(found))]
    hops = messages.next_hops(found.get(messages.RTA_MULTIPATH))
    return [(index, gateway_in(values)) for index, values in hops]


def parse_rule(message: Message) -> HostRule | None:
    """A rule from RTM_NEWRULE; None if it is not ours."""
    family, _, src_len, _, table, _, _ = messages.RULE.unpack_from(message.body)
    found = codec.attributes(message.body, messages.RULE.size)
    if bytes(found.get(messages.FRA_PROTOCOL, b"")) != bytes([ROUTE_PROTOCOL]):
        return None
    source = found.get(messages.FRA_SRC)
    return HostRule(
        family=4 if family == socket.AF_INET else 6,
        priority=codec.as_u32(found.get(messages.FRA_PRIORITY)),
        table=codec.as_u32(found.get(messages.FRA_TABLE), table),
        source=_network(family, source, src_len) if source is not None else None,
    )


def _network(family: int, packed: memoryview | None, length: int) -> IPNetwork:
    size = 4 if family == socket.AF_INET else 16
    return ip_network((bytes(packed) if packed is not None else bytes(size), length))
