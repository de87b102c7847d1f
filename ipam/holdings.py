"""What this node holds: the shelf, its blocks, and the journal that remembers both.

Shared by the three that work on it: the holder (ADD and DEL), the sync (start and after trouble) and
the upkeep (everything that is written to the store).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from ipam.allocator import BlockSpace
from ipam.catalogue import Catalogue
from ipam.errors import AddressTaken, Exhausted, MoorageError, TryAgain
from ipam.grace import Grace
from ipam.journal import AddressRow, BlockRow, Journal
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.outage import Outage
from ipam.pools import Geometry
from ipam.records import Address, AddressState, Network
from ipam.shelf import Held, Shelf, cooling, netgroups_told
from ipam.stock import HEARD_WITHIN, Stock

log = structlog.get_logger(__name__)

BEHIND = 0.01
"""Seconds by which writes that nobody waits for are put off: longer than what is left of their ADD or DEL."""

GIVE_BACK_HOLD = 30.0
"""Seconds after a pool was under pressure in which nothing of it is kept warm here."""

CONTEST_RETRY = 1.0
"""Seconds until the store is asked again whose an address is that two nodes may have."""

EXHAUSTED_FOR = 30.0
"""Seconds for which a network counts as exhausted after an ADD was told so: as long as what others release
cools down. Only an ADD looks for addresses, and an engine that is told "not available" sends none."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The store says that an address which an endpoint here uses is somebody else's."""

    ip: IPAddress
    holder: Address


def warm(node: str, network: str, pool: str, netgroups: Collection[str] = ()) -> Address:
    """The record of an address that ``node`` keeps ready. netgroups: what it is announced as; ipam/stock.py."""
    return Address(
        pool=pool,
        state=AddressState.WARM,
        node=node,
        network=network,
        netgroups=list(netgroups),
        since=time.time(),
    )


def given(lent: Iterable[Held], state: AddressState, **whose: Any) -> list[AddressRow]:
    """The rows of lent addresses that are somebody's from now on. whose: fields of their records, of which what an
    engine told of a task before is none any more."""
    now = time.time()
    return [
        AddressRow(
            held.ip,
            held.record.with_(
                state=state, app="", task="", framework="", former="", endpoint={}, since=now, **whose
            ),
            held.revision,
            True,
        )
        for held in lent
        if held.record is not None
    ]


class HeldElsewhere(AddressTaken):
    """An address asked for by name is another node's. It may be talked into giving it up: ipam/handover.py."""

    def __init__(self, ip: IPAddress, holder: Address, revision: int) -> None:
        super().__init__(held_by(ip, holder))
        self.ip = ip
        self.holder = holder
        self.revision = revision


def held_by(ip: IPAddress, record: Address) -> str:
    """The sentence that names who has an address."""
    if record.state is AddressState.ASSIGNED:
        return (
            f"{ip} belongs to container {record.container_id} ({record.ifname}) on node {record.node}; "
            "end that container first, or ask for another address"
        )
    if record.state is AddressState.ALLOCATED:
        return f"{ip} is allocated to {record.uid} on node {record.node}; release it first, or ask for another address"
    return f"{ip} is {record.state.value} on node {record.node}; ask for another address, or try again later"


class Holdings:
    """See the module's docstring. on_conflict is told of each Conflict, after the address was dropped.

    used: networks that had an ADD here; warm addresses are kept ready for them.
    asking: who waits for one certain address to become warm.
    serving: whether what is held may be given out. Not when the journal is of another boot or lost, and
    not when another agent writes for this node; then only after the next sync.
    disputed: another agent writes for this node, or the store forgot what it holds; so others may have it until the
    next sync.
    preloads: whether networks that want it are kept ready before anybody used them.
    drained: nothing is given out or kept ready; ipam/drain.py.
    reconsider: what may lie ready here may be different now; upkeep looks at all of it, then takes this back.
    returning: own blocks that an operator wants returned; ipam/return_block.py.
    others_away: whether a registered node is not in touch with the store; ipam/cluster.py.
    problem: why journal and store have to be made to agree first, "" if they do. outage: how the store answers.
    grace: while it lasts nothing new is taken from the store.
    yields_to: whether a node, by its name, that the store names as the holder of an address which is used here has it
    for certain. Not one that has not looked at a store in doubt yet: the address is contested until it has.
    in_question: addresses that were used here when the store came into doubt, until it has them as this node's.
    contested: those of them that the store has as another node's, which may not know of it.
    synced: whether journal and store were made to agree since this began.
    set_asides: addresses whose record the store takes at no time, and why.
    """

    def __init__(
        self,
        node: str,
        catalogue: Catalogue,
        journal: Journal,
        outage: Outage,
        on_conflict: Callable[[Conflict], None],
        cooldown: float,
        preloads: bool = True,
        others_away: Callable[[], bool] = lambda: False,
        *,
        grace: Grace,
        yields_to: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.node = node
        self.grace = grace
        self.yields_to = yields_to
        self.contested: dict[IPAddress, Conflict] = {}
        self.in_question: set[IPAddress] = set()
        self.synced = False
        self.set_asides: dict[IPAddress, str] = {}
        self.preloads = preloads
        self.others_away = others_away
        self.catalogue = catalogue
        self.journal = journal
        self.cooldown = cooldown
        self.shelf = Shelf(self.may_be_warm)
        self.stock = Stock(self.shelf, time.monotonic)
        self.blocks: dict[IPNetwork, BlockRow] = {}
        self.used: set[str] = set()
        self.asking: dict[IPAddress, asyncio.Future[Held]] = {}
        self.keyed: set[IPAddress] = set()
        self.wake = asyncio.Event()
        self._nudged = False
        self.serving = False
        self.disputed = False
        self.drained = False
        self.reconsider = True
        self.returning: set[IPNetwork] = set()
        self.problem = "not in sync with the store yet"
        self._outage = outage
        self._on_conflict = on_conflict
        self._unsaved: dict[IPAddress, Held] = {}
        self._held_back: dict[str, float] = {}
        self._exhausted: dict[tuple[str, Family], tuple[float, Exhausted]] = {}

    def nudge(self) -> None:
        """Something is to be written that nobody waits for: soon, but not in the way of the ADD it came from."""
        if not self._nudged:
            self._nudged = True
            asyncio.get_running_loop().call_later(BEHIND, self._wake_up)

    def _wake_up(self) -> None:
        self._nudged = False
        self.wake.set()

    def load(self, *, doubted: bool = False) -> None:
        """Start from the journal. What is warm there is served in the boot that wrote it, and only there; and not if
        the store was doubted, which may have it as another's."""
        self.serving = self.journal.is_of_this_boot and not doubted
        self.drained = self.journal.drained
        # Revision 0: claimed or given back, and the store had not confirmed it.
        self.blocks = {row.block: row for row in self.journal.load_blocks() if row.revision}
        for row in self.journal.load_addresses():
            held = Held(row.ip, row.record, row.revision, row.dirty, journalled=True, recalled=True)
            # Of one that is dirty nobody remembers what the store had before; a warm one may have been announced.
            unknown = (row.record.network,) if held.state is AddressState.WARM else ()
            held.told = unknown if held.dirty else netgroups_told(held.record)
            self.shelf.add(held)
            self.note_use(row.record)
            if held.state is AddressState.WARM and not held.dirty and self.serving:
                self.shelf.offer(held)
        self.open_spaces()

    def carry(self, ip: IPAddress, record: Address) -> None:
        """An endpoint has the address, by what the kernel says, and the journal does not know. For a start, before
        anything is given out: the store is told, and says whether it is another's."""
        held = self.shelf.held.get(ip)
        if held is None:
            held = Held(ip, record)
            self.shelf.add(held)
        held.carried, held.recalled = True, False
        self.shelf.want(held, record)
        self.note_use(record)
        self.save([held])

    def note_use(self, record: Address) -> None:
        """Containers here have, or had, addresses of that network."""
        if not record.is_nodes_own:
            self.used.add(record.network)
            if record.state.is_taken:
                self.stock.note(record.network, record.netgroups)

    def keeps_warm(self, network: Network) -> bool:
        """Whether addresses of the network are kept ready here."""
        return network.name in self.used or (network.preload and self.preloads)

    @property
    def trouble(self) -> str:
        """Why nothing but warm addresses can be given out now; "" if all is well."""
        return self.problem or self._outage.why

    @property
    def hopeless(self) -> str:
        """Why it is not even worth waiting for others; "" also while the store may be between two leaders."""
        return self.problem or (self._outage.why if self._outage.away else "")

    def check_takes_new(self) -> None:
        """Raises TryAgain while nothing new may be taken."""
        left = self.grace.left
        if left > 0:
            raise TryAgain(
                f"the store is in doubt ({self.grace.why or 'since before a restart'}); nothing new is taken until all "
                f"nodes have said what they hold, or for another {left:.0f} s; try again then"
            )

    def may_be_warm(self, held: Held) -> bool:
        """Whether an address may be given to who did not ask for it by name."""
        pool = self.catalogue.pool_of(held.ip)
        return (
            pool is not None
            and not pool.disabled
            and pool.dynamic(held.ip)
            and self.catalogue.reserved(held.ip) is None
        )

    def why_not_renounced(self, held: Held) -> str:
        """Why an announced address that somebody names cannot be made a member of nothing first; "" if it can.

        Who chooses an address chooses what a node that is cut off takes it for.
        """
        known = f"{held.ip} is known to other nodes as an address of netgroup {', '.join(netgroups_told(held.record))}"
        if self.hopeless:
            return (
                f"{known}, and the store does not answer ({self.hopeless}), so they cannot be told that it is not any "
                "more; try again when it does"
            )
        if self.others_away():
            return (
                f"{known}, and a node is away that may be cut off from the store and would not hear that it is not any "
                "more; ask for another address, or try again when all nodes are there (`moorage node list`; "
                "`moorage node remove` for one that is gone for good)"
            )
        return ""

    def hold_back(self, pool: str) -> None:
        """The pool is under pressure: for a while its addresses are only taken for who waits."""
        self._held_back[pool] = asyncio.get_running_loop().time() + GIVE_BACK_HOLD
        self.reconsider = True

    def is_held_back(self, pool: str) -> bool:
        return self._held_back.get(pool, 0.0) > asyncio.get_running_loop().time()

    def next_unheld(self) -> float | None:
        """When the next pool may be kept warm again (event loop's clock)."""
        now = asyncio.get_running_loop().time()
        return min((t for t in self._held_back.values() if t > now), default=None)

    def note_exhausted(self, network: str, family: Family, error: Exhausted) -> None:
        """Nobody had an address for those who waited here."""
        self._exhausted[network, family] = (asyncio.get_running_loop().time() + EXHAUSTED_FOR, error)

    def catalogue_changed(self) -> None:
        """Networks, pools or reservations are different now."""
        self.open_spaces()
        self.reconsider = True
        self._exhausted.clear()
        self.wake.set()

    def exhausted(self) -> dict[tuple[str, Family], Exhausted]:
        """Networks, by family, of which an ADD found nothing lately and nothing came since."""
        now = asyncio.get_running_loop().time()
        return {key: error for key, (until, error) in self._exhausted.items() if until > now}

    def is_stray(self, ip: IPAddress) -> bool:
        """Whether an address lies outside of own blocks."""
        pool = self.catalogue.pool_of(ip)
        if pool is not None:
            return pool.block_of(ip) not in self.blocks
        return not any(b.version == ip.version and ip in b for b in self.blocks)

    def blocks_of(self, pool: str) -> set[IPNetwork]:
        return {block for block, row in self.blocks.items() if row.pool == pool}

    def open_spaces(self) -> None:
        """Make the free addresses of own blocks available, as the pools are defined now."""
        pools = {pool.name: pool for pool in self.catalogue.pools()}
        for block, row in self.blocks.items():
            pool = pools.get(row.pool)
            known = self.shelf.spaces.get(block)
            if pool is None:
                self.shelf.spaces.pop(block, None)
            elif known is None:
                self.shelf.spaces[block] = BlockSpace(pool, block, self.shelf.held)
            elif known.pool != pool:
                self.shelf.spaces[block] = known.reshaped(pool, self.shelf.held)

    def close_space(self, block: IPNetwork) -> None:
        """The block is not ours any more."""
        self.reconsider = True
        self.shelf.spaces.pop(block, None)

    def ask_for(self, ip: IPAddress, network: str, pool: Geometry, netgroups: Collection[str] = ()) -> Held:
        """A new entry for an address that shall become warm, announced as these; the store decides."""
        held = Held(ip, warm(self.node, network, pool.name, netgroups), dirty=True)
        self.shelf.add(held)
        return held

    def settle(self, held: Held) -> None:
        """The store has confirmed what should be there: start what follows from it."""
        self.contested.pop(held.ip, None)
        self.in_question.discard(held.ip)
        self.set_asides.pop(held.ip, None)
        if held.state is AddressState.COOLING:
            seconds = min(self.cooldown, HEARD_WITHIN) if held.is_withdrawn else self.cooldown
            self.shelf.cool(held, asyncio.get_running_loop().time() + seconds)
        elif held.state is AddressState.WARM:
            assert held.record is not None, "what is warm has a record"
            self._exhausted.pop((held.record.network, held.ip.version), None)
            if held.unheard:
                self.shelf.cool(held, asyncio.get_running_loop().time() + HEARD_WITHIN)
            asked = self.asking.pop(held.ip, None)
            if asked is not None and not asked.done():
                asked.set_result(held)
            elif not held.unheard:
                self.shelf.offer(held)
        self.shelf.announce(held.ip)

    def set_aside(self, held: Held, why: str) -> None:
        """The store takes no such record: it is not sent again before something else should stand there. Who uses the
        address goes on; other nodes know what the store had of it before."""
        log.error("record is set aside: the store does not take it", ip=str(held.ip), why=why)
        if held.state is not None and not held.state.is_taken:
            self.refuse(held.ip, TryAgain(f"the store does not take the record of {held.ip}: {why}"))
            self.drop(held, reusable=True)
            return
        self.set_asides[held.ip] = why
        self.shelf.rest(held)

    def refuse(self, ip: IPAddress, error: MoorageError) -> None:
        """Who asked for that address by name does not get it."""
        asked = self.asking.pop(ip, None)
        if asked is not None and not asked.done():
            asked.set_exception(error)

    def contest(self, held: Held, holder: Address) -> bool:
        """Whether an address that was used here when the store came into doubt stays so although the store has it as
        another node's: that one may not know yet that the store forgot who has it, and that it gave it away. Asked for
        again every CONTEST_RETRY seconds."""
        is_used = held.state is not None and held.state.is_taken and held.ip in self.in_question
        if not is_used or (holder.state.is_taken and self.yields_to(holder.node)):
            self.contested.pop(held.ip, None)
            return False
        if held.ip not in self.contested:
            log.warning(
                "address is another node's in the store and used here", ip=str(held.ip), node=holder.node
            )
        self.contested[held.ip] = Conflict(held.ip, holder)
        # Nothing is ever written over what the other node has there.
        held.revision, held.told = 0, ()
        self.shelf.rest(held)
        return True

    def assert_contested(self) -> None:
        """Ask the store once more whose the contested addresses are."""
        for ip in list(self.contested):
            held = self.shelf.held.get(ip)
            if held is None or held.record is None:
                del self.contested[ip]
            elif not held.dirty:
                held.revision, held.told = 0, ()
                self.shelf.want(held, held.record)

    def lose(self, held: Held, holder: Address) -> None:
        """The store wins: the address is somebody else's."""
        assigned = held.state is AddressState.ASSIGNED
        self.refuse(held.ip, HeldElsewhere(held.ip, holder, held.revision))
        self.drop(held, reusable=False)
        self.foreign(held.ip)
        if assigned:
            self._on_conflict(Conflict(held.ip, holder))

    def drop(self, held: Held, *, reusable: bool) -> None:
        """It is not held any more."""
        if self.shelf.held.get(held.ip) is not held:
            return
        self.refuse(held.ip, TryAgain(f"{held.ip} changed hands just now; try again"))
        self.shelf.drop(held, reusable=reusable)
        self.set_asides.pop(held.ip, None)
        self._unsaved.pop(held.ip, None)
        if held.journalled:
            try:
                self.journal.drop_addresses([held.ip])
            except MoorageError as error:
                # Harmless: at the next start the store says whose it is.
                log.warning("journal keeps an address that is gone", ip=str(held.ip), why=str(error))

    def foreign(self, ip: IPAddress) -> None:
        """Somebody else has an address inside one of our blocks."""
        for space in self.shelf.spaces.values():
            if ip in space:
                space.note_foreign(ip)

    # -- the journal

    def forget(self, leaving: Sequence[Held]) -> bool:
        """Before addresses are given away: from now on no start serves them. Returns whether that stands.

        Their rows stay until the store has confirmed, so that a start after a crash knows of them.
        """
        rows = [
            AddressRow(held.ip, cooling(held.leaving), held.revision, True)
            for held in leaving
            if held.leaving is not None
        ]
        try:
            self.journal.save_addresses(rows)
        except MoorageError as error:
            log.warning("addresses are not given back yet", count=len(rows), why=str(error))
            return False
        for held in leaving:
            held.forgotten = True
        return True

    def doubt(self, block: IPNetwork, pool: str) -> bool:
        """Before a block is claimed or given back: the next start looks in the store whose it is.

        Returns whether that stands in the journal.
        """
        try:
            self.journal.save_block(BlockRow(block, pool, 0))
        except MoorageError as error:
            log.warning("block is neither claimed nor given back yet", block=str(block), why=str(error))
            return False
        return True

    def keep_block(self, row: BlockRow) -> None:
        """The store has confirmed that the block is ours."""
        self.blocks[row.block] = row
        try:
            self.journal.save_block(row)
        except MoorageError as error:
            log.warning("journal keeps a block in doubt", block=str(row.block), why=str(error))

    def drop_block(self, block: IPNetwork) -> None:
        """The store has confirmed that the block is not ours."""
        self.blocks.pop(block, None)
        self.close_space(block)
        try:
            self.journal.drop_block(block)
        except MoorageError as error:
            log.warning("journal keeps a block that is gone", block=str(block), why=str(error))

    def save(self, entries: Iterable[Held], seq: int | None = None) -> None:
        """Write entries to the journal; what cannot be written now is written with the next."""
        for held in entries:
            if held.record is not None and self.shelf.held.get(held.ip) is held:
                self._unsaved[held.ip] = held
        self._unsaved = {ip: held for ip, held in self._unsaved.items() if held.record is not None}
        # Of a warm one that others may take for a member yet, a start is to know that it is not for everybody now.
        rows = [
            AddressRow(held.ip, held.record, held.revision, held.dirty or held.is_silent)
            for held in self._unsaved.values()
            if held.record is not None
        ]
        if not rows and seq is None:
            return
        try:
            with self.journal.transaction():
                self.journal.save_addresses(rows)
                if seq is not None:
                    self.journal.save_confirmed_seq(seq)
        except MoorageError as error:
            log.warning("journal not written; will be tried again", why=str(error))
            return
        for held in self._unsaved.values():
            held.journalled = True
        self._unsaved.clear()

    @property
    def has_unsaved(self) -> bool:
        return bool(self._unsaved)
