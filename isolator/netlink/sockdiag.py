"""Who listens in this network namespace: sockets of TCP, UDP and SCTP, asked for by sock_diag(7).

The kernel filters by protocol, family, state and port, so a dump is what was asked for: some 30 microseconds,
whatever is connected. It has the kernel's own sockets too (a VXLAN device that is up, NFS), which no process has.

A listener of UDP is a socket that is bound and not connected: one that is connected hears its peer alone, and what its
peer answers belongs to a connection that the firewall knows already.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from struct import Struct

from isolator.model import IPAddress
from isolator.netlink import codec
from isolator.netlink.codec import Attributes, Message, Request
from isolator.netlink.socket import NETLINK_SOCK_DIAG, NetlinkSocket

_SOCK_DIAG_BY_FAMILY = 20

# struct inet_diag_req_v2 and inet_diag_msg of linux/inet_diag.h, around the struct inet_diag_sockid that both have.
_REQUEST = Struct("=BBBxI")  # family, protocol, extensions, states
_PORTS = Struct(">HH")  # source, destination
_REST = bytes(16 + 16 + 4) + b"\xff" * 8  # source, destination, link, no cookie
_SOURCE = 8
_INODE = Struct("=I")
_INODE_AT = 68
_MESSAGE = 72

_SKV6ONLY, _LOCALS = 11, 12  # INET_DIAG_*
_SOCKADDR_STORAGE = 128
_SOCKADDR = {int(socket.AF_INET): slice(4, 8), int(socket.AF_INET6): slice(8, 24)}
"""Where a sockaddr_in and a sockaddr_in6 have their address."""

_LISTEN, _CLOSE = 1 << 10, 1 << 7  # of TCP_LISTEN and TCP_CLOSE; UDP has the second until it is connected
_PROTOCOLS = {
    "tcp": (socket.IPPROTO_TCP, _LISTEN),
    "udp": (socket.IPPROTO_UDP, _CLOSE),
    "sctp": (socket.IPPROTO_SCTP, _LISTEN),
}
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that can be called. protocol: of model.PROTOCOLS.

    ip: what it is bound to, the unspecified address of its family if it hears every one; an IPv4-mapped one as IPv4.
    only_ipv6: whether an unspecified IPv6 one leaves IPv4 out. inode: of the socket, as in /proc/PID/fd.
    """

    protocol: str
    ip: IPAddress
    port: int
    only_ipv6: bool = False
    inode: int = 0

    def hears(self, family: int) -> bool:
        """Whether packets of IPv4 or IPv6 can reach it. family: 4 or 6."""
        if self.ip.version == family:
            return True
        return family == 4 and self.ip.is_unspecified and not self.only_ipv6

    def __str__(self) -> str:
        return f"{self.protocol} {f'[{self.ip}]' if self.ip.version == 6 else self.ip}:{self.port}"


def listeners(protocol: str, ports: Collection[int]) -> list[Listener]:
    """Who listens on one of these ports, over IPv4 or IPv6, in the namespace of the calling thread.

    Raises KernelRefused; its errno is ENOENT if this kernel cannot tell (the module tcp_diag or udp_diag is missing).
    A kernel without SCTP has no listeners of that.
    """
    if not ports:
        return []
    port = next(iter(ports)) if len(ports) == 1 else 0
    with NetlinkSocket(NETLINK_SOCK_DIAG) as diag:
        return [
            listener
            for family in _FAMILIES
            for message in diag.dump(dump_listeners(protocol, family, port))
            for listener in parse_listener(message, protocol)
            if listener.port in ports
        ]


def dump_listeners(protocol: str, family: int, port: int = 0) -> Request:
    """Sockets of a protocol that can be called, of AF_INET or AF_INET6. port: 0 is every one."""
    number, states = _PROTOCOLS[protocol]
    fine = (errno.ENOENT,) if protocol == "sctp" else ()
    return Request(
        _SOCK_DIAG_BY_FAMILY,
        0,
        _REQUEST.pack(family, number, 0, states) + _PORTS.pack(port, 0) + _REST,
        f"list who listens on {protocol} ports",
        fine,
    )


def parse_listener(message: Message, protocol: str) -> Iterator[Listener]:
    """From SOCK_DIAG_BY_FAMILY; one of SCTP for each address that it is bound to."""
    family = message.body[0]
    port, _ = _PORTS.unpack_from(message.body, 4)
    inode: int = _INODE.unpack_from(message.body, _INODE_AT)[0]
    found = codec.attributes(message.body, _MESSAGE)
    only_ipv6 = bytes(found.get(_SKV6ONLY, b"\0")) != b"\0"
    size = 4 if family == socket.AF_INET else 16
    own = ip_address(bytes(message.body[_SOURCE : _SOURCE + size]))
    for ip in _locals(found) or [own]:
        # The kernel also says so of one that is bound to an IPv6 address, and so hears no other.
        yield Listener(protocol, _plain(ip), port, only_ipv6 and ip.is_unspecified, inode)


def _locals(found: Attributes) -> list[IPAddress]:
    """The addresses that a socket of SCTP is bound to, each in a struct sockaddr_storage."""
    listed = found.get(_LOCALS, memoryview(b""))
    ips = []
    for start in range(0, len(listed) - _SOCKADDR_STORAGE + 1, _SOCKADDR_STORAGE):
        one = listed[start : start + _SOCKADDR_STORAGE]
        place = _SOCKADDR.get(int.from_bytes(one[:2], sys.byteorder))
        if place is not None:
            ips.append(ip_address(bytes(one[place])))
    return ips


def _plain(ip: IPAddress) -> IPAddress:
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return ip if mapped is None else mapped
