"""Refilling: where the next addresses of this node come from.

For those who wait, and up to what each network keeps warm, in this order:

    free addresses of own blocks
    a block that nobody has, to be claimed first
    own ones that lie ready for members of other netgroups, once others have heard of that
    single addresses of other nodes' blocks, for who waits only       ipam/borrowing.py
    what other nodes give back when they are asked                    ipam/pressure.py
    none: who waits is told, and who holds what

Nothing is written here: what is asked for is dirty on the shelf, and blocks to claim are returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from ipam import keys
from ipam.allocator import first_block
from ipam.borrowing import Borrowing
from ipam.catalogue import OPERATORS
from ipam.errors import Exhausted
from ipam.holdings import Holdings
from ipam.journal import BlockRow
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.networks import pool_usage
from ipam.pools import Geometry
from ipam.pressure import Pressure, Relief
from ipam.records import Network, Pool
from ipam.shelf import Waiter
from ipam.store.base import Store, read_range

REFILL_PATIENCE = 10.0
"""Seconds an ADD waits for an address when none is warm (docs/design.md, section 3)."""

FULL_FOR = 0.5
"""Seconds for which it is believed that a pool has no unclaimed block."""

_FAMILIES: tuple[Family, ...] = (4, 6)


class Refill:
    """See the module's docstring."""

    def __init__(self, store: Store, holdings: Holdings) -> None:
        self._store = store
        self._holdings = holdings
        self._shelf = holdings.shelf
        self._borrowing = Borrowing(store, holdings)
        self._pressure = Pressure(store, holdings, self._relieved)
        self._full_until: dict[str, float] = {}
        self._reservation_unknown = False

    def cancel(self) -> None:
        """Nobody is asked to give anything back any more."""
        self._pressure.cancel()

    def next_round(self) -> float | None:
        """When others are to be asked again (event loop's clock)."""
        return self._pressure.next_round()

    def note_unknown_reservation(self) -> None:
        """The store refused an address for a reservation of which the catalogue has not heard."""
        self._reservation_unknown = True

    def _relieved(self, pool: str) -> None:
        """Others were asked to give back: look once more."""
        self._borrowing.look_anew(pool)
        self._full_until.pop(pool, None)
        self._holdings.wake.set()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def ask(self, room: int) -> list[BlockRow]:
        """Ask for up to ``room`` addresses where too few are warm; returns the blocks to claim for more."""
        claims: list[BlockRow] = []
        if self._holdings.drained or self._now() < self._holdings.no_new_until:
            return claims
        if self._reservation_unknown:
            self._reservation_unknown = False
            await self._holdings.catalogue.refresh(OPERATORS)
        for network in self._holdings.catalogue.networks():
            keeps_warm = self._holdings.keeps_warm(network)
            for family in _FAMILIES:
                if keeps_warm or self._shelf.waiters(network.name, family):
                    pools = self._holdings.catalogue.pools_of(network, family)
                    warm = self._holdings.stock.wanted(network.name, network.warm) if keeps_warm else 0
                    claims += await self._refill(network, family, pools, room, warm)
        return claims

    async def _refill(
        self, network: Network, family: Family, pools: Sequence[Geometry], room: int, warm: int
    ) -> list[BlockRow]:
        waiters = self._shelf.waiters(network.name, family)
        need, waiting = (
            min(count, max(room, 0)) for count in self._holdings.stock.missing(network.name, family, warm)
        )
        picky = {w.pool for w in waiters if w.pool is not None}
        claims: list[BlockRow] = []
        dry: set[str] = set()
        for pool in (p for p in pools if not p.disabled):
            for_them = sum(1 for w in waiters if w.pool == pool.name) if pool.name in picky else 0
            wanted = max(waiting if self._holdings.is_held_back(pool.name) else need, for_them, 0)
            missing = self._take(network, pool, wanted, warm)
            if missing and await self._look_again(pool):
                missing = self._take(network, pool, missing, warm)
            got = wanted - missing
            need, waiting = need - got, waiting - got
            if missing:
                block = await self._unclaimed(pool)
                if block is not None:
                    claims.append(BlockRow(block, pool.name, 0))
                    need = waiting = 0
                elif (starving := min(missing, max(waiting, for_them - got))) > 0:
                    starving -= self._withdraw(network, pool, starving)
                    got, is_dry = await self._borrow(network, pool, starving) if starving else (0, False)
                    need, waiting = need - got, waiting - got
                    if is_dry:
                        dry.add(pool.name)
        dry |= {p.name for p in pools if p.disabled}
        hopeless = [
            w for w in waiters if w.pool in dry or (w.pool is None and dry >= {p.name for p in pools})
        ]
        if hopeless and not self._shelf.coming(network.name, family):
            # All are asked before one answer is waited for.
            reliefs = [self._pressure.relief(p) for p in pools if not p.disabled and p.name in dry]
            if all(relief is not None for relief in reliefs):
                await self._give_up(hopeless, network, family, pools, [r for r in reliefs if r])
        return claims

    def _withdraw(self, network: Network, pool: Geometry, count: int) -> int:
        """Free up to ``count`` addresses that are announced, for those who can have none of these; returns how many
        are on their way. They are free when other nodes have heard that they are members of nothing."""
        count = min(count, self._holdings.stock.waits_for_plain(network.name, pool.family))
        if count <= 0:
            return 0
        leaving = [held for held in self._shelf.held.values() if held.withdrawn and held.is_of(pool.name)]
        ready = [h for h in self._shelf.announced(network.name, pool.family) if h.is_of(pool.name)]
        for held in ready[: max(count - len(leaving), 0)]:
            self._shelf.withdraw(held)
            leaving.append(held)
        return min(len(leaving), count)

    async def _borrow(self, network: Network, pool: Geometry, count: int) -> tuple[int, bool]:
        """Take up to ``count`` addresses of other nodes' blocks for who waits.

        Returns how many, and whether the pool has no more.
        """
        if network.strict:
            return 0, True
        found = await self._borrowing.find(pool, count)
        self._ask_for(found.ips, network, pool, 0)
        if found.scarce:
            self._pressure.note_scarcity(pool)
        if len(found.ips) < count and not found.all_round:
            self._holdings.wake.set()  # there is more to look at, once what was found is written
        return len(found.ips), found.all_round and not found.ips

    def _take(self, network: Network, pool: Geometry, count: int, warm: int) -> int:
        """Take ``count`` free addresses of own blocks of ``pool``; returns how many are missing.

        One block after the other, so that the last ones can be given back; while a node is away the longest unused
        of all of them (docs/decisions/reuse-while-a-node-is-away.md).
        """
        reserved = self._holdings.catalogue.reserved_ips()
        spaces = [
            space
            for space in self._shelf.spaces.values()
            if space.pool.name == pool.name and space.block not in self._holdings.returning
        ]
        found: list[IPAddress] = []
        if self._holdings.others_away():
            free = [candidate for space in spaces for candidate in space.oldest(max(count, 0), reserved)]
            found = [ip for _, ip in sorted(free, key=lambda candidate: candidate[0])[: max(count, 0)]]
        else:
            for space in spaces:
                found += space.take(count - len(found), reserved)
        self._ask_for(found, network, pool, warm)
        return max(count - len(found), 0)

    def _ask_for(self, ips: Sequence[IPAddress], network: Network, pool: Geometry, warm: int) -> None:
        announcements = self._holdings.stock.announcements(network.name, pool.family, warm, len(ips))
        for ip, netgroups in zip(ips, announcements, strict=True):
            self._holdings.ask_for(ip, network.name, pool, netgroups)

    async def _look_again(self, pool: Geometry) -> bool:
        """Whether an address in an own block, somebody else's when last heard of, is free now."""
        found = False
        for space, foreign in self._holdings.foreign_in(pool):
            items, _ = await read_range(self._store, *keys.address_range(space.block), keys_only=True)
            held = {kv.key for kv in items}
            for ip in [ip for ip in foreign if keys.address_key(ip) not in held]:
                foreign.discard(ip)
                if ip not in self._shelf.held:
                    self._shelf.give_back(ip)
                    found = True
        return found

    async def _unclaimed(self, pool: Geometry) -> IPNetwork | None:
        """A block of ``pool`` that nobody has and that holds an address for everybody."""
        if self._now() < self._full_until.get(pool.name, 0.0):
            return None
        start = first_block(self._holdings.node, pool)
        for first, last in ((start, pool.block_count), (0, start)):
            async for gap, end in self._gaps(pool, first, last):
                index = pool.next_block_with_dynamic(gap)
                if index is not None and index < end:
                    return pool.block(index)
        self._full_until[pool.name] = self._now() + FULL_FOR
        return None

    async def _gaps(self, pool: Geometry, first: int, last: int) -> AsyncIterator[tuple[int, int]]:
        """Runs [from, to) of unclaimed blocks within [first, last), ascending."""
        if first >= last:
            return
        _, end = keys.block_range(pool.block(last - 1))
        cursor: str | None = keys.block_key(pool.block(first))
        at = first
        while cursor is not None:
            page = await self._store.page(cursor, end, keys_only=True)
            for kv in page.items:
                index = pool.block_index(keys.ip_of(kv.key))
                if at < index:
                    yield at, index
                at = index + 1
            cursor = page.next_key
        if at < last:
            yield at, last

    async def _give_up(
        self,
        waiters: Sequence[Waiter],
        network: Network,
        family: Family,
        pools: Sequence[Geometry],
        reliefs: Sequence[Relief],
    ) -> None:
        """Nothing is left for those who wait, unless a cooldown is over soon enough."""
        soonest = self._shelf.soonest(network.name, family)
        if soonest is not None and soonest < self._now() + REFILL_PATIENCE:
            return
        used = []
        for pool in pools:
            record = await self._store.get(keys.POOLS + pool.name)
            if record is not None:
                around = self._holdings.catalogue.around
                use = await pool_usage(self._store, Pool.decode(record.key, record.value), around)
                used.append(f"{pool.cidr}: {use}")
        disabled = [str(p.cidr) for p in pools if p.disabled]
        away = sorted({f"{node} ({count} warm)" for r in reliefs for node, count in r.away.items()})
        error = Exhausted(
            f"network {network.name} has no free IPv{family} address left ({'; '.join(used)}"
            + (f"; disabled: {', '.join(disabled)}" if disabled else "")
            + (f"; not running, so they give nothing back: {', '.join(away)}" if away else "")
            + "); end containers or add a pool"
        )
        if any(waiter.pool is None for waiter in waiters):
            self._holdings.note_exhausted(network.name, family, error)
        self._shelf.fail_waiters(error, waiters)
