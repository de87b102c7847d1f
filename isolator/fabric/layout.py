"""From one plan to another in netlink requests: desired minus actual. Pure.

A route comes after what its next hop needs, and goes before it. Replacing is one message, so that nothing is
unreachable in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from isolator.fabric.plan import Plan, Route
from isolator.netlink import messages
from isolator.netlink.codec import Request

K = TypeVar("K")
V = TypeVar("V")


def requests(actual: Plan, desired: Plan, index_of: Callable[[str], int]) -> list[Request]:
    """What turns one into the other. index_of: a device's link index, 0 if none of that name can be used.

    Without a VXLAN device nothing is asked of it: who keeps the device says why it is not there.
    """
    todo: list[Request] = []
    for station, remote in _new(actual.tunnels, desired.tunnels):
        if index := index_of(station.device):
            todo.append(messages.add_tunnel(index, station.device, station.mac, remote.ip, remote.port))
    for hop, mac in _new(actual.neighbours, desired.neighbours):
        if index := index_of(hop.device):
            todo.append(messages.add_neighbour(index, hop.device, hop.ip, mac))
    todo += [
        messages.delete_fabric_route(destination)
        for destination, route in actual.routes.items()
        if destination not in desired.routes
        # The kernel does not let a route that drops replace one that leads somewhere, in all versions.
        or desired.routes[destination].drops != route.drops
    ]
    for destination, route in desired.routes.items():
        if not same(actual.routes.get(destination), route) and _can_be(route, index_of):
            todo.append(_add(route, index_of))
    for hop in actual.neighbours.keys() - desired.neighbours.keys():
        if index := index_of(hop.device):
            todo.append(messages.delete_neighbour(index, hop.device, hop.ip))
    for station in actual.tunnels.keys() - desired.tunnels.keys():
        if index := index_of(station.device):
            todo.append(messages.delete_tunnel(index, station.device, station.mac))
    return todo


def _can_be(route: Route, index_of: Callable[[str], int]) -> bool:
    return not route.is_tunnelled or index_of(route.device) != 0


def same(actual: Route | None, desired: Route) -> bool:
    """Whether the kernel has the route; one that may use any link may use this."""
    if actual is None or actual.drops != desired.drops:
        return False
    return (actual.via, actual.source) == (desired.via, desired.source) and (
        desired.device in ("", actual.device)
    )


def _add(route: Route, index_of: Callable[[str], int]) -> Request:
    if route.via is None:
        return messages.add_blackhole(route.destination)
    return messages.add_fabric_route(
        route.destination,
        route.via,
        index=index_of(route.device) if route.device else 0,
        onlink=route.is_tunnelled,
        source=route.source,
    )


def _new(actual: Mapping[K, V], desired: Mapping[K, V]) -> Iterator[tuple[K, V]]:
    return ((key, value) for key, value in desired.items() if actual.get(key) != value)
