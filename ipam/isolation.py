"""What a network says of its containers' callers: the settings as operators write them, and what they mean.

    isolation   netgroups  only who shares a netgroup may call       open  everybody may
    allow_from  CIDRs, and ``nodes``: callers that need not be containers
    to_node     ``store``: its containers reach the store, which is kept from all others

Pure. Settings are text in the store; what cannot be read there, because a newer version wrote it, allows nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from ipam.errors import InvalidInput
from ipam.keys import IPAddress, IPNetwork
from ipam.records import Network, Node

NETGROUPS, OPEN = ISOLATIONS = ("netgroups", "open")
NODES = "nodes"
STORE = "store"
TO_NODE = (STORE,)
"""What of the nodes a network can be let reach (docs/decisions/who-may-ask.md)."""
MOST_CONNECTIONS = 1 << 24
"""That one container may be allowed to have tracked; more than any node's table holds."""
_BROADCAST = IPv4Address("255.255.255.255")
MOST_SOURCES = 64
"""Each is a rule that packets of strangers are compared with one after the other."""


def check_isolation(network: Network) -> None:
    """Raises InvalidInput naming the setting that makes no sense."""
    if network.isolation not in ISOLATIONS:
        raise InvalidInput(
            f"the isolation {network.isolation!r} is not known; it is one of {', '.join(ISOLATIONS)}"
        )
    if len(network.allow_from) > MOST_SOURCES:
        raise InvalidInput(
            f"{len(network.allow_from)} sources to allow calls from are too many; {MOST_SOURCES} are possible, "
            "take larger CIDRs"
        )
    for text in network.allow_from:
        if text != NODES:
            parse_source(text)
    for text in network.to_node:
        if text not in TO_NODE:
            raise InvalidInput(
                f"{text!r} of the nodes is not known; --to-node takes {', '.join(TO_NODE)} or none"
            )
    if not 0 <= network.max_connections <= MOST_CONNECTIONS:
        raise InvalidInput(
            f"{network.max_connections} connections are no limit; write a number from 1 to {MOST_CONNECTIONS}, "
            "or default for a twentieth of the node's table"
        )


def sources_of(network: Network) -> list[IPNetwork]:
    """The CIDRs from which the network allows calls."""
    found = []
    for text in network.allow_from:
        if text != NODES:
            with contextlib.suppress(InvalidInput):
                found.append(parse_source(text))
    return found


def parse_source(text: str) -> IPNetwork:
    """A CIDR, or one address. Raises InvalidInput."""
    try:
        return ip_network(text)
    except ValueError as error:
        raise InvalidInput(
            f"{text!r} is neither a CIDR nor {NODES!r} ({error}); write for example 192.0.2.0/24"
        ) from error


def addresses_of_node(node: Node) -> list[IPAddress]:
    """Addresses that a node calls others from; link-local ones, and what cannot be read, are left out."""
    return _readable((*node.underlay, *node.vtep))


def underlay_of_node(node: Node) -> list[IPAddress]:
    """Addresses that a node's tunnel packets come from; link-local ones, and what cannot be read, are left out."""
    return _readable(node.underlay)


def _readable(texts: Iterable[str]) -> list[IPAddress]:
    return [ip for text in texts if (ip := unicast(text)) is not None and not ip.is_link_local]


def unicast(text: str) -> IPAddress | None:
    """An address that another host can have, in the form that the kernel gives back; None for any other text.

    A scope is none: it is any text behind a percent sign, and no kernel interface or firewall takes it for an address.
    """
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    if ip.is_unspecified or ip.is_loopback or ip.is_multicast or ip == _BROADCAST:
        return None
    odd = isinstance(ip, IPv6Address) and (ip.scope_id is not None or ip.ipv4_mapped is not None)
    return None if odd else ip
