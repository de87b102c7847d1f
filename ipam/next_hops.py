"""The next hop inside containers: one number for each network, the same in both families.

    number 7    169.254.1.7 and fe80::7

Neither exists anywhere: a container needs a next hop to build an Ethernet header from, and the neighbour that stands
for it is permanent. Numbers keep several networks on one container apart for engines that make the routes to gateways
themselves, as Docker does; moorage's own routes name their interface and do without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, TypeAlias

import msgspec

from ipam.keys import Family, IPAddress

FIRST, LAST = 1, 254
NextHop: TypeAlias = Annotated[int, msgspec.Meta(ge=FIRST, le=LAST)]

_BASE4, _BASE6 = int(IPv4Address("169.254.1.0")), int(IPv6Address("fe80::"))


def next_hop(number: int, family: Family) -> IPAddress:
    """The address that a number stands for in a family."""
    return IPv4Address(_BASE4 + number) if family == 4 else IPv6Address(_BASE6 + number)


def choose_next_hop(used: Iterable[int]) -> int:
    """The smallest number that no network has; when all are used, the smallest of those that fewest have."""
    shares = Counter(used)
    return min(range(FIRST, LAST + 1), key=lambda number: (shares[number], number))
