"""What a network allows its apps to ask for: the rules as operators write them, and what they cover.

    allow_netgroups  names and patterns       besides the network's own name, which is everybody's default
    allow_public     yes or no                the netgroup ``public``
    allow_static     all, ranges, addresses   ``ranges`` are those that its pools set aside as static
    allow_mac        yes or no
    allow_hostports  ports and ranges
    max_bandwidth    bits per second          0 is no limit; also what who asks for none is given

Pure. Rules are text in the store; one that cannot be read raises InvalidInput and so allows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Any

from ipam.errors import InvalidInput
from ipam.keys import IPAddress, IPNetwork
from ipam.netgroups import PUBLIC, Netgroup, check_pattern, covered
from ipam.pools import Geometry, parse_range
from ipam.rates import check_rate
from ipam.records import Network

ALL = "all"
RANGES = "ranges"

NEW_NETWORK: dict[str, Any] = {
    "allow_netgroups": [],
    "allow_public": False,
    "allow_static": [RANGES],
    "allow_mac": False,
    "to_node": [],
}
"""The rules of a network that is created now, where they are stricter than those of one that was written
before there were any (docs/decisions/who-may-ask.md)."""

MOST_RULES = 64
EVERYTHING: dict[int, IPNetwork] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}

_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


def check_rules(network: Network) -> None:
    """Raises InvalidInput naming the rule that makes no sense."""
    for rules in (network.allow_netgroups, network.allow_static, network.allow_hostports):
        if len(rules) > MOST_RULES:
            raise InvalidInput(f"{len(rules)} rules of one kind are too many; {MOST_RULES} are possible")
    for pattern in network.allow_netgroups:
        check_pattern(pattern)
    for rule in network.allow_static:
        if rule not in (ALL, RANGES):
            parse_range(rule, _family_of(rule))
    for rule in network.allow_hostports:
        parse_ports(rule)
    if network.max_bandwidth:
        check_rate("the largest bandwidth", network.max_bandwidth)
    if network.name == PUBLIC and not network.allow_public:
        raise InvalidInput(
            f"a network called {PUBLIC} has containers that are reachable from anywhere; choose another name, "
            "or say so with --allow-public"
        )


def allows_netgroup(network: Network, name: Netgroup) -> bool:
    """Its own name always, ``public`` only by itself."""
    if name == PUBLIC:
        return network.allow_public
    return name == network.name or covered(name, network.allow_netgroups)


def allows_static(network: Network, pools: Iterable[Geometry], ip: IPAddress) -> bool:
    """Whether who asks for this address by name may have it. pools: the network's."""
    return any(_covers(rule, pools, ip) for rule in network.allow_static)


def _covers(rule: str, pools: Iterable[Geometry], ip: IPAddress) -> bool:
    if rule == ALL:
        return True
    if rule == RANGES:
        return any(ip in pool.cidr and int(ip) in r for pool in pools for r in pool.static)
    everything = _family_of(rule)
    return everything.version == ip.version and int(ip) in parse_range(rule, everything)


def allows_host_port(network: Network, port: int) -> bool:
    """Whether a port of the node may lead to one of its containers."""
    return any(port in parse_ports(rule) for rule in network.allow_hostports)


def parse_ports(text: str) -> range:
    """``8080`` or ``31000-32000``. Raises InvalidInput."""
    match = _PORTS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < first <= last < 65536:
        raise InvalidInput(f"{text!r} is no port range; write for example 8080 or 31000-32000")
    return range(first, last + 1)


def listed(rules: Sequence[str]) -> str:
    """Rules in a sentence."""
    return ", ".join(rules) or "none"


def _family_of(rule: str) -> IPNetwork:
    return EVERYTHING[6 if ":" in rule else 4]
