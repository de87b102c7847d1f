"""The network under the containers: what the node's own default route leads through."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from ipam.errors import InvalidInput
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.codec import Message
from isolator.netlink.inventory import parse_link
from isolator.netlink.node import Node

DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True)
class Underlay:
    """links: of the default route, several if it is multipath. mtu: bytes, the smallest of theirs.

    addresses: theirs of global scope, IPv4 first.
    """

    links: tuple[str, ...]
    mtu: int
    addresses: tuple[IPAddress, ...]


def underlay(node: Node, name: str | None = None) -> Underlay:
    """The link called ``name``, else found by the default route with the lowest metric in the main table,
    IPv4's before IPv6's.

    Other tables are somebody's policy routing (a VPN's, a container tool's) and say nothing about the
    underlay. Without a default route: no links, 1500 bytes. Raises InvalidInput if ``name`` does not exist.
    """
    everyone = [parse_link(message) for message in node.route.dump(messages.dump_links())]
    if name is not None:
        links = [link for link in everyone if link.name == name]
        if not links:
            raise InvalidInput(
                f"the underlay interface {name!r} does not exist; set --underlay to one of "
                f"{', '.join(link.name for link in everyone)}"
            )
    else:
        default = _default_links(node, socket.AF_INET) or _default_links(node, socket.AF_INET6)
        links = [link for link in everyone if link.index in default]
    return Underlay(
        links=tuple(sorted(link.name for link in links)),
        mtu=min((link.mtu for link in links), default=DEFAULT_MTU),
        addresses=tuple(
            ip for index in sorted(link.index for link in links) for ip in _addresses(node, index)
        ),
    )


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


def _addresses(node: Node, index: int) -> list[IPAddress]:
    found: list[IPAddress] = []
    for message in node.route.dump(messages.dump_addresses(index=index)):
        _, _, _, scope, _ = messages.ADDRESS.unpack_from(message.body)
        values = codec.attributes(message.body, messages.ADDRESS.size)
        packed = values.get(messages.IFA_LOCAL, values.get(messages.IFA_ADDRESS))
        if scope == messages.SCOPE_UNIVERSE and packed is not None:
            found.append(ip_address(bytes(packed)))
    return sorted(found, key=lambda ip: (ip.version, ip.packed))
