"""The upkeep: everything this node writes to the store, one group after the other.

While a transaction is in flight, what becomes dirty gathers; the next transaction takes all of it:
assignments and releases (the outbox, oldest first), new warm addresses for those who wait and up to
each network's target, blocks to claim, and what is given back. Idle, a change is one transaction at
once; busy, tens of addresses share a round trip.

An address is forgotten before it is given away: its row leaves the journal, durably, before the
transaction that deletes its key is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import structlog

from ipam import keys
from ipam.allocator import first_block
from ipam.errors import AddressTaken, Exhausted, MoorageError, TryAgain
from ipam.holdings import Holdings, cooling, held_by, warm
from ipam.journal import BlockRow
from ipam.keys import Family, IPNetwork
from ipam.networks import pool_usage
from ipam.pools import Geometry
from ipam.records import Address, AddressState, Block, Network, Pool
from ipam.shelf import Held, Waiter
from ipam.store.base import Store, absent, none_between
from ipam.writer import GROUP, Outcome, Write, Writer

log = structlog.get_logger(__name__)

REFILL_PATIENCE = 10.0
"""Seconds an ADD waits for an address when none is warm (DESIGN.md section 3)."""

HIGH_WATER = 2
"""A cooled address is freed when this many times the warm target is ready already."""

RETURN_RETRY = 5.0
"""Seconds before an own block that others have addresses in is offered back once more."""

JOURNAL_RETRY = 1.0
"""Seconds before the journal is written again after the disk refused it."""


_FAMILIES: tuple[Family, ...] = (4, 6)


@dataclass(frozen=True, slots=True)
class Change:
    """One write and what it is for: an address with the record that was sent, or a block."""

    write: Write
    held: Held | None = None
    sent: Address | None = None
    block: BlockRow | None = None


class Upkeep:
    """See the module's docstring."""

    def __init__(self, store: Store, writer: Writer, holdings: Holdings) -> None:
        self._store = store
        self._writer = writer
        self._holdings = holdings
        self._shelf = holdings.shelf
        self._return_after: dict[IPNetwork, float] = {}

    async def run(self) -> None:
        """Work until cancelled. Raises Fenced, StoreRewound, StoreError: sync again, then run again."""
        while True:
            while changes := await self._gather():
                outcomes = await self._writer.commit([change.write for change in changes])
                self._apply(changes, outcomes)
            await self._woken()

    async def _woken(self) -> None:
        """Wait until something became dirty or a cooldown is over."""
        now = self._now()
        times = [self._shelf.next_ready(), min(self._return_after.values(), default=None)]
        if self._holdings.has_unsaved:
            times.append(now + JOURNAL_RETRY)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min((t for t in times if t is not None), default=None)):
                await self._holdings.wake.wait()
        self._holdings.wake.clear()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # -- what to write

    async def _gather(self) -> list[Change]:
        self._holdings.wake.clear()
        self._holdings.save(())
        self._end_cooldowns()
        self._drop_unwanted()
        changes = await self._refill()
        returns = self._returned_blocks()
        changes += returns
        forgotten = bool(returns)
        for held in self._shelf.dirty()[: GROUP - len(changes)]:
            if held.record is None and held.journalled:
                if not self._forget(held):
                    continue
                forgotten = True
            changes.append(self._change_of(held))
        if forgotten:
            await self._holdings.journal.make_durable()
        return changes

    def _change_of(self, held: Held) -> Change:
        # Who asked for an address by name was checked against its reservation; a refill must not race one.
        unnamed = held.is_asked_for and held.ip not in self._holdings.asking
        guards = (absent(keys.reservation_key(held.ip)),) if unnamed else ()
        value = None if held.record is None else held.record.encode()
        return Change(Write(keys.address_key(held.ip), value, held.revision, guards), held, held.record)

    def _forget(self, held: Held) -> bool:
        try:
            self._holdings.journal.drop_addresses([held.ip])
        except MoorageError as error:
            log.warning("address is not given back yet", ip=str(held.ip), why=str(error))
            return False
        held.journalled = False
        return True

    def _end_cooldowns(self) -> None:
        for held in self._shelf.cooled(self._now()):
            record = held.record
            assert record is not None
            family = held.ip.version
            network = self._network(record.network)
            target = network.warm * HIGH_WATER if network else 0
            wanted = len(self._shelf.waiters(record.network, family)) + target
            ready = self._shelf.warm_count(record.network, family) + self._shelf.coming(record.network, family)
            if ready < wanted and self._may_be_warm(held):
                self._shelf.want(held, warm(self._holdings.node, record.network, record.pool))
            else:
                self._shelf.want(held, None)

    def _drop_unwanted(self) -> None:
        """Warm addresses of pools that were disabled or deleted, that were reserved since, or that are more
        than anybody will need soon, go back."""
        for name in self._holdings.used:
            network = self._network(name)
            most = network.warm * HIGH_WATER if network else 0
            for family in _FAMILIES:
                queue = self._shelf.queued(name, family)
                for place, held in enumerate(queue):
                    if place >= most or not self._may_be_warm(held):
                        self._shelf.want(held, None)

    def _may_be_warm(self, held: Held) -> bool:
        pool = self._holdings.catalogue.pool_of(held.ip)
        return (
            pool is not None
            and not pool.disabled
            and pool.dynamic(held.ip)
            and self._holdings.catalogue.reserved(held.ip) is None
        )

    def _network(self, name: str) -> Network | None:
        return next((n for n in self._holdings.catalogue.networks() if n.name == name), None)

    # -- refilling

    async def _refill(self) -> list[Change]:
        """Ask for addresses where too few are warm; returns the blocks to claim for it."""
        claims: list[Change] = []
        if self._now() < self._holdings.no_new_until:
            return claims
        room = GROUP - len(self._shelf.dirty())
        for network in self._holdings.catalogue.networks():
            if network.name not in self._holdings.used and not network.preload:
                continue
            for family in _FAMILIES:
                pools = self._holdings.catalogue.pools_of(network, family)
                claims += await self._refill_family(network, family, pools, room)
        return claims

    async def _refill_family(
        self, network: Network, family: Family, pools: Sequence[Geometry], room: int
    ) -> list[Change]:
        waiters = self._shelf.waiters(network.name, family)
        have = self._shelf.warm_count(network.name, family) + self._shelf.coming(network.name, family)
        need = min(len(waiters) + network.warm - have, max(room, 0))
        picky = {w.pool for w in waiters if w.pool is not None}
        claims: list[Change] = []
        dry: set[str] = set()
        for pool in (p for p in pools if not p.disabled):
            for_them = sum(1 for w in waiters if w.pool == pool.name) if pool.name in picky else 0
            missing = self._ask(network, pool, max(need, for_them))
            need -= max(need, for_them) - missing
            if missing:
                block = await self._unclaimed(pool)
                if block is None:
                    dry.add(pool.name)
                else:
                    claims.append(self._claim(pool, block))
                    need = 0
        dry |= {p.name for p in pools if p.disabled}
        hopeless = [w for w in waiters if w.pool in dry or (w.pool is None and dry >= {p.name for p in pools})]
        if hopeless and not self._shelf.coming(network.name, family):
            await self._give_up(hopeless, network, family, pools)
        return claims

    def _ask(self, network: Network, pool: Geometry, count: int) -> int:
        """Take ``count`` free addresses of own blocks of ``pool``; returns how many are missing."""
        reserved = self._holdings.catalogue.reserved_ips()
        for space in self._shelf.spaces.values():
            if count <= 0:
                break
            if space.pool.name == pool.name:
                for ip in space.take(count, reserved):
                    self._holdings.ask_for(ip, network.name, pool)
                    count -= 1
        return max(count, 0)

    async def _unclaimed(self, pool: Geometry) -> IPNetwork | None:
        """A block of ``pool`` that nobody has and that holds an address for everybody."""
        start = first_block(self._holdings.node, pool)
        for first, last in ((start, pool.block_count), (0, start)):
            async for index in self._gaps(pool, first, last):
                block = pool.block(index)
                if next(pool.dynamic_in(block), None) is not None:
                    return block
        return None

    async def _gaps(self, pool: Geometry, first: int, last: int) -> AsyncIterator[int]:
        """Indices in [first, last) of blocks that are unclaimed, ascending."""
        if first >= last:
            return
        _, end = keys.block_range(pool.block(last - 1))
        cursor: str | None = keys.block_key(pool.block(first))
        at = first
        while cursor is not None:
            page = await self._store.page(cursor, end, keys_only=True)
            for kv in page.items:
                index = pool.block_index(keys.ip_of(kv.key))
                for gap in range(at, index):
                    yield gap
                at = index + 1
            cursor = page.next_key
        for gap in range(at, last):
            yield gap

    def _claim(self, pool: Geometry, block: IPNetwork) -> Change:
        record = Block(pool=pool.name, size=block.prefixlen, node=self._holdings.node, claimed_at=time.time())
        return Change(Write(keys.block_key(block), record.encode(), 0), block=BlockRow(block, pool.name, 0))

    async def _give_up(
        self, waiters: Sequence[Waiter], network: Network, family: Family, pools: Sequence[Geometry]
    ) -> None:
        """Nothing is left for those who wait, unless a cooldown is over soon enough."""
        soonest = self._shelf.soonest(network.name, family)
        if soonest is not None and soonest < self._now() + REFILL_PATIENCE:
            return
        used = []
        for pool in pools:
            record = await self._store.get(keys.POOLS + pool.name)
            if record is not None:
                used.append(f"{pool.cidr}: {await pool_usage(self._store, Pool.decode(record.key, record.value))}")
        disabled = [str(p.cidr) for p in pools if p.disabled]
        error = Exhausted(
            f"network {network.name} has no free IPv{family} address left ({'; '.join(used)}"
            + (f"; disabled: {', '.join(disabled)}" if disabled else "")
            + "); end containers or add a pool"
        )
        self._shelf.fail_waiters(error, waiters)

    # -- giving blocks back

    def _returned_blocks(self) -> list[Change]:
        """Own blocks of pools that are disabled or gone, once nothing of ours is in them."""
        pools = {pool.name: pool for pool in self._holdings.catalogue.pools()}
        changes = []
        for block, row in list(self._holdings.blocks.items()):
            pool = pools.get(row.pool)
            if pool is not None and not pool.disabled:
                self._return_after.pop(block, None)
                continue
            if self._return_after.get(block, 0.0) > self._now():
                continue
            if any(ip.version == block.version and ip in block for ip in self._shelf.held):
                continue
            try:
                self._holdings.journal.drop_block(block)
            except MoorageError as error:
                log.warning("block is not given back yet", block=str(block), why=str(error))
                continue
            write = Write(
                keys.block_key(block), None, row.revision, (none_between(*keys.address_range(block)),)
            )
            changes.append(Change(write, block=row))
        return changes

    # -- what came of it

    def _apply(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
        touched: list[Held] = []
        for change, outcome in zip(changes, outcomes, strict=True):
            if change.block is not None:
                self._apply_block(change, change.block, outcome)
            elif change.held is not None:
                self._apply_address(change.held, change.sent, outcome)
                touched.append(change.held)
        self._holdings.save(touched, self._writer.seq)

    def _apply_block(self, change: Change, row: BlockRow, outcome: Outcome) -> None:
        holdings = self._holdings
        claimed = change.write.value is not None
        if claimed and not outcome.done:
            return  # another node was faster; the next refill looks further
        if not claimed and outcome.done:
            holdings.blocks.pop(row.block, None)
            self._shelf.spaces.pop(row.block, None)
            self._return_after.pop(row.block, None)
            return
        kept = BlockRow(row.block, row.pool, outcome.revision)
        holdings.blocks[row.block] = kept
        holdings.journal.save_block(kept)
        if claimed:
            holdings.open_spaces()
        else:
            self._return_after[row.block] = self._now() + RETURN_RETRY

    def _apply_address(self, held: Held, sent: Address | None, outcome: Outcome) -> None:
        holdings, shelf = self._holdings, self._shelf
        if outcome.done:
            if shelf.confirm(held, outcome.revision, sent):
                if sent is None:
                    holdings.drop(held, reusable=True)
                else:
                    holdings.settle(held)
            return
        found = None if outcome.found is None else Address.decode(outcome.found.key, outcome.found.value)
        if found is not None and found.node != holdings.node:
            self._refuse(held, AddressTaken(held_by(held.ip, found)))
            holdings.lose(held, found)
        elif found is not None and held.is_asked_for:
            # Ours, and forgotten: nobody may use it before it has cooled down.
            self._refuse(held, TryAgain(f"{held.ip} was in use on this node a moment ago; try again later"))
            held.revision = outcome.revision
            shelf.want(held, cooling(found))
        elif found is not None:
            held.revision = outcome.revision
        elif held.state is AddressState.ASSIGNED:
            held.revision = 0
        else:
            # Absent: a reservation was faster than our refill, or somebody freed what we were to free.
            self._refuse(held, AddressTaken(f"{held.ip} was reserved a moment ago; ask for it with its key"))
            holdings.drop(held, reusable=True)

    def _refuse(self, held: Held, error: MoorageError) -> None:
        asked = self._holdings.asking.pop(held.ip, None)
        if asked is not None and not asked.done():
            asked.set_exception(error)
