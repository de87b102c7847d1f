"""Refilling: where the next addresses of this node come from.

For those who wait, and up to what each network keeps warm, in this order:

    free addresses of own blocks
    a block that nobody has, to be claimed first
    own ones that lie ready for members of the network's netgroup, once others have heard that they are plain
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
from ipam.stock import Tally
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
        if self._holdings.drained or self._holdings.grace.left:
            return claims
        if self._reservation_unknown:
            self._reservation_unknown = False
            await self._holdings.catalogue.refresh(OPERATORS)
        tally = self._holdings.stock.tally()
        for network in self._holdings.catalogue.networks():
            keeps_warm = self._holdings.keeps_warm(network)
            warm = self._holdings.stock.wanted(network.name, network.warm) if keeps_warm else 0
            for family in _FAMILIES:
                pools = self._holdings.catalogue.pools_of(network, family)
                if (keeps_warm and pools) or tally.waiters(network.name, family):
                    claims += await self._refill(network, family, pools, room, warm, tally)
        return claims

    async def _refill(
        self,
        network: Network,
        family: Family,
        pools: Sequence[Geometry],
        room: int,
        warm: int,
        tally: Tally,
    ) -> list[BlockRow]:
        needs = tally.needs(network.name, family, warm)
        unserved, kinds = needs.unserved, needs.kinds()
        claims: list[BlockRow] = []
        if not (unserved or kinds):
            return claims
        dry = {p.name for p in pools if p.disabled}
        for pool in (p for p in pools if not p.disabled and (unserved or kinds)):
            theirs = [w for w in unserved if w.pool in (None, pool.name)]
            wanted = [w.is_member_of(network.name) for w in theirs]
            wanted += [] if self._holdings.is_held_back(pool.name) else kinds
            wanted = wanted[: max(room, 0)]
            got = self._take(network, pool, wanted, tally)
            if got < len(wanted) and await self._look_again(pool):
                got += self._take(network, pool, wanted[got:], tally)
            kinds = kinds[max(got - len(theirs), 0) :]
            served, starving = theirs[:got], theirs[got : len(wanted)]
            if got < len(wanted):
                block = await self._unclaimed(pool)
                if block is not None:
                    claims.append(BlockRow(block, pool.name, 0))
                    served, kinds = theirs, []
                elif starving:
                    served += self._renounce(network, pool, starving, tally)
                    starving = [w for w in starving if w not in served]
                    borrowed, is_dry = (
                        await self._borrow(network, pool, starving, tally) if starving else (0, False)
                    )
                    served += starving[:borrowed]
                    if is_dry:
                        dry.add(pool.name)
            unserved = [w for w in unserved if w not in served]
        names = {p.name for p in pools}
        hopeless = [w for w in unserved if w.pool in dry or (w.pool is None and dry >= names)]
        if hopeless:
            # All are asked before one answer is waited for.
            reliefs = [self._pressure.relief(p) for p in pools if not p.disabled and p.name in dry]
            if all(relief is not None for relief in reliefs):
                too_many = self._too_many(hopeless, tally.waiters(network.name, family), pools)
                if too_many:
                    await self._give_up(too_many, network, family, pools, [r for r in reliefs if r])
        return claims

    def _renounce(
        self, network: Network, pool: Geometry, starving: Sequence[Waiter], tally: Tally
    ) -> list[Waiter]:
        """Of those who can have no announced address, the ones for whom one of the pool becomes plain now. It is
        offered when other nodes have heard."""
        others = [w for w in starving if not w.is_member_of(network.name)]
        ready = self._shelf.ready(network.name, pool.family, announced=True) if others else ()
        served = []
        for waiter, held in zip(others, [h for h in ready if h.is_of(pool.name)], strict=False):
            self._shelf.renounce(held)
            tally.expect(network.name, pool.family, pool.name, announced=False)
            served.append(waiter)
        return served

    def _too_many(
        self, hopeless: Sequence[Waiter], waiters: Sequence[Waiter], pools: Sequence[Geometry]
    ) -> list[Waiter]:
        """Of those for whom nothing is left those beyond what is on its way: to them, back to its pool, or cooling for
        no longer than they would wait. Who came last is one of them first."""
        until = self._now() + REFILL_PATIENCE
        enabled = {pool.name for pool in pools if not pool.disabled}
        hope: dict[str | None, int] = {None: self._shelf.on_their_way(enabled, until)}
        for name in {w.pool for w in waiters if w.pool is not None}:
            hope[name] = self._shelf.on_their_way(enabled & {name}, until)
        waiting = [w for w in waiters if not w.granted.done()]
        too_many = []
        for waiter in [w for w in waiting if w not in hopeless] + [w for w in waiting if w in hopeless]:
            if hope[None] > 0 and hope[waiter.pool] > 0:
                for pool in {None, waiter.pool}:
                    hope[pool] -= 1
            elif waiter in hopeless:
                too_many.append(waiter)
        return too_many

    async def _borrow(
        self, network: Network, pool: Geometry, starving: Sequence[Waiter], tally: Tally
    ) -> tuple[int, bool]:
        """Take addresses of other nodes' blocks for those who wait.

        Returns how many, and whether the pool has no more.
        """
        if network.strict:
            return 0, True
        found = await self._borrowing.find(pool, len(starving))
        self._ask_for(found.ips, network, pool, [w.is_member_of(network.name) for w in starving], tally)
        if found.scarce:
            self._pressure.note_scarcity(pool)
        if len(found.ips) < len(starving) and not found.all_round:
            self._holdings.wake.set()  # there is more to look at, once what was found is written
        return len(found.ips), found.all_round and not found.ips

    def _take(self, network: Network, pool: Geometry, kinds: Sequence[bool], tally: Tally) -> int:
        """Take a free address of own blocks of ``pool`` for each of ``kinds``, whether it is announced; returns how
        many there were.

        One block after the other, so that the last ones can be given back; while a node is away the longest unused
        of all of them (docs/decisions/reuse-while-a-node-is-away.md).
        """
        if not kinds:
            return 0
        reserved = self._holdings.catalogue.reserved_ips()
        spaces = [
            space
            for space in self._shelf.spaces.values()
            if space.pool.name == pool.name and space.block not in self._holdings.returning
        ]
        found: list[IPAddress] = []
        if self._holdings.others_away():
            free = [candidate for space in spaces for candidate in space.oldest(len(kinds), reserved)]
            found = [ip for _, ip in sorted(free, key=lambda candidate: candidate[0])[: len(kinds)]]
        else:
            for space in spaces:
                found += space.take(len(kinds) - len(found), reserved)
        self._ask_for(found, network, pool, kinds, tally)
        return len(found)

    def _ask_for(
        self,
        ips: Sequence[IPAddress],
        network: Network,
        pool: Geometry,
        kinds: Sequence[bool],
        tally: Tally,
    ) -> None:
        for ip, announced in zip(ips, kinds, strict=False):
            self._holdings.ask_for(ip, network.name, pool, (network.name,) if announced else ())
            tally.expect(network.name, pool.family, pool.name, announced=announced)

    async def _look_again(self, pool: Geometry) -> bool:
        """Whether an address in an own block, somebody else's when last heard of, is free now."""
        found = False
        for space in [s for s in self._shelf.spaces.values() if s.pool.name == pool.name and s.foreign]:
            items, _ = await read_range(self._store, *keys.address_range(space.block), keys_only=True)
            held = {kv.key for kv in items}
            for ip in space.foreign:
                if keys.address_key(ip) not in held and ip not in self._shelf.held:
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
        """Nothing is left for those who wait."""
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
