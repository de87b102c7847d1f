"""A table that an earlier agent left, while neither journal nor store is there to make it anew from.

It stays as it is, but for one thing: what the node's own networks use is taken out of its pools. Else a pool over them
would go on keeping the store from answering, and with that the table from being made anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from ipam.keys import Family, IPNetwork
from ipam.ranges import Range, Ranges, address, summarize
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import kernel
from isolator.policy.nft import Nft
from isolator.policy.ruleset import TABLE

SETS = ("pools", "nat", "open", "tunnelled", "tostore")
"""Sets of pools, less their family."""


def let_go(closed: Mapping[Family, Ranges]) -> list[str]:
    """Take addresses out of the pools that the table knows; the names of the sets that had any.

    On the thread and in the namespace of the table. closed: by family. Raises KernelRefused.
    """
    commands, changed = [], []
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        for family, taken in closed.items():
            for name in (f"{kind}{family}" for kind in SETS):
                held = kernel.intervals(netfilter, name)
                if any(taken.within(one.first, one.last) for one in held):
                    changed.append(name)
                    commands.append(f"flush set inet {TABLE} {name}")
                    rest = [str(part) for one in held for part in _parts(one, taken, family)]
                    if rest:
                        commands.append(f"add element inet {TABLE} {name} {{ {', '.join(rest)} }}")
    if commands:
        Nft().run("\n".join(commands), "take nodes' own networks out of the pools")
    return changed


def _parts(held: Range, taken: Ranges, family: Family) -> list[IPNetwork]:
    return [
        network
        for gap in taken.outside(held.first, held.last)
        for network in summarize(address(gap.first, family), address(gap.last, family))
    ]
