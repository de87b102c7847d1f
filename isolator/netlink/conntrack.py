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
from collections.abc import Iterable, Iterator

from isolator.model import IPAddress
from isolator.netlink import codec
from isolator.netlink.codec import Message, Request, attribute
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

_SUBSYSTEM = 1 << 8
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2

_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE = 1, 2, 12, 18
_TUPLE_IP = 1
_SOURCE_AND_DESTINATION = {4: (1, 2), 6: (3, 4)}  # CTA_IP_*


def flush_conntrack(ips: Iterable[IPAddress]) -> None:
    """Delete every entry that names one of the addresses: in either direction, as source or destination.

    In the namespace of the calling thread, over a socket of its own. Takes some 5 ms for the table's buckets
    and 3 ms per 1,000 entries in it. Raises KernelRefused; a kernel that tracks nothing has nothing to forget.
    """
    wanted = frozenset(ips)
    if not wanted:
        return
    families = {ip.version for ip in wanted}
    family = (
        {4: socket.AF_INET, 6: socket.AF_INET6}[families.pop()] if len(families) == 1 else socket.AF_UNSPEC
    )
    listing = Request(_GET, 0, bytes([family, 0, 0, 0]), "list the tracked connections", (errno.EINVAL,))
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        needles = _needles(wanted)
        packed = frozenset(ip.packed for ip in wanted)
        doomed = [
            _deletion(message.body[0], found)
            for datagram in netfilter.stream(listing)
            for message in _suspects(datagram, needles)
            if _names(found := codec.attributes(message.body, 4), packed)
        ]
        netfilter.execute(doomed)


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
