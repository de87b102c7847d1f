"""What this node's own networks use, read from its kernel and files: for the other nodes, and for this one first.

addresses of all interfaces but moorage's own      the node's, and the prefixes that it is connected to
next hops of the main table's routes               gateways
other routes of the main table                     told, but never the default one
/etc/resolv.conf                                   name servers; those behind a local stub, too
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from ipam.keys import IPAddress
from ipam.taken import Kind, Taken, taken
from isolator.netlink import codec, messages
from isolator.netlink.codec import Message
from isolator.netlink.inventory import next_hops_of, parse_link, parse_route
from isolator.netlink.messages import ENDPOINT_PREFIX, ROUTE_PROTOCOL
from isolator.netlink.node import Node

FABRIC_PREFIX = "mfb"
"""Names of the fabric's own devices begin with it."""

RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""Files that name the node's name servers; the second has those that systemd's local stub asks."""

_RESOLVERS_AT_MOST = 16 << 10
"""Bytes that are read of such a file."""

_PROTOCOL_KERNEL = 2
"""RTPROT_KERNEL: a route that the kernel made itself, for an address."""


class Found(NamedTuple):
    """What was read. links: names of the interfaces that there are, moorage's own left out."""

    taken: list[Taken]
    links: frozenset[str]


def surroundings(node: Node, resolvers: Iterable[Path] = RESOLVERS) -> Found:
    """Everything that the node's own networks use. Raises KernelRefused."""
    links = (parse_link(message) for message in node.route.dump(messages.dump_links()))
    names = {link.index: link.name for link in links if not _is_ours(link.name)}
    found = [*_of_addresses(node, names), *_of_routes(node, names), *_of_resolvers(resolvers)]
    return Found(sorted({one for one in found if one is not None}, key=str), frozenset(names.values()))


def _is_ours(name: str) -> bool:
    return name.startswith((ENDPOINT_PREFIX, FABRIC_PREFIX))


def _of_addresses(node: Node, names: dict[int, str]) -> Iterator[Taken | None]:
    for message in node.route.dump(messages.dump_addresses()):
        _, length, _, _, index = messages.ADDRESS.unpack_from(message.body)
        if index not in names:
            continue
        values = codec.attributes(message.body, messages.ADDRESS.size)
        shown = values.get(messages.IFA_ADDRESS)
        local = values.get(messages.IFA_LOCAL, shown)
        if shown is None or local is None:
            continue
        own, there = ip_address(bytes(local)), ip_address(bytes(shown))
        yield taken(Kind.ADDRESS, own, names[index])
        if length < there.max_prefixlen:
            yield taken(Kind.CONNECTED, ip_network((int(there), length), strict=False), names[index])
        elif there != own:
            yield taken(Kind.GATEWAY, there, names[index])  # the other end of a point-to-point link


def _of_routes(node: Node, names: dict[int, str]) -> Iterator[Taken | None]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in node.route.dump(messages.dump_routes(family, table=messages.TABLE_MAIN)):
            _, _, _, _, _, protocol, _, kind, _ = messages.ROUTE.unpack_from(message.body)
            if kind == messages.RTN_UNICAST and protocol not in (ROUTE_PROTOCOL, _PROTOCOL_KERNEL):
                yield from _of_route(message, names)


def _of_route(message: Message, names: dict[int, str]) -> Iterator[Taken | None]:
    theirs = [(index, gateway) for index, gateway in next_hops_of(message) if index in names]
    for index, gateway in theirs:
        if gateway is not None:
            yield taken(Kind.GATEWAY, gateway, names[index])
    if theirs:
        yield taken(Kind.ROUTE, parse_route(message).destination, names[theirs[0][0]])


def _of_resolvers(files: Iterable[Path]) -> Iterator[Taken | None]:
    for file in files:
        try:
            with file.open(errors="replace") as text:
                lines = text.read(_RESOLVERS_AT_MOST).splitlines()
        except OSError:
            continue  # there is none
        for line in lines:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver" and (server := _address(words[1])) is not None:
                yield taken(Kind.RESOLVER, server)


def _address(text: str) -> IPAddress | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


_LAPSES = {Kind.ADDRESS: Kind.ADDRESS, Kind.CONNECTED: Kind.ADDRESS, Kind.GATEWAY: Kind.GATEWAY}
"""What an interface may be without for a moment -> what shows that it is not."""


def kept(known: Iterable[Taken], found: Iterable[Taken], links: Collection[str]) -> tuple[Taken, ...]:
    """What is known from now on: what was found, and what an interface had before that has none of it at the moment.

    Between two of a link's states, or of a DHCP client's, it has no address or no route; others must not get its
    address or gateway meanwhile. It is unsaid when the interface has another one of that family, or is gone.
    """
    now = tuple(found)
    has = {(one.kind, one.note, one.network.version) for one in now}

    def lapsed(one: Taken) -> bool:
        sign = _LAPSES.get(one.kind)
        return sign is not None and one.note in links and (sign, one.note, one.network.version) not in has

    return tuple(dict.fromkeys((*now, *(one for one in known if lapsed(one)))))
