"""Seeing that something of an endpoint was taken away, on the node or inside a container, without looking for it.

The kernel tells a socket of the node about the namespaces that the node has a number for, and it has one for each that
a link of it leads to. So nothing of ours stays open inside a container, which would keep its namespace alive.

A container can make as much of this as it likes. So it is not read when it comes but when somebody asks, and what did
not fit the socket's buffer meanwhile is lost, and said to be.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from struct import Struct

from isolator.errors import KernelRefused
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.codec import Message

_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _LISTEN_ALL_NSID = 1, 8
_GROUPS = (1, 3, 5, 7, 8, 9, 11, 19)
"""RTNLGRP_* of linux/rtnetlink.h: links, neighbours; addresses, routes, rules of IPv4 and of IPv6."""
_RECEIVE_BUFFER = 1 << 19
_NSID = Struct("=i")
_EVERYTHING = 0xFFFFFFFF
_DELETIONS = (messages.RTM_DELADDR, messages.RTM_DELROUTE, messages.RTM_DELNEIGH, messages.RTM_DELRULE)


@dataclass(slots=True)
class Seen:
    """What went since it was asked for last.

    namespaces: numbers of those in which something went. ips, links: of the node itself, where a route or neighbour
    of that address went, or that link was brought down or began to speak ARP. lost: there was more than can be told.
    """

    namespaces: set[int] = field(default_factory=set)
    ips: set[IPAddress] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    lost: bool = False

    def __bool__(self) -> bool:
        return bool(self.namespaces or self.ips or self.links or self.lost)


class Witness:
    """See the module's docstring. In the network namespace that the calling thread is in when it is made."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
            for group in _GROUPS:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as error:
            raise KernelRefused(
                f"the kernel does not tell of changes inside containers ({error.strerror}); moorage needs "
                "CAP_NET_ADMIN and CAP_NET_BROADCAST",
                errno=error.errno or 0,
            ) from error

    def close(self) -> None:
        self._socket.close()

    def seen(self) -> Seen:
        """What went since the last call."""
        found = Seen()
        while True:
            try:
                datagram, ancillary, _, _ = self._socket.recvmsg(65536, 64)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found.lost = True
                continue
            namespace = _namespace(ancillary)
            for message in codec.messages(datagram):
                if namespace is None:
                    found.ips.update(_ips(message))
                    found.links.update(_downed(message))
                elif namespace not in found.namespaces and _is_loss(message):
                    found.namespaces.add(namespace)


def _namespace(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """The number of the namespace that a datagram is about; None for the node's own."""
    for level, kind, data in ancillary:
        if (level, kind) == (_SOL_NETLINK, _LISTEN_ALL_NSID):
            number: int = _NSID.unpack_from(data)[0]
            return number
    return None


def _is_loss(message: Message) -> bool:
    return message.kind in _DELETIONS or any(True for _ in _downed(message, prefix=""))


def _ips(message: Message) -> Iterator[IPAddress]:
    """The address whose host route or neighbour went."""
    if message.kind == messages.RTM_DELROUTE:
        packed = codec.attributes(message.body, messages.ROUTE.size).get(messages.RTA_DST)
    elif message.kind == messages.RTM_DELNEIGH:
        packed = codec.attributes(message.body, messages.NEIGHBOUR.size).get(messages.NDA_DST)
    else:
        return
    if packed is not None and len(packed) in (4, 16):
        yield ip_address(bytes(packed))


def _downed(message: Message, prefix: str = messages.ENDPOINT_PREFIX) -> Iterator[str]:
    """The link that is down, or speaks ARP."""
    if message.kind == messages.RTM_NEWLINK:
        _, _, _, flags, changed = messages.LINK.unpack_from(message.body)
        name = codec.as_text(codec.attributes(message.body, messages.LINK.size).get(messages.IFLA_IFNAME))
        # One that is new is down as well, and then everything about it has changed.
        turned_off = ~flags & changed & (messages.IFF_UP | messages.IFF_NOARP)
        if turned_off and changed != _EVERYTHING and name.startswith(prefix):
            yield name
