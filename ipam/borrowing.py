"""Borrowing: free addresses in other nodes' blocks, for who waits when a pool has no unclaimed block left.

A borrowed address is taken as any other is (absent -> put); its block stays its owner's. The node walks
round the pool from a place that its name hashes to, a page of keys at a time, and goes on next time where
it stopped, so that neither one refill reads the whole pool nor all borrowers meet at the same address.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ipam import keys
from ipam.errors import StoreError
from ipam.holdings import Holdings
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import Geometry
from ipam.store.base import KeyValue, Store

PAGE = 64
"""Keys in one read: a block of the default size."""

PAGES_AT_ONCE = 8
"""Reads in one refill; the walk goes on in the next."""

NOTHING_FOR = 0.5
"""Seconds for which a walk all round that found nothing is believed."""

SCARCE = 0.1
"""Share of free addresses below which a pool is under pressure (docs/design.md, section 5)."""


@dataclass(frozen=True, slots=True)
class Found:
    """Free addresses. all_round: there are no more in the pool. scarce: few were free where we looked."""

    ips: list[IPAddress] = field(default_factory=list)
    all_round: bool = False
    scarce: bool = False


@dataclass(slots=True)
class _Walk:
    """at: the address to look at next, as a number. fruitless: addresses passed since one was found."""

    at: int
    fruitless: int = 0
    nothing_until: float = 0.0


class Borrowing:
    """See the module's docstring."""

    def __init__(self, store: Store, holdings: Holdings) -> None:
        self._store = store
        self._holdings = holdings
        self._walks: dict[str, _Walk] = {}

    def look_anew(self, pool: str) -> None:
        """Addresses may have become free there."""
        walk = self._walks.get(pool)
        if walk is not None:
            walk.fruitless, walk.nothing_until = 0, 0.0

    async def find(self, pool: Geometry, count: int) -> Found:
        """Up to ``count`` free addresses of ``pool`` outside of own blocks, nobody's reservation."""
        length = pool.last - pool.first + 1
        start = pool.first + zlib.crc32(self._holdings.node.encode()) % length
        walk = self._walks.setdefault(pool.name, _Walk(start))
        if asyncio.get_running_loop().time() < walk.nothing_until:
            return Found(all_round=True, scarce=True)
        found: list[IPAddress] = []
        seen = free = pages = 0
        while len(found) < count and walk.fruitless < length and pages < PAGES_AT_ONCE:
            block = self._block_ahead(pool, walk)
            if block is None:
                continue
            pages += 1
            last, here = await self._free_from(pool, block, walk.at)
            seen += last - walk.at + 1
            free += len(here)
            taken = here[: count - len(found)]
            found += taken
            self._go(pool, walk, int(taken[-1]) + 1 if len(taken) < len(here) else last + 1)
            if taken:
                walk.fruitless = 0
        all_round = walk.fruitless >= length
        if all_round:
            walk.fruitless = 0
            walk.nothing_until = asyncio.get_running_loop().time() + NOTHING_FOR
        return Found(found, all_round, scarce=free < seen * SCARCE or all_round)

    def _block_ahead(self, pool: Geometry, walk: _Walk) -> IPNetwork | None:
        """Somebody else's block that the walk has come to; None when it went on to another place instead."""
        index = pool.next_block_with_dynamic(pool.block_index(_ip(pool, walk.at)))
        if index is None:
            self._go(pool, walk, pool.last + 1)
            return None
        block = pool.block(index)
        if block in self._holdings.blocks:
            self._go(pool, walk, int(block.broadcast_address) + 1)
            return None
        if int(block.network_address) > walk.at:
            self._go(pool, walk, int(block.network_address))
        return block

    @staticmethod
    def _go(pool: Geometry, walk: _Walk, to: int) -> None:
        walk.fruitless += to - walk.at
        walk.at = to if to <= pool.last else pool.first

    async def _free_from(self, pool: Geometry, block: IPNetwork, first: int) -> tuple[int, list[IPAddress]]:
        """How far one page of keys reaches from ``first`` in ``block``, and what is free up to there."""
        start, (_, end) = keys.address_key(_ip(pool, first)), keys.address_range(block)
        page = await self._store.page(start, end, limit=PAGE, keys_only=True)
        taken = _ips(page.items)
        last = int(block.broadcast_address)
        if page.next_key is not None and taken:
            last = int(taken[-1])
        reserved = self._holdings.catalogue.reserved_ips()
        busy = set(taken)
        here = [
            ip
            for ip in (_ip(pool, value) for value in range(first, last + 1))
            if ip not in busy
            and pool.dynamic(ip)
            and ip not in reserved
            and ip not in self._holdings.shelf.held
        ]
        return last, here


def _ip(pool: Geometry, value: int) -> IPAddress:
    return type(pool.cidr.network_address)(value)


def _ips(items: Sequence[KeyValue]) -> list[IPAddress]:
    found = []
    for kv in items:
        try:
            found.append(keys.ip_of(kv.key))
        except StoreError:
            continue  # stands for no address; `moorage ip check` reports it
    return found
