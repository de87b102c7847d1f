"""Names and numbers that follow from an endpoint alone, so that no state is needed to find it again.

All functions are pure.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Sequence

from isolator.model import EndpointKey, IPAddress
from isolator.netlink.messages import ENDPOINT_PREFIX, SHAPER_PREFIX

_TRAILING_NUMBER = re.compile(r"^(.*?)(\d*)$", re.DOTALL)


def host_ifname(key: EndpointKey) -> str:
    """The node's end of an endpoint: ``mrg`` and 60 bits of a hash of its key, 15 characters.

    >>> host_ifname(EndpointKey("c1", "eth0"))
    'mrguyuciqay44b5'
    """
    digest = hashlib.blake2s(f"{key.container_id}\0{key.ifname}".encode(), digest_size=10).digest()
    return ENDPOINT_PREFIX + base64.b32encode(digest)[:12].decode().lower()


def shaper_ifname(host_ifname: str) -> str:
    """The link that limits what comes from an endpoint, by the node's end of it: 55 bits of the same hash.

    >>> shaper_ifname("mrguyuciqay44b5")
    'mrg-uyuciqay44b'
    """
    return SHAPER_PREFIX + host_ifname.removeprefix(ENDPOINT_PREFIX)[:11]


def mac_for(ips: Sequence[IPAddress]) -> str:
    """The container end's MAC, derived from its address: the same address comes back with the same MAC.

    With an IPv4 address ``0a:58`` and its four bytes (the prefix that CNI plugins use); with IPv6 alone
    ``0e`` and 40 bits of a hash. Both are locally administered, unicast, and never meet.
    """
    for ip in ips:
        if ip.version == 4:
            return (b"\x0a\x58" + ip.packed).hex(":")
    if not ips:
        raise ValueError("an endpoint has at least one address")
    return (b"\x0e" + hashlib.blake2s(ips[0].packed, digest_size=5).digest()).hex(":")


def route_table(ifname: str) -> int:
    """The routing table of one interface inside its container: ``0x6d`` and 24 bits of the name's CRC."""
    return 0x6D000000 | zlib.crc32(ifname.encode()) & 0xFFFFFF


def route_metric(ifname: str, *, default_route: bool) -> int:
    """The metric of an interface's main default route: the lowest wins, and it follows from the name alone.

    So parallel ADDs for one container agree without talking to each other. From the top bit down:

        1 bit   0 if the interface was chosen to be the default route, else 1
        15 bits the first three letters of the name, 5 bits each (a = 1 … z = 26, anything else 0)
        8 bits  the number at its end plus one, at most 255; 0 if there is none
        5 bits  CRC of the name, which keeps apart names that agree in all of the above

    Hence eth0 < eth1 < eth10 < net0. Never 0, which the kernel would replace.
    """
    match = _TRAILING_NUMBER.match(ifname)
    assert match is not None
    stem, number = match.groups()
    metric = 0 if default_route else 1
    for letter in stem[:3].lower().ljust(3):
        metric = metric << 5 | (ord(letter) - 96 if "a" <= letter <= "z" else 0)
    metric = metric << 8 | (min(int(number) + 1, 255) if number else 0)
    return max(1, metric << 5 | zlib.crc32(ifname.encode()) & 0x1F)
