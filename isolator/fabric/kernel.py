"""The fabric's own kernel thread: it reads what the kernel holds of a plan, and turns it into another.

Apart from the thread that serves ADD and DEL, because a first sync with a thousand nodes is thousands of messages.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address

from isolator.errors import KernelRefused
from isolator.fabric import layout
from isolator.fabric.device import DeviceSpec, ensure_device
from isolator.fabric.plan import VXLAN_DEVICE, Plan, Remote, Route
from isolator.model import IPAddress
from isolator.netlink import codec, fabric_routes, messages
from isolator.netlink.inventory import link_by_name, parse_link
from isolator.netlink.messages import NUD_PERMANENT, RTN_BLACKHOLE
from isolator.netlink.node import Node
from isolator.thread import KernelThread


@dataclass(frozen=True, slots=True)
class Held:
    """Where a tunnelled route leads in the end. problem: why it leads nowhere, else ""."""

    mac: str = ""
    remote: Remote | None = None
    problem: str = ""


class FabricKernel:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._thread = KernelThread("moorage-fabric")

    def close(self) -> None:
        self._thread.close()

    @property
    def port(self) -> int:
        """Of the netlink socket through which all is done."""
        return self._thread.node.route.port

    async def ensure_device(self, spec: DeviceSpec | None) -> bool:
        """See device.ensure_device; whether the device is new, or gone. Raises KernelRefused."""
        _, new = await self._thread.run(ensure_device, self._thread.node, spec)
        return new

    async def apply(self, before: Plan, after: Plan) -> list[KernelRefused]:
        """Turn one plan into the other; what the kernel refused of it. Raises KernelRefused if it does not answer."""
        return await self._thread.run(_apply, self._thread.node, before, after)

    async def held_for(self, route: Route) -> Held:
        """What there is of the tunnel that a route leads into. Raises KernelRefused."""
        return await self._thread.run(_held_for, self._thread.node, route)

    async def held(self) -> Plan:
        """All that the kernel holds of the fabric, whoever put it there. Raises KernelRefused."""
        return await self._thread.run(_held, self._thread.node)

    async def resync(self, desired: Plan, *, keep: bool) -> tuple[list[str], list[KernelRefused]]:
        """Make the kernel hold the whole plan, and nothing else unless ``keep``.

        Returns sentences about what was missing or too much, and what the kernel refused.
        """
        return await self._thread.run(_resync, self._thread.node, desired, keep)


def _held_for(node: Node, route: Route) -> Held:
    link = link_by_name(node.route, VXLAN_DEVICE)
    if link is None:
        return Held(problem=f"there is no device {VXLAN_DEVICE}")
    if not link.up:
        return Held(problem=f"the device {VXLAN_DEVICE} is down")
    mac = _neighbours(node, link.index).get(route.via) if route.via is not None else None
    if mac is None:
        return Held(problem=f"{VXLAN_DEVICE} has no neighbour {route.via}")
    remote = _tunnels(node, link.index).get(mac)
    if remote is None:
        return Held(mac, problem=f"{VXLAN_DEVICE} has no tunnel that leads to {mac}")
    return Held(mac, remote)


def _apply(node: Node, before: Plan, after: Plan) -> list[KernelRefused]:
    return node.route.attempt(layout.requests(before, after, _index_of(node)))


def _resync(node: Node, desired: Plan, keep: bool) -> tuple[list[str], list[KernelRefused]]:
    index_of = _index_of(node)
    actual = read(node, {index_of(name): name for name in {VXLAN_DEVICE, *_devices(desired)}})
    todo = layout.requests(actual, desired.over(actual) if keep else desired, index_of)
    return [request.doing for request in todo], node.route.attempt(todo)


def _held(node: Node) -> Plan:
    links = (parse_link(message) for message in node.route.dump(messages.dump_links()))
    return read(node, {link.index: link.name for link in links})


def _devices(plan: Plan) -> set[str]:
    return {route.device for route in plan.routes.values() if route.device}


def _index_of(node: Node) -> Callable[[str], int]:
    """A link's index by its name, 0 if there is none; each is looked up once."""

    @cache
    def index_of(name: str) -> int:
        link = link_by_name(node.route, name)
        return link.index if link is not None else 0

    return index_of


def read(node: Node, devices: Mapping[int, str]) -> Plan:
    """What the kernel holds of the fabric. devices: names by index, others stand as ``#index``.

    Raises KernelRefused.
    """
    index = next((index for index, name in devices.items() if index and name == VXLAN_DEVICE), 0)
    plan = Plan()
    for route in fabric_routes(node):
        if route.kind == RTN_BLACKHOLE:
            plan.routes[route.destination] = Route(route.destination)
        else:
            # Also one that only a stranger makes, without next hop: it must not look like one that drops.
            device = devices.get(route.index) or f"#{route.index}"
            plan.routes[route.destination] = Route(route.destination, route.gateway, device, route.source)
    if index:
        plan.neighbours = _neighbours(node, index)
        plan.tunnels = _tunnels(node, index)
    return plan


def _neighbours(node: Node, index: int) -> dict[IPAddress, str]:
    found = {}
    for message in node.route.dump(messages.dump_neighbours(socket.AF_INET6, index)):
        _, _, state, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
        values = codec.attributes(message.body, messages.NEIGHBOUR.size)
        if state & NUD_PERMANENT and messages.NDA_LLADDR in values:
            found[ip_address(bytes(values[messages.NDA_DST]))] = bytes(values[messages.NDA_LLADDR]).hex(":")
    return found


def _tunnels(node: Node, index: int) -> dict[str, Remote]:
    found = {}
    for message in node.route.dump(messages.dump_tunnels(index)):
        _, link, _, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
        values = codec.attributes(message.body, messages.NEIGHBOUR.size)
        if link == index and messages.NDA_DST in values:
            port = int.from_bytes(values.get(messages.NDA_PORT, b""), "big")
            remote = Remote(ip_address(bytes(values[messages.NDA_DST])), port)
            found[bytes(values[messages.NDA_LLADDR]).hex(":")] = remote
    return found
