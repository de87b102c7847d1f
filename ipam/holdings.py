"""What this node holds: the shelf, its blocks, and the journal that remembers both.

Shared by the three that work on it: the holder (ADD and DEL), the sync (start and after trouble) and
the upkeep (everything that is written to the store).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from ipam.allocator import BlockSpace
from ipam.catalogue import Catalogue
from ipam.errors import MoorageError
from ipam.journal import AddressRow, BlockRow, Journal
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import Geometry
from ipam.records import Address, AddressState
from ipam.shelf import Held, Shelf

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Conflict:
    """The store says that an address which an endpoint here uses is somebody else's."""

    ip: IPAddress
    holder: Address


def warm(node: str, network: str, pool: str) -> Address:
    """The record of an address that ``node`` keeps ready."""
    return Address(pool=pool, state=AddressState.WARM, node=node, network=network, since=time.time())


def cooling(record: Address) -> Address:
    """The record of a released address; it still says who had it, so that a reservation finds its own."""
    return record.with_(state=AddressState.COOLING, since=time.time(), labels=[], netgroups=[])


def held_by(ip: IPAddress, record: Address) -> str:
    """The sentence that names who has an address."""
    if record.state is AddressState.ASSIGNED:
        return (
            f"{ip} belongs to container {record.container_id} ({record.ifname}) on node {record.node}; "
            "end that container first, or ask for another address"
        )
    return f"{ip} is {record.state.value} on node {record.node}; ask for another address, or try again later"


class Holdings:
    """See the module's docstring. on_conflict is told of each Conflict, after the address was dropped."""

    def __init__(
        self,
        node: str,
        catalogue: Catalogue,
        journal: Journal,
        on_conflict: Callable[[Conflict], None],
        cooldown: float,
    ) -> None:
        self.node = node
        self.catalogue = catalogue
        self.journal = journal
        self.cooldown = cooldown
        self.shelf = Shelf()
        self.blocks: dict[IPNetwork, BlockRow] = {}
        self.used: set[str] = set()
        self.asking: dict[IPAddress, asyncio.Future[Held]] = {}
        self.wake = asyncio.Event()
        self.problem = "not in sync with the store yet"
        self.no_new_until = 0.0
        self._on_conflict = on_conflict
        self._unsaved: dict[IPAddress, Held] = {}

    def load(self) -> None:
        """Start from the journal. What is warm there is served in the boot that wrote it, and only there."""
        self.blocks = {row.block: row for row in self.journal.load_blocks()}
        for row in self.journal.load_addresses():
            held = Held(row.ip, row.record, row.revision, row.dirty, journalled=True)
            self.shelf.add(held)
            self.used.add(row.record.network)
            if held.state is AddressState.WARM and not held.dirty and self.journal.is_of_this_boot:
                self.shelf.offer(held)
        self.open_spaces()

    def open_spaces(self) -> None:
        """Make the free addresses of own blocks available, as the pools are defined now."""
        pools = {pool.name: pool for pool in self.catalogue.pools()}
        for block, row in self.blocks.items():
            pool = pools.get(row.pool)
            known = self.shelf.spaces.get(block)
            if pool is None:
                self.shelf.spaces.pop(block, None)
            elif known is None or known.pool != pool:
                self.shelf.spaces[block] = BlockSpace(pool, block, self.shelf.held)

    def ask_for(self, ip: IPAddress, network: str, pool: Geometry) -> Held:
        """A new entry for an address that shall become warm; the store decides."""
        held = Held(ip, warm(self.node, network, pool.name), dirty=True)
        self.shelf.add(held)
        return held

    def settle(self, held: Held) -> None:
        """The store has confirmed what should be there: start what follows from it."""
        if held.state is AddressState.COOLING:
            self.shelf.cool(held, asyncio.get_running_loop().time() + self.cooldown)
        elif held.state is AddressState.WARM:
            asked = self.asking.pop(held.ip, None)
            if asked is not None and not asked.done():
                asked.set_result(held)
            elif not held.lent:
                self.shelf.offer(held)

    def lose(self, held: Held, holder: Address) -> None:
        """The store wins: the address is somebody else's."""
        assigned = held.state is AddressState.ASSIGNED
        self.drop(held, reusable=False)
        if assigned:
            self._on_conflict(Conflict(held.ip, holder))

    def drop(self, held: Held, *, reusable: bool) -> None:
        """It is not held any more."""
        self.shelf.drop(held, reusable=reusable)
        self._unsaved.pop(held.ip, None)
        if held.journalled:
            try:
                self.journal.drop_addresses([held.ip])
            except MoorageError as error:
                # Harmless: at the next start the store says whose it is.
                log.warning("journal keeps an address that is gone", ip=str(held.ip), why=str(error))

    def foreign(self, ip: IPAddress) -> None:
        """Somebody else has an address inside one of our blocks."""
        for block, space in self.shelf.spaces.items():
            if ip.version == block.version and ip in block:
                space.remove(ip)

    def save(self, entries: Iterable[Held], seq: int | None = None) -> None:
        """Write entries to the journal; what cannot be written now is written with the next."""
        for held in entries:
            if self.shelf.held.get(held.ip) is held:
                self._unsaved[held.ip] = held
        rows = [
            AddressRow(held.ip, held.record, held.revision, held.dirty)
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
