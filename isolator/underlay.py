"""The network under the containers: what the node's own default route leads through, or what it is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from ipam.errors import InvalidInput
from ipam.keys import IPNetwork
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.codec import Message
from isolator.netlink.inventory import HostLink, parse_link
from isolator.netlink.node import Node

DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True)
class Underlay:
    """links: of the default route, several if it is multipath. mtu: bytes, the smallest of theirs.

    addresses: theirs of global scope, IPv4 first; of those asked for by address, those come first. Of one family the
    first is what other nodes are told: floating (a lone /32 or /128 beside others) and temporary ones come last.
    link_local: an IPv6 one of the first link, None if it has none.
    """

    links: tuple[str, ...]
    mtu: int
    addresses: tuple[IPAddress, ...]
    link_local: IPAddress | None = None


def told(addresses: Sequence[str], mtu: int) -> Underlay:
    """The underlay that other nodes were told of (ipam/records.py `Node.underlay`). Through which links is not said."""
    ips = [ip_address(text) for text in addresses]
    return Underlay(
        links=(),
        mtu=mtu or DEFAULT_MTU,
        addresses=tuple(ip for ip in ips if not ip.is_link_local),
        link_local=next((ip for ip in ips if ip.is_link_local), None),
    )


def underlay(node: Node, wanted: str | None = None) -> Underlay:
    """The link called ``wanted``, or with that address, or with one in that network; without it the links of the
    default route with the lowest metric in the main table, IPv4's before IPv6's.

    Other tables are somebody's policy routing (a VPN's, a container tool's) and say nothing about the
    underlay. Without a default route: no links, 1500 bytes. Raises InvalidInput if ``wanted`` does not exist.
    """
    everyone = [parse_link(message) for message in node.route.dump(messages.dump_links())]
    if wanted is None:
        default = _default_links(node, socket.AF_INET) or _default_links(node, socket.AF_INET6)
        return _of(node, [link for link in everyone if link.index in default])
    by_name = [link for link in everyone if link.name == wanted]
    if by_name:
        return _of(node, by_name)
    network = _network(wanted)
    for link in everyone if network is not None else ():
        found = _of(node, [link])
        named = [ip for ip in found.addresses if network is not None and ip in network]
        if named:
            rest = [ip for ip in found.addresses if ip not in named]
            return replace(found, addresses=(*named, *rest))
    raise InvalidInput(
        f"the underlay {wanted!r} does not exist: it is neither an interface here nor an address or network of one; "
        f"set --underlay to one of {', '.join(link.name for link in everyone)}"
    )


def _of(node: Node, links: list[HostLink]) -> Underlay:
    found = [
        (ip, scope)
        for link in sorted(links, key=lambda link: link.index)
        for ip, scope in _addresses(node, link.index)
    ]
    return Underlay(
        links=tuple(sorted(link.name for link in links)),
        mtu=min((link.mtu for link in links), default=DEFAULT_MTU),
        addresses=tuple(ip for ip, scope in found if scope == messages.SCOPE_UNIVERSE),
        link_local=next(
            (ip for ip, scope in found if ip.version == 6 and scope == messages.SCOPE_LINK), None
        ),
    )


def _network(text: str) -> IPNetwork | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def default_links(node: Node) -> set[str]:
    """Names of the links that the default routes of either family lead through."""
    indexes = _default_links(node, socket.AF_INET) | _default_links(node, socket.AF_INET6)
    links = (parse_link(message) for message in node.route.dump(messages.dump_links()))
    return {link.name for link in links if link.index in indexes}


def _default_links(node: Node, family: int) -> frozenset[int]:
    routes = [
        (metric, indexes)
        for message in node.route.dump(messages.dump_routes(family, table=messages.TABLE_MAIN))
        for metric, indexes in _default_route(message)
    ]
    lowest = min((metric for metric, _ in routes), default=0)
    return frozenset(index for metric, indexes in routes if metric == lowest for index in indexes)


def _default_route(message: Message) -> Iterator[tuple[int, list[int]]]:
    """Metric and links, if the route is a default route that leads anywhere."""
    _, dst_len, _, _, _, _, _, kind, _ = messages.ROUTE.unpack_from(message.body)
    if dst_len or kind != messages.RTN_UNICAST:
        return
    found = codec.attributes(message.body, messages.ROUTE.size)
    if messages.RTA_OIF in found:
        indexes = [codec.as_u32(found[messages.RTA_OIF])]
    else:
        indexes = messages.next_hop_links(found.get(messages.RTA_MULTIPATH))
    yield codec.as_u32(found.get(messages.RTA_PRIORITY)), indexes


def _addresses(node: Node, index: int) -> list[tuple[IPAddress, int]]:
    """A link's addresses with their scopes, IPv4 first."""
    found: list[tuple[bool, IPAddress, int]] = []
    for message in node.route.dump(messages.dump_addresses(index=index)):
        _, prefixlen, flags, scope, _ = messages.ADDRESS.unpack_from(message.body)
        values = codec.attributes(message.body, messages.ADDRESS.size)
        packed = values.get(messages.IFA_LOCAL, values.get(messages.IFA_ADDRESS))
        if packed is not None:
            ip = ip_address(bytes(packed))
            fleeting = bool(flags & messages.IFA_F_SECONDARY) or prefixlen == ip.max_prefixlen
            found.append((fleeting, ip, scope))
    found.sort(key=lambda one: (one[1].version, one[0], one[1].packed))
    return [(ip, scope) for _, ip, scope in found]
