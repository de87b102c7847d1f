"""Asking the kernel what it would do with a packet, and whether it knows its neighbour."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from isolator.errors import KernelRefused
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.codec import Request
from isolator.netlink.far_end import far_end
from isolator.netlink.inventory import parse_route
from isolator.netlink.node import Node
from isolator.netlink.socket import NetlinkSocket

_NEIGHBOUR_STATES = {
    0x01: "incomplete", 0x02: "reachable", 0x04: "stale", 0x08: "delay", 0x10: "probe", 0x20: "failed",
    0x40: "noarp", 0x80: "permanent",
}  # fmt: skip
"""NUD_* of linux/neighbour.h."""

_ANSWERS = {errno.EINVAL: "it is dropped (blackhole)", errno.ENETUNREACH: "there is no route"}


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where a packet would go. device: "" if nowhere; then ``why`` says so. via: None if it is on the link.

    source: what it would come from, where that was not given.
    """

    device: str = ""
    via: IPAddress | None = None
    why: str = ""
    source: IPAddress | None = None

    def __str__(self) -> str:
        if not self.device:
            return self.why
        return (f"via {self.via} " if self.via is not None else "") + f"on {self.device}"


def look_up(node: Node, dst: IPAddress, src: IPAddress | None, iif: str) -> Lookup:
    """The kernel's own decision for a packet. iif: the link that it comes in by; "" if the node sends it."""
    try:
        index = socket.if_nametoindex(iif) if iif else 0
    except OSError:
        return Lookup(why=f"there is no link {iif}")
    return _look_up(node.route, messages.get_route(dst, src if iif else None, index))


def look_up_inside(node: Node, netns: str, host_ifname: str, dst: IPAddress) -> Lookup:
    """What the kernel does with a packet of an unbound socket inside a container.

    host_ifname: the node's end of one of its interfaces. Raises NamespaceGone, NotANamespace, KernelRefused.
    """
    with node.open_namespace(netns) as container, far_end(node, container, host_ifname) as end:
        return _look_up(end.route, messages.get_route(dst, None, 0))


def _look_up(kernel: NetlinkSocket, request: Request) -> Lookup:
    """In the namespace that the calling thread is in, where the link's name is looked for."""
    try:
        message = kernel.get(request)
    except KernelRefused as error:
        return Lookup(why=_ANSWERS.get(error.errno, os.strerror(error.errno)))
    if message is None:
        return Lookup(why="there is no route")
    route = parse_route(message)
    if route.kind == messages.RTN_LOCAL:
        return Lookup(why="it is the node's own")
    return Lookup(socket.if_indextoname(route.index), route.gateway, source=route.source)


def is_local(node: Node, ip: IPAddress) -> bool:
    """Whether the node takes packets to an address for its own (``fib daddr type local``): all of 127.0.0.0/8 too."""
    try:
        message = node.route.get(messages.get_route(ip, None, 0))
    except KernelRefused as error:
        if error.errno not in (*_ANSWERS, errno.EHOSTUNREACH, errno.EACCES):
            raise
        return False
    return message is not None and parse_route(message).kind == messages.RTN_LOCAL


def neighbour_state(node: Node, ip: IPAddress, device: str) -> str:
    """What the kernel knows of a neighbour: ``reachable``, ``failed``, …; "" if it never asked for it."""
    try:
        index = socket.if_nametoindex(device)
    except OSError:
        return ""
    for message in node.route.dump(messages.dump_neighbours(messages.family_of(ip), index)):
        _, link, state, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
        values = codec.attributes(message.body, messages.NEIGHBOUR.size)
        if link == index and ip_address(bytes(values[messages.NDA_DST])) == ip:
            return _NEIGHBOUR_STATES.get(state, "")
    return ""
