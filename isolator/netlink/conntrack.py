"""Forgetting connections: no flow of an address's old owner may continue to its new one.

One dump of the table per batch, however many addresses: its datagrams are searched as bytes for the
addresses, and only what hits is parsed and deleted, by its tuple and id. (Filtered deletion inside the
kernel takes a pass per address and direction, 5 ms each whatever the table holds, and needs Linux 6.8.)

Take the addresses out of the policy first: then no new entry can appear behind the dump's back.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from isolator.model import IPAddress
from isolator.netlink import codec
from isolator.netlink.codec import Message, Request, attribute
from isolator.netlink.lookup import is_local
from isolator.netlink.node import Node
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

_SUBSYSTEM = 1 << 8
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2

_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PORT_DST = 1, 3  # CTA_PROTO_*
_SOURCE_AND_DESTINATION = {4: (1, 2), 6: (3, 4)}  # CTA_IP_*


_FIRST_SOURCE = codec.HEADER.size + 4 + 3 * 4
"""Where an entry has its first source address: behind the headers of netlink, nfnetlink, two nests and its own."""
_SOURCE_SIZES = {
    struct.pack("=HH", 4 + size, _SOURCE_AND_DESTINATION[family][0]): size
    for family, size in ((4, 4), (6, 16))
}
"""The header of the attribute that holds it -> bytes of the address."""


class Connection(NamedTuple):
    """A tracked connection: who began it, with whom, the protocol's number, and the request that deletes it."""

    source: IPAddress
    target: IPAddress
    protocol: int
    deletion: Request


def connections_of(ips: Iterable[IPAddress]) -> list[Connection]:
    """Every entry that names one of the addresses: in either direction, as source or destination.

    In the namespace of the calling thread, over a socket of its own. Takes some 5 ms for the table's buckets
    and 3 ms per 1,000 entries in it. Raises KernelRefused; a kernel that tracks nothing has none.
    """
    wanted = frozenset(ips)
    if not wanted:
        return []
    families = {ip.version for ip in wanted}
    family = (
        {4: socket.AF_INET, 6: socket.AF_INET6}[families.pop()] if len(families) == 1 else socket.AF_UNSPEC
    )
    packed = frozenset(ip.packed for ip in wanted)
    return _found(family, _needles(wanted), lambda entry: _names(entry, packed))


def forget(connections: Iterable[Connection]) -> None:
    """Delete entries; those that are gone are fine. Raises KernelRefused."""
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        netfilter.execute([connection.deletion for connection in connections])


def sources() -> Counter[IPAddress]:
    """How many entries each address began; costs some 3 ms per 1,000 entries. Raises KernelRefused.

    The kernel begins every entry with the tuple of its first packet, and that with the source address
    (ctnetlink_fill_info of linux/net/netfilter/nf_conntrack_netlink.c), so it is read where it stands, unparsed.
    """
    found: Counter[bytes] = Counter()
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        for datagram in netfilter.stream(_listing(socket.AF_UNSPEC)):
            offset, end = 0, len(datagram)
            while offset < end:
                head = datagram[offset + _FIRST_SOURCE - 4 : offset + _FIRST_SOURCE]
                size = _SOURCE_SIZES.get(head)
                if size is not None:
                    found[datagram[offset + _FIRST_SOURCE : offset + _FIRST_SOURCE + size]] += 1
                offset += codec.message_size(datagram, offset)
    return Counter({ip_address(packed): count for packed, count in found.items()})


def flush_conntrack(ips: Iterable[IPAddress]) -> None:
    """Delete every entry that names one of the addresses; costs what ``connections_of`` does."""
    forget(connections_of(ips))


def flush_ports(node: Node, ports: Iterable[int]) -> None:
    """Delete every UDP entry whose first packet went to one of these ports of the node; costs what
    ``connections_of`` does, and a look for each address that such packets went to.

    A flow that began before its port was mapped would go on past the mapping for as long as it is kept up. One that
    goes to that port of another machine is not concerned, and without its entry its answer would be lost.
    """
    wanted = frozenset(port.to_bytes(2, "big") for port in ports)
    if not wanted:
        return
    needles = re.compile(b"|".join(re.escape(attribute(_PORT_DST, port)) for port in wanted), re.DOTALL)

    def doomed(entry: codec.Attributes) -> bool:
        found = codec.attributes(codec.attributes(entry[_TUPLE_ORIG]).get(_TUPLE_PROTO, memoryview(b"")))
        is_udp = bytes(found.get(_PROTO_NUMBER, b"")) == bytes([socket.IPPROTO_UDP])
        return is_udp and bytes(found.get(_PORT_DST, b"")) in wanted

    found = _found(socket.AF_UNSPEC, needles, doomed)
    own = {ip for ip in {connection.target for connection in found} if is_local(node, ip)}
    forget(connection for connection in found if connection.target in own)


def _found(
    family: int, needles: re.Pattern[bytes], wanted: Callable[[codec.Attributes], bool]
) -> list[Connection]:
    """The entries that are wanted among those in which a needle is found."""
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        return [
            Connection(*_first_packet(entry), _deletion(message.body[0], entry))
            for datagram in netfilter.stream(_listing(family))
            for message in _suspects(datagram, needles)
            if wanted(entry := codec.attributes(message.body, 4))
        ]


def _listing(family: int) -> Request:
    return Request(_GET, 0, bytes([family, 0, 0, 0]), "list the tracked connections", (errno.EINVAL,))


def _first_packet(entry: codec.Attributes) -> tuple[IPAddress, IPAddress, int]:
    """Its source, destination and protocol."""
    first = codec.attributes(entry[_TUPLE_ORIG])
    ips = codec.attributes(first[_TUPLE_IP])
    source, target = _SOURCE_AND_DESTINATION[4 if _SOURCE_AND_DESTINATION[4][0] in ips else 6]
    protocol = bytes(codec.attributes(first[_TUPLE_PROTO])[_PROTO_NUMBER])
    return ip_address(bytes(ips[source])), ip_address(bytes(ips[target])), protocol[0]


def _needles(ips: Iterable[IPAddress]) -> re.Pattern[bytes]:
    """The addresses as they stand in a tuple: an attribute's header, then the address."""
    found = (
        re.escape(attribute(kind, ip.packed)) for ip in ips for kind in _SOURCE_AND_DESTINATION[ip.version]
    )
    return re.compile(b"|".join(found), re.DOTALL)


def _suspects(datagram: bytes, needles: re.Pattern[bytes]) -> Iterator[Message]:
    """Messages that hold an address somewhere; the others are stepped over unparsed."""
    hits = iter([match.start() for match in needles.finditer(datagram)])
    hit = next(hits, None)
    offset = 0
    while hit is not None:
        following = offset + codec.message_size(datagram, offset)
        if hit < following:
            yield from codec.messages(datagram[offset:following])
        while hit is not None and hit < following:
            hit = next(hits, None)
        offset = following


def _names(entry: codec.Attributes, packed: frozenset[bytes]) -> bool:
    """Whether one of the entry's tuples holds one of the addresses."""
    return any(_addresses(entry[kind]) & packed for kind in (_TUPLE_ORIG, _TUPLE_REPLY) if kind in entry)


def _deletion(family: int, entry: codec.Attributes) -> Request:
    body = bytes([family, 0, 0, 0])
    for kind, flag in ((_TUPLE_ORIG, codec.NLA_F_NESTED), (_ID, 0), (_ZONE, 0)):
        if kind in entry:
            body += attribute(kind | flag, bytes(entry[kind]))
    return Request(_DELETE, 0, body, "forget a tracked connection", (errno.ENOENT,))


def _addresses(entry: memoryview) -> set[bytes]:
    ip = codec.attributes(entry).get(_TUPLE_IP)
    return {bytes(value) for value in codec.attributes(ip).values()} if ip is not None else set()
