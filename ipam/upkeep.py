"""The upkeep: everything this node writes to the store, one group after the other.

While a transaction is in flight, what becomes dirty gathers; the next transaction takes all of it:
assignments and releases (the outbox, oldest first), new warm addresses for those who wait and up to
each network's target, blocks to claim, and what is given back. Idle, a change is one transaction at
once; busy, tens of addresses share a round trip.

An address is forgotten before it is given away: the journal says so, durably, before the transaction
that deletes its key is sent. What no sync would find by itself, blocks and addresses outside of own
ones, is in the journal before it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from ipam import keys
from ipam.errors import AddressTaken, StoreError, TryAgain
from ipam.holdings import CONTEST_RETRY, Holdings, warm
from ipam.journal import BlockRow
from ipam.keys import Family, IPNetwork
from ipam.pools import Geometry
from ipam.records import Address, AddressState, Block, Network
from ipam.refill import Refill
from ipam.shelf import Held, doubtful, netgroups_told
from ipam.stock import HIGH_WATER, Tally
from ipam.store.base import KeyValue, Store, absent, none_between
from ipam.writer import GROUP, Outcome, Write, Writer, fitting

log = structlog.get_logger(__name__)

BLOCKS_AT_ONCE = GROUP // 2
"""Blocks claimed or given back in one group, so that addresses always have room beside them."""

SURPLUS_AFTER = 60.0
"""Seconds a block has to be empty, and not needed, before it goes back to its pool unasked."""

SURPLUS_RESERVE = 2
"""Times the warm target that has to be free in another own block for an empty one to be surplus."""

RETURN_RETRY = 5.0
"""Seconds before an own block that others have addresses in is offered back once more."""

JOURNAL_RETRY = 1.0
"""Seconds before the journal is written again after the disk refused it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write and what it is for: an address with the record that was sent, or a block."""

    write: Write
    held: Held | None = None
    sent: Address | None = None
    block: BlockRow | None = None


class Upkeep:
    """See the module's docstring."""

    def __init__(
        self, store: Store, writer: Writer, holdings: Holdings, on_written: Callable[[], None]
    ) -> None:
        """on_written: told whenever nothing is left to be written."""
        self._on_written = on_written
        self._store = store
        self._writer = writer
        self._holdings = holdings
        self._shelf = holdings.shelf
        self._refill = Refill(store, holdings)
        self._return_after: dict[IPNetwork, float] = {}
        self._empty_since: dict[IPNetwork, float] = {}
        self._undurable = False
        self._journal_failed = False

    async def run(self) -> None:
        """Work until ``holdings.problem`` says to sync again. Raises Fenced, StoreRewound, StoreError: likewise."""
        try:
            while not self._holdings.problem:
                changes = await self._gather()
                # Whoever set it woke this up as well, and _gather() may have taken that wake for its own.
                if self._holdings.problem:
                    return
                if changes:
                    self._apply(changes, await self._commit(changes))
                    # Who waited for these goes on first: what it does next is in the next group.
                    await asyncio.sleep(0)
                    continue
                self._on_written()
                await self._woken()
                self._holdings.assert_contested()
        finally:
            self._refill.cancel()

    async def _commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            if change.held is not None:
                change.held.in_flight = change.sent
        try:
            return await self._writer.commit([change.write for change in changes])
        finally:
            for change in changes:
                if change.held is not None:
                    change.held.in_flight = None
                    self._shelf.announce(change.held.ip)

    async def _woken(self) -> None:
        """Wait until something became dirty or a cooldown is over."""
        now = self._now()
        times = [
            self._shelf.next_ready(),
            min((t for t in self._return_after.values() if t > now), default=None),
            min(
                (t + SURPLUS_AFTER for t in self._empty_since.values() if t + SURPLUS_AFTER > now),
                default=None,
            ),
            self._refill.next_round(),
            self._holdings.next_unheld(),
        ]
        if self._holdings.has_unsaved or self._journal_failed:
            times.append(now + JOURNAL_RETRY)
        if left := self._holdings.grace.left:
            times.append(now + left)
        if self._holdings.contested:
            times.append(now + CONTEST_RETRY)
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
        self._journal_failed = False
        self._holdings.save(())
        self._end_cooldowns()
        self._drop_unwanted()
        wanted = await self._refill.ask(GROUP - len(self._shelf.dirty()))
        claims = [change for row in wanted[:BLOCKS_AT_ONCE] for change in self._claim(row)]
        changes = claims + self._returned_blocks(BLOCKS_AT_ONCE - len(claims))
        changes += map(self._change_of, self._journalled(self._shelf.dirty(), GROUP - len(changes)))
        # What does not fit stays in the outbox. Blocks come first and are small, so that all of them do.
        changes = changes[: fitting([change.write for change in changes])]
        if self._undurable and not await self._make_durable():
            # Nothing may be given away yet; the rest goes on.
            changes = [change for change in changes if change.write.value is not None]
        return changes

    def _journalled(self, dirty: Sequence[Held], most: int) -> list[Held]:
        """Up to ``most`` entries of the outbox, once the journal knows of them what it has to."""
        leaving = [held for held in dirty if held.record is None and held.journalled and not held.forgotten]
        if leaving:
            self._undurable = self._holdings.forget(leaving) or self._undurable
        strays = [
            held
            for held in dirty
            if held.is_asked_for and not held.journalled and self._holdings.is_stray(held.ip)
        ]
        if strays:
            self._holdings.save(strays)
        ready = []
        for held in dirty:
            if held in strays and not held.journalled:
                self._holdings.refuse(
                    held.ip, TryAgain(f"the journal cannot be written, so {held.ip} is not taken")
                )
                self._holdings.drop(held, reusable=True)
            elif held.record is None and held.journalled and not held.forgotten:
                self._journal_failed = True
            else:
                ready.append(held)
        return ready[:most]

    async def _make_durable(self) -> bool:
        try:
            await self._holdings.journal.make_durable()
        except TryAgain as error:
            log.warning("nothing is given back: the journal cannot be synced to its disk", why=str(error))
            self._journal_failed = True
            return False
        self._undurable = False
        return True

    def _change_of(self, held: Held) -> Change:
        # Only who presented a reservation's key may take a reserved address, however new the reservation is.
        keyless = held.is_asked_for and held.ip not in self._holdings.keyed
        guards = (absent(keys.reservation_key(held.ip)),) if keyless else ()
        value = None if held.record is None else held.record.encode()
        return Change(Write(keys.address_key(held.ip), value, held.revision, guards), held, held.record)

    def _end_cooldowns(self) -> None:
        over = self._shelf.cooled(self._now())
        if not over:
            return
        heard = [held for held in over if held.state is AddressState.WARM]
        for held in heard:
            self._shelf.offer(held)
        self._holdings.save(heard)
        tally = self._holdings.stock.tally()
        for held in over:
            record = held.record
            if record is None or record.state is not AddressState.COOLING:
                continue
            self._shelf.note_heard(held)
            announced = self._next_kind(held, record, tally)
            if announced is None:
                self._shelf.want(held, None)
                continue
            netgroups = (record.network,) if announced else ()
            self._shelf.want(held, warm(self._holdings.node, record.network, record.pool, netgroups))
            tally.expect(record.network, held.ip.version, record.pool, announced=announced)

    def _next_kind(self, held: Held, record: Address, tally: Tally) -> bool | None:
        """Whether a cooled address becomes warm as an announced one, or a plain one; None if it goes back to its pool,
        as one that was withdrawn does unless somebody waits for it."""
        if not self._holdings.may_be_warm(held) or self._is_reused_last(held):
            return None
        most = self._warm(held)
        needs = tally.needs(record.network, held.ip.version, most, HIGH_WATER)
        for waiter in needs.unserved:
            if waiter.pool in (None, record.pool):
                return waiter.is_member_of(record.network)
        if held.is_withdrawn or needs.spare >= HIGH_WATER * most:
            return None
        return next(iter(needs.kinds()), None)

    def _is_reused_last(self, held: Held) -> bool:
        """Whether a cooled address goes back to where the longest unused comes first, and another is taken.

        Who is not in touch with the store may still take it for its last owner's
        (docs/decisions/reuse-while-a-node-is-away.md).
        """
        if not self._holdings.others_away():
            return False
        reserved = self._holdings.catalogue.reserved_ips()
        return any(
            held.is_of(space.pool.name)
            and space.block not in self._holdings.returning
            and space.oldest(1, reserved)
            for space in self._shelf.spaces.values()
        )

    def _drop_unwanted(self) -> None:
        """Warm addresses of pools that were disabled or deleted, that were reserved since, or that are more
        than anybody will need soon, go back."""
        arrived, all_of_them = self._shelf.arrivals(), self._holdings.reconsider
        self._holdings.reconsider = False
        if not (arrived or all_of_them):
            return
        most: dict[tuple[str, Family], int] = {}
        for held in self._shelf.all_ready():
            if held.record is None or not (all_of_them or held in arrived):
                continue
            kept = self._warm(held)
            if kept and self._holdings.may_be_warm(held):
                most[held.record.network, held.ip.version] = kept
            else:
                self._shelf.withdraw(held)
        for (network, family), kept in most.items():
            for held in self._holdings.stock.surplus(network, family, kept):
                self._shelf.withdraw(held)

    def _warm(self, held: Held) -> int:
        """How many of its network and family are kept ready. Of borrowed ones, and of a pool under pressure: none."""
        network = self._network(held.record.network) if held.record else None
        if network is None or held.record is None or self._holdings.drained:
            return 0
        if not self._holdings.keeps_warm(network):
            return 0
        if self._holdings.is_stray(held.ip) or self._holdings.is_held_back(held.record.pool):
            return 0
        return network.warm

    def _network(self, name: str) -> Network | None:
        return next((n for n in self._holdings.catalogue.networks() if n.name == name), None)

    # -- claiming blocks and giving them back

    def _claim(self, row: BlockRow) -> list[Change]:
        if not self._holdings.doubt(row.block, row.pool):
            self._journal_failed = True
            return []
        record = Block(
            pool=row.pool, size=row.block.prefixlen, node=self._holdings.node, claimed_at=time.time()
        )
        return [Change(Write(keys.block_key(row.block), record.encode(), 0), block=row)]

    def _returned_blocks(self, most: int) -> list[Change]:
        """Up to ``most`` own blocks that are not wanted, once nothing of ours is in them."""
        changes = []
        for row in list(self._unwanted_blocks())[:most]:
            if not self._holdings.doubt(row.block, row.pool):
                self._journal_failed = True
                break
            self._undurable = True
            guard = none_between(*keys.address_range(row.block))
            changes.append(Change(Write(keys.block_key(row.block), None, row.revision, (guard,)), block=row))
        return changes

    def _unwanted_blocks(self) -> Iterable[BlockRow]:
        pools = {pool.name: pool for pool in self._holdings.catalogue.pools()}
        surplus = self._surplus(pools)
        for block, row in self._holdings.blocks.items():
            pool = pools.get(row.pool)
            wanted = pool is not None and not pool.disabled and not self._holdings.drained
            if wanted and block not in surplus | self._holdings.returning:
                self._return_after.pop(block, None)
            elif self._return_after.get(block, 0.0) <= self._now() and not any(
                ip.version == block.version and ip in block for ip in self._shelf.held
            ):
                yield row

    def _surplus(self, pools: Mapping[str, Geometry]) -> set[IPNetwork]:
        """Empty own blocks of enabled pools that others shall have: at once while the pool is under pressure,
        else when they have long been empty while another own block has enough free."""
        now, spaces = self._now(), self._shelf.spaces
        empty = {block for block, space in spaces.items() if space.is_idle}
        surplus: set[IPNetwork] = set()
        idle: set[IPNetwork] = set()
        for block in empty:
            pool = pools.get(spaces[block].pool.name)
            network = self._network(pool.network) if pool is not None else None
            if pool is None or network is None or pool.disabled:
                continue
            if self._holdings.is_held_back(pool.name):
                if not self._shelf.waiters(network.name, pool.family):
                    surplus.add(block)
                continue
            enough = max(network.warm, 1) * SURPLUS_RESERVE
            if any(
                other != block and other not in idle and space.pool.name == pool.name and len(space) >= enough
                for other, space in spaces.items()
            ):
                idle.add(block)
        self._empty_since = {block: self._empty_since.get(block, now) for block in idle}
        return surplus | {block for block, since in self._empty_since.items() if since + SURPLUS_AFTER <= now}

    # -- what came of it

    def _apply(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
        touched: list[Held] = []
        for change, outcome in zip(changes, outcomes, strict=True):
            if change.block is not None:
                self._apply_block(change, change.block, outcome)
            elif change.held is not None:
                self._apply_address(change, change.held, outcome)
                touched.append(change.held)
        self._holdings.save(touched, self._writer.seq)

    def _apply_block(self, change: Change, row: BlockRow, outcome: Outcome) -> None:
        claimed = change.write.value is not None
        self._return_after.pop(row.block, None)
        if not claimed and outcome.refused:
            self._holdings.keep_block(row)
            self._return_after[row.block] = self._now() + RETURN_RETRY
        elif (claimed and outcome.done) or self._is_ours(outcome.found):
            self._holdings.keep_block(BlockRow(row.block, row.pool, outcome.revision))
            self._holdings.open_spaces()
            if not claimed:
                self._return_after[row.block] = self._now() + RETURN_RETRY
                self._empty_since.pop(row.block, None)
        else:
            # Given back, or another node was faster; the next refill looks further.
            self._holdings.drop_block(row.block)

    def _is_ours(self, block: KeyValue | None) -> bool:
        try:
            return block is not None and Block.decode(block.key, block.value).node == self._holdings.node
        except StoreError as error:
            log.error("record is left as it is", why=str(error))
            return False

    def _apply_address(self, change: Change, held: Held, outcome: Outcome) -> None:
        holdings, shelf = self._holdings, self._shelf
        if outcome.done:
            if shelf.confirm(held, outcome.revision, change.sent):
                if change.sent is None:
                    holdings.drop(held, reusable=True)
                else:
                    holdings.settle(held)
        elif outcome.refused:
            holdings.set_aside(held, outcome.refused)
        elif outcome.found is not None:
            self._apply_found(held, outcome.found)
        elif held.state in (AddressState.ALLOCATED, AddressState.ASSIGNED, AddressState.COOLING):
            held.revision, held.told = 0, ()
        elif change.write.guards and held.ip in holdings.keyed:
            pass  # reserved, and asked for with its key while the refill was on its way: asked for once more
        else:
            # Absent: a reservation was faster than our refill, or somebody freed what we were to free.
            self._refill.note_unknown_reservation()
            holdings.refuse(
                held.ip, AddressTaken(f"{held.ip} was reserved a moment ago; ask for it with its key")
            )
            holdings.drop(held, reusable=True)

    def _apply_found(self, held: Held, kv: KeyValue) -> None:
        """Something else stands there than we had last read."""
        holdings = self._holdings
        try:
            found = Address.decode(kv.key, kv.value)
        except StoreError as error:
            log.error("record is left as it is", why=str(error))
            holdings.refuse(held.ip, TryAgain(str(error)))
            if held.state is not None and held.state.is_taken:
                self._shelf.rest(held)
            else:
                holdings.drop(held, reusable=False)
                holdings.foreign(held.ip)
            return
        asked_for, held.revision, held.told = held.is_asked_for, kv.mod_revision, netgroups_told(found)
        if found.node != holdings.node:
            if not holdings.contest(held, found):
                holdings.lose(held, found)
        elif asked_for:
            # Ours, and forgotten: nobody may use it before it has cooled down.
            holdings.refuse(
                held.ip, TryAgain(f"{held.ip} was in use on this node a moment ago; try again later")
            )
            self._shelf.want(held, doubtful(found))
