"""From one plan to another in netlink requests: desired minus actual. Pure.

A route comes after what its next hop needs, and goes before it. Replacing is one message, so that nothing is
unreachable in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from isolator.fabric.plan import VXLAN_DEVICE, Plan, Route
from isolator.netlink import messages
from isolator.netlink.codec import Request

K = TypeVar("K")
V = TypeVar("V")


def requests(actual: Plan, desired: Plan, index_of: Callable[[str], int]) -> list[Request]:
    """What turns one into the other. index_of: a device's link index, 0 if there is none of that name."""
    tunnel = index_of(VXLAN_DEVICE)
    todo: list[Request] = []
    if tunnel:
        for mac, remote in _new(actual.tunnels, desired.tunnels):
            todo.append(messages.add_tunnel(tunnel, VXLAN_DEVICE, mac, remote.ip, remote.port))
        for hop, mac in _new(actual.neighbours, desired.neighbours):
            todo.append(messages.add_neighbour(tunnel, VXLAN_DEVICE, hop, mac))
    todo += [
        messages.delete_fabric_route(destination)
        for destination, route in actual.routes.items()
        if destination not in desired.routes
        # The kernel does not let a route that drops replace one that leads somewhere, in all versions.
        or desired.routes[destination].drops != route.drops
    ]
    for destination, route in desired.routes.items():
        if not same(actual.routes.get(destination), route):
            todo.append(_add(route, index_of))
    if tunnel:
        todo += [
            messages.delete_neighbour(tunnel, VXLAN_DEVICE, hop)
            for hop in actual.neighbours.keys() - desired.neighbours.keys()
        ]
        todo += [
            messages.delete_tunnel(tunnel, VXLAN_DEVICE, mac)
            for mac in actual.tunnels.keys() - desired.tunnels.keys()
        ]
    return todo


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
