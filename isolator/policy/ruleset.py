"""The table ``inet moorage`` as text. Pure: values in, nft commands out.

A packet's path. Endpoint interfaces are those named ``mrg*``; everything else passes untouched, and an
accept here never overrules a drop in somebody else's table.

    from a container --> sources (raw prerouting, before conntrack: what is dropped costs no entry)
                           its interface and source address must be a pair in endpoints4/6, else drop.
                           So a spoofed source goes nowhere, and neither do ARP-less leftovers such as
                           DHCP, router solicitations and MLD, which have no source or a link-local one.
                     --> the node itself: nothing more; containers may talk to their node
                     --> forward

    to a container   --> forward, or output when the node itself sends
                           its interface and destination address must be a pair in endpoints4/6, else drop.
                           That comes before any thought of established connections: taking an address
                           out of the set cuts what is established too.

    leaving          --> masqueraded (postrouting) if from a NAT pool to outside all pools. Never from pool
                           to pool: containers see each other's real addresses.

Elements are looked up in hash sets: the cost of a packet, and of a change, does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from string import Template

from ipam.keys import IPNetwork
from isolator.model import IPAddress

TABLE = "moorage"

_TABLE = Template("""\
table inet moorage {
$sets
	chain sources {
		type filter hook prerouting priority raw; policy accept;
		iifname != "mrg*" accept
		iifname . ip saddr @endpoints4 accept
		iifname . ip6 saddr @endpoints6 accept
		drop
	}

	chain destinations {
		oifname . ip daddr @endpoints4 accept
		oifname . ip6 daddr @endpoints6 accept
		drop
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		oifname "mrg*" goto destinations
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oifname "mrg*" goto destinations
	}

	chain leaving {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @nat4 ip daddr != @pools4 masquerade fully-random
		ip6 saddr @nat6 ip6 daddr != @pools6 masquerade fully-random
	}
}
""")

_SETS = Template("""\
	set endpoints$family {
		type ifname . ipv${family}_addr
	}

	set pools$family {
		type ipv${family}_addr
		flags interval
	}

	set nat$family {
		type ipv${family}_addr
		flags interval
	}
""")

_FAMILIES = (4, 6)


def table(
    endpoints: Iterable[tuple[str, Sequence[IPAddress]]],
    pools: Iterable[IPNetwork],
    nat_pools: Iterable[IPNetwork],
) -> str:
    """Commands that replace the whole table; ``add`` first, since deleting what is missing fails."""
    sets = "\n".join(_SETS.substitute(family=family) for family in _FAMILIES)
    return (
        "add table inet moorage\n"
        "delete table inet moorage\n"
        + _TABLE.substitute(sets=sets)
        + _add_pools(pools, nat_pools)
        + admit(endpoints)
    )


def set_pools(pools: Iterable[IPNetwork], nat_pools: Iterable[IPNetwork]) -> str:
    """Commands that replace the pools."""
    flush = "".join(
        f"flush set inet moorage {name}{family}\n" for name in ("pools", "nat") for family in _FAMILIES
    )
    return flush + _add_pools(pools, nat_pools)


def admit(endpoints: Iterable[tuple[str, Sequence[IPAddress]]]) -> str:
    """Commands that add elements; existing ones are fine."""
    return "".join(f"add element {elements}\n" for elements in _elements(endpoints))


def revoke(endpoints: Iterable[tuple[str, Sequence[IPAddress]]]) -> str:
    """Commands that remove elements. They add them first: one that is missing would fail the transaction."""
    return "".join(
        f"add element {elements}\ndelete element {elements}\n" for elements in _elements(endpoints)
    )


def _elements(endpoints: Iterable[tuple[str, Sequence[IPAddress]]]) -> list[str]:
    pairs = {(host_ifname, ip) for host_ifname, ips in endpoints for ip in ips}
    found = []
    for family in _FAMILIES:
        listed = ", ".join(f'"{name}" . {ip}' for name, ip in pairs if ip.version == family)
        if listed:
            found.append(f"inet moorage endpoints{family} {{ {listed} }}")
    return found


def _add_pools(pools: Iterable[IPNetwork], nat_pools: Iterable[IPNetwork]) -> str:
    return "".join(
        f"add element inet moorage {name}{family} {{ {', '.join(map(str, members))} }}\n"
        for name, networks in (("pools", tuple(pools)), ("nat", tuple(nat_pools)))
        for family in _FAMILIES
        if (members := _disjoint(networks, family))
    )


def _disjoint(networks: Sequence[IPNetwork], family: int) -> list[IPNetwork]:
    """An interval set refuses ranges that overlap."""
    if family == 4:
        return list(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))
