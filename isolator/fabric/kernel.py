"""The fabric's own kernel thread: it reads what the kernel holds of a plan, and turns it into another.

Apart from the thread that serves ADD and DEL, because a first sync with a thousand nodes is thousands of messages.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address

from isolator.errors import KernelRefused
from isolator.fabric import layout
from isolator.fabric.device import DeviceSpec, Made, ensure_device, remove_device
from isolator.fabric.plan import VXLAN_DEVICES, Hop, Plan, Remote, Route, Station
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


@dataclass(frozen=True, slots=True)
class Compared:
    """What came of a comparison. done: sentences about what was missing or too much. refused: by the kernel.

    took: seconds of a processor; the machine's other work is not in it.
    """

    done: list[str]
    refused: list[KernelRefused]
    took: float


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

    async def ensure_device(self, spec: DeviceSpec) -> Made:
        """See device.ensure_device. Raises KernelRefused."""
        return await self._thread.run(ensure_device, self._thread.node, spec)

    async def remove_device(self, name: str) -> bool:
        """See device.remove_device. Raises KernelRefused."""
        return await self._thread.run(remove_device, self._thread.node, name)

    async def apply(self, before: Plan, after: Plan) -> list[KernelRefused]:
        """Turn one plan into the other; what the kernel refused of it. Raises KernelRefused if it does not answer."""
        return await self._thread.run(_apply, self._thread.node, before, after)

    async def held_for(self, route: Route) -> Held:
        """What there is of the tunnel that a route leads into. Raises KernelRefused."""
        return await self._thread.run(_held_for, self._thread.node, route)

    async def held(self) -> Plan:
        """All that the kernel holds of the fabric, whoever put it there. Raises KernelRefused."""
        return await self._thread.run(_held, self._thread.node)

    async def resync(self, desired: Plan, *, keep: bool) -> Compared:
        """Make the kernel hold the whole plan, and nothing else unless ``keep``. Raises KernelRefused if it does not
        answer."""
        return await self._thread.run(_resync, self._thread.node, desired, keep)


def _held_for(node: Node, route: Route) -> Held:
    name = route.device
    link = link_by_name(node.route, name)
    if link is None:
        return Held(problem=f"there is no device {name}")
    if not link.up:
        return Held(problem=f"the device {name} is down")
    mac = _neighbours(node, name, link.index).get(Hop(name, route.via)) if route.via is not None else None
    if mac is None:
        return Held(problem=f"{name} has no neighbour {route.via}")
    remote = _tunnels(node, name, link.index).get(Station(name, mac))
    if remote is None:
        return Held(mac, problem=f"{name} has no tunnel that leads to {mac}")
    return Held(mac, remote)


def _apply(node: Node, before: Plan, after: Plan) -> list[KernelRefused]:
    return node.route.attempt(layout.requests(before, after, _index_of(node)))


def _resync(node: Node, desired: Plan, keep: bool) -> Compared:
    begun = time.thread_time()
    index_of = _index_of(node)
    actual = read(node, {index_of(name): name for name in {*VXLAN_DEVICES, *_devices(desired)}})
    todo = layout.requests(actual, desired.over(actual) if keep else desired, index_of)
    refused = node.route.attempt(todo)
    return Compared([request.doing for request in todo], refused, time.thread_time() - begun)


def _held(node: Node) -> Plan:
    links = (parse_link(message) for message in node.route.dump(messages.dump_links()))
    return read(node, {link.index: link.name for link in links})


def _devices(plan: Plan) -> set[str]:
    return {route.device for route in plan.routes.values() if route.device}


def _index_of(node: Node) -> Callable[[str], int]:
    """A link's index by its name, 0 if there is none; each is looked up once.

    A VXLAN device that is down counts as none: the kernel refuses whatever would lead into it.
    """

    @cache
    def index_of(name: str) -> int:
        link = link_by_name(node.route, name)
        if link is None or (name in VXLAN_DEVICES and not link.up):
            return 0
        return link.index

    return index_of


def read(node: Node, devices: Mapping[int, str]) -> Plan:
    """What the kernel holds of the fabric. devices: names by index, others stand as ``#index``.

    Raises KernelRefused.
    """
    plan = Plan()
    for route in fabric_routes(node):
        if route.kind == RTN_BLACKHOLE:
            plan.routes[route.destination] = Route(route.destination)
        else:
            # Also one that only a stranger makes, without next hop: it must not look like one that drops.
            device = devices.get(route.index) or f"#{route.index}"
            plan.routes[route.destination] = Route(route.destination, route.gateway, device, route.source)
    for index, name in devices.items():
        if index and name in VXLAN_DEVICES:
            plan.neighbours |= _neighbours(node, name, index)
            plan.tunnels |= _tunnels(node, name, index)
    return plan


def _neighbours(node: Node, name: str, index: int) -> dict[Hop, str]:
    found = {}
    for message in node.route.dump(messages.dump_neighbours(socket.AF_INET6, index)):
        _, _, state, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
        values = codec.attributes(message.body, messages.NEIGHBOUR.size)
        if state & NUD_PERMANENT and messages.NDA_LLADDR in values:
            hop = Hop(name, ip_address(bytes(values[messages.NDA_DST])))
            found[hop] = bytes(values[messages.NDA_LLADDR]).hex(":")
    return found


def _tunnels(node: Node, name: str, index: int) -> dict[Station, Remote]:
    found = {}
    for message in node.route.dump(messages.dump_tunnels(index)):
        _, link, _, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
        values = codec.attributes(message.body, messages.NEIGHBOUR.size)
        if link == index and messages.NDA_DST in values:
            port = int.from_bytes(values.get(messages.NDA_PORT, b""), "big")
            remote = Remote(ip_address(bytes(values[messages.NDA_DST])), port)
            found[Station(name, bytes(values[messages.NDA_LLADDR]).hex(":"))] = remote
    return found
