"""Whether a pool may lie where it does: what is said of it when an operator makes it, and while it is used. Pure.

single addresses and connected prefixes of nodes    refused; a forced pool leaves out the addresses
routes of nodes                                     a warning: a VPN's 10.0.0.0/8 is everywhere and nowhere
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ipam.errors import InvalidInput
from ipam.keys import IPAddress, IPNetwork
from ipam.nodes_networks import Collision, NodesNetworks
from ipam.pools import Geometry
from ipam.ranges import range_of
from ipam.taken import FIRM, Kind

NAMED = 3
"""Collisions that a sentence names; the others are counted."""

USED = FIRM | {Kind.CONNECTED}


def check_pool(shape: Geometry, around: NodesNetworks) -> None:
    """Raises InvalidInput, which names what a pool collides with unless it is forced, or that nothing is left of it."""
    found = _shared(shape, around, FIRM if shape.forced else USED)
    is_left = shape.without(around.closed(shape.family, forced=True)).usable_count() > 0
    if found and not is_left:
        raise InvalidInput(
            f"the pool {shape.cidr} has no address that nodes do not use themselves: it collides with "
            f"{_listed(found)}; choose another CIDR"
        )
    if found and not shape.forced:
        # The prefix first: it is what --force is about.
        found.sort(key=lambda one: one.taken.kind is not Kind.CONNECTED)
        raise InvalidInput(
            f"the pool {shape.cidr} collides with {_listed(found)}; choose another CIDR, or give --force to use what "
            "is left of it without the addresses that nodes use"
        )


def _shared(shape: Geometry, around: NodesNetworks, kinds: Collection[Kind]) -> list[Collision]:
    """What a pool has in common with nodes' networks, but for what it excludes itself."""
    return [
        found
        for found in around.collisions(shape.cidr, kinds)
        if any(shape.excluded.outside(*_common(shape, found.taken.network)))
    ]


def _common(shape: Geometry, network: IPNetwork) -> tuple[int, int]:
    whole = range_of(network)
    return max(whole.first, shape.first), min(whole.last, shape.last)


def warnings(shapes: Iterable[Geometry], around: NodesNetworks) -> list[str]:
    """What an operator is told of pools that were made: routes that lead elsewhere, and what forced ones leave out."""
    told = []
    for shape in shapes:
        if routes := _shared(shape, around, {Kind.ROUTE}):
            told.append(
                f"the pool {shape.cidr} shares addresses with {_listed(routes)}; from those nodes the pool's addresses "
                "lead to containers instead: see that nothing there is needed"
            )
        if shape.forced and (left_out := _shared(shape, around, FIRM)):
            told.append(
                f"the pool {shape.cidr} gives out all but {_listed(left_out, len(left_out))}; machines there that are "
                "no nodes are not known: --exclude theirs"
            )
    return told


def colliding_pools(shapes: Iterable[Geometry], around: NodesNetworks) -> list[str]:
    """Sentences about pools that lie over nodes' own networks although nobody forced them."""
    return [
        f"the pool {shape.cidr} of network {shape.network} collides with {_listed(found)}, so nothing is given out of "
        f"what they share; move the network to another pool, or use the rest with `moorage network set "
        f"{shape.network} --enable-pool {shape.cidr} --force`"
        for shape in shapes
        if not shape.forced and around.closed_to(shape) and (found := _shared(shape, around, USED))
    ]


def colliding_address(ip: IPAddress, shape: Geometry, around: NodesNetworks, whose: str) -> str:
    """A sentence about an assigned address that a node's network uses too; "" if none does. whose: its holder."""
    found = around.why_closed(ip, shape)
    if not found:
        return ""
    return (
        f"{ip} of {whose} lies in what nodes use themselves: {found}; it stays assigned, start the container again to "
        "give it another address"
    )


def _listed(found: Sequence[Collision], most: int = NAMED) -> str:
    named = ", ".join(one.in_words for one in found[:most])
    return named + f" and {len(found) - most} others" * (len(found) > most)
