"""What the kernel holds of table ``inet moorage``, read over netlink.

libnftables writes, because it checks what it is told; but it fetches every element to answer any question
about a table (70 ms with 10,000), so what is asked often is asked here.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from isolator.model import IPAddress
from isolator.netlink import codec
from isolator.netlink.codec import Request
from isolator.netlink.socket import NetlinkSocket
from isolator.policy.ruleset import TABLE

_SUBSYSTEM = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSETELEM, _GETGEN = (_SUBSYSTEM | kind for kind in (1, 4, 7, 13, 16))
_INET = bytes([1, 0, 0, 0])  # nfgenmsg: NFPROTO_INET, version, resource
_NAME_OF_TABLE = 1  # in tables, chains, rules and elements alike
_GEN_ID = 1
_ELEMENTS_OF_SET, _ELEMENTS, _ELEMENT_KEY, _DATA_VALUE = 2, 3, 1, 1
_IFNAMSIZ = 16


def generation(netfilter: NetlinkSocket) -> int:
    """A number that grows with every change to any table of the namespace."""
    message = netfilter.get(Request(_GETGEN, 0, bytes(4), "read the ruleset's generation"))
    found = codec.attributes(message.body, 4).get(_GEN_ID) if message is not None else None
    return int.from_bytes(found or b"", "big")


def fingerprint(netfilter: NetlinkSocket) -> bytes | None:
    """A digest of the table's identity, chains and rules, but not of its elements; None if it is gone.

    The kernel numbers tables as they are made: one that was deleted and made again differs.
    """
    ours = _INET + codec.text(_NAME_OF_TABLE, TABLE)
    table = netfilter.get(Request(_GETTABLE, 0, ours, "read table inet moorage", (errno.ENOENT,)))
    if table is None:
        return None
    digest = hashlib.blake2s(table.body[4:])
    chains = netfilter.dump(Request(_GETCHAIN, 0, ours, "list the chains of table inet moorage"))
    rules = netfilter.dump(Request(_GETRULE, 0, ours, "list the rules of table inet moorage"))
    for message in (*chains, *rules):
        if codec.as_text(codec.attributes(message.body, 4).get(_NAME_OF_TABLE)) == TABLE:
            digest.update(message.body[4:])
    return digest.digest()


def elements(netfilter: NetlinkSocket) -> Iterator[tuple[str, IPAddress]]:
    """The pairs in endpoints4 and endpoints6; none if the table is gone."""
    for family in (4, 6):
        body = _INET + codec.text(_NAME_OF_TABLE, TABLE) + codec.text(_ELEMENTS_OF_SET, f"endpoints{family}")
        request = Request(_GETSETELEM, 0, body, f"list the set endpoints{family}", (errno.ENOENT,))
        for message in netfilter.dump(request):
            found = codec.attributes(message.body, 4).get(_ELEMENTS)
            for element in codec.each(found) if found is not None else ():
                key = codec.attributes(codec.attributes(element)[_ELEMENT_KEY])[_DATA_VALUE]
                packed = bytes(key[_IFNAMSIZ:])
                ip = IPv4Address(packed) if family == 4 else IPv6Address(packed)
                yield codec.as_text(key[:_IFNAMSIZ]), ip
