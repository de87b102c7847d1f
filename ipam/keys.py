"""The store's key layout (docs/design.md, section 4), in one place.

    schema                           version of this layout
    poolset                          guard: every change of pools compares and rewrites it
    networks/<name>                  Network
    pools/<name>                     Pool
    blocks/<4|6>/<hex of base>       Block
    addresses/<4|6>/<hex of ip>      Address      the one place where an IP exists
    reservations/<4|6>/<hex of ip>   Reservation
    nodes/<name>                     Node
    alive/<name>                     Alive        on a lease
    writers/<name>                   Fence
    intents/<name>/<uuid>            Intent       on a lease
    leaders/<framework>              who listens to a Marathon, on a lease (marathon/leader.py)
    listeners/<framework>            what that one found last, on the same lease
    incarnation                      Incarnation  every transaction of a node compares it
    vouched                          Vouched

The hex is of fixed width (8 or 32 digits), so key order is address order and a block is a key range.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, TypeAlias

from ipam.errors import StoreError

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network
Family: TypeAlias = Literal[4, 6]

SCHEMA = "schema"
POOLSET = "poolset"
NETWORKS = "networks/"
POOLS = "pools/"
BLOCKS = "blocks/"
ADDRESSES = "addresses/"
RESERVATIONS = "reservations/"
NODES = "nodes/"
ALIVE = "alive/"
WRITERS = "writers/"
INTENTS = "intents/"
LEADERS = "leaders/"
LISTENERS = "listeners/"
INCARNATION = "incarnation"
VOUCHED = "vouched"

NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
"""A node's name is part of keys; this is what a host name may be."""
A_NODE_NAME = (
    "a name of 1 to 63 lower-case letters, digits, dots and dashes, with a letter or digit at both ends"
)

WIDTH = {4: 8, 6: 32}
"""Hex digits of an address, by family."""

_OF_AN_IP = re.compile(r"[a-z]+/(?:4/([0-9a-f]{8})|6/([0-9a-f]{32}))")


def hex_of(value: int, family: int) -> str:
    """An address as a number, in its key's form."""
    return f"{value:0{WIDTH[family]}x}"


def address_key(ip: IPAddress) -> str:
    return f"{ADDRESSES}{ip.version}/{hex_of(int(ip), ip.version)}"


def reservation_key(ip: IPAddress) -> str:
    return f"{RESERVATIONS}{ip.version}/{hex_of(int(ip), ip.version)}"


def block_key(network: IPNetwork) -> str:
    return f"{BLOCKS}{network.version}/{hex_of(int(network.network_address), network.version)}"


def address_range(network: IPNetwork) -> tuple[str, str]:
    """The key range [start, end) of all addresses inside ``network``."""
    return _range(ADDRESSES, network)


def block_range(network: IPNetwork) -> tuple[str, str]:
    """The key range [start, end) of all blocks whose base is inside ``network``."""
    return _range(BLOCKS, network)


def _range(prefix: str, network: IPNetwork) -> tuple[str, str]:
    first = f"{prefix}{network.version}/{hex_of(int(network.network_address), network.version)}"
    # "~" sorts behind every hex digit, so this ends right behind the last address, also behind ffff.
    last = f"{prefix}{network.version}/{hex_of(int(network.broadcast_address), network.version)}~"
    return first, last


def ip_of(key: str) -> IPAddress:
    """The IP that an address, block or reservation key stands for. Raises StoreError for any other key."""
    parts = _OF_AN_IP.fullmatch(key)
    if parts is None:
        raise StoreError(
            f"the store's key {key} stands for no IP address; delete it, moorage did not write it"
        )
    four, six = parts.groups()
    return IPv4Address(int(four, 16)) if four else IPv6Address(int(six, 16))
