"""Which of a container's interfaces and addresses its kernel takes where nobody has bound the socket. Pure.

    to a pool of a network that it is on      that network's interface, and the first address there
    anywhere else                             the default route's, which is the one of the lowest metric

What lays the routes so is drivers/routed_layout.py. Routes of others come before, if they are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipam.keys import IPAddress, IPNetwork
from isolator.drivers.naming import route_metric


@dataclass(frozen=True, slots=True)
class Interface:
    """One of a container's. pools: of its network. default_route: it was chosen to have the default route."""

    ifname: str
    ips: tuple[IPAddress, ...]
    pools: tuple[IPNetwork, ...]
    default_route: bool = False

    def source(self, family: int) -> IPAddress | None:
        """The address that it sends from."""
        return next((ip for ip in self.ips if ip.version == family), None)

    def is_on_network_of(self, ip: IPAddress) -> bool:
        return any(pool.version == ip.version and ip in pool for pool in self.pools)


@dataclass(frozen=True, slots=True)
class Unbound:
    """What an unbound socket uses. on_network: the destination is of a network that the container is on."""

    ifname: str
    source: IPAddress
    on_network: bool


def unbound(interfaces: Iterable[Interface], destination: IPAddress) -> Unbound | None:
    """What is used to reach an address; None if the container has nothing of its family."""
    able = sorted(
        (one for one in interfaces if one.source(destination.version) is not None),
        key=lambda one: (
            not one.is_on_network_of(destination),
            route_metric(one.ifname, default_route=one.default_route),
        ),
    )
    if not able:
        return None
    source = able[0].source(destination.version)
    assert source is not None, "only those that have one are looked at"
    return Unbound(able[0].ifname, source, able[0].is_on_network_of(destination))
