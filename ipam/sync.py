"""Making journal and store agree, at start and whenever the fence says that something happened.

The store wins where it names another owner; the journal wins where the store knows nothing of an
address that an endpoint uses (it is asserted anew). What the store has for this node and the journal
does not know was written by an agent whose journal is lost: a live endpoint keeps it, anything else
cools down before it is used.

Reads only what is this node's: its blocks and journalled addresses outside of them. Everything is
scanned only if the journal knows nothing, or the store went back in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from ipam import keys
from ipam.holdings import Holdings, cooling
from ipam.journal import BlockRow
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import block_at
from ipam.records import Address, AddressState, Block
from ipam.shelf import Held
from ipam.store.base import KeyValue, Store, read_prefix, read_range
from ipam.writer import Writer

log = structlog.get_logger(__name__)

REWIND_GRACE = 30.0
"""Seconds after a restored backup in which nothing new is taken: other nodes assert what they hold."""

IsLive = Callable[[IPAddress, Address], bool]


@dataclass(slots=True)
class SyncReport:
    """What a sync brought to light."""

    adopted: list[IPAddress] = field(default_factory=list)
    released: list[IPAddress] = field(default_factory=list)
    asserted: list[IPAddress] = field(default_factory=list)
    lost: list[IPAddress] = field(default_factory=list)


async def sync(store: Store, writer: Writer, holdings: Holdings, is_live: IsLive) -> SyncReport:
    """Take the fence and make journal and store agree.

    is_live: whether an endpoint here carries an address that the journal does not know.
    Raises Fenced, StoreUnavailable; ``holdings.problem`` stays as it was then.
    """
    fresh = await writer.claim(holdings.journal.confirmed_seq)
    full = not fresh or not (holdings.blocks or holdings.shelf.held)
    if not fresh:
        log.warning("store is older than the journal; what this node holds is asserted anew")
        holdings.no_new_until = asyncio.get_running_loop().time() + REWIND_GRACE
    await holdings.catalogue.refresh()
    await _sync_blocks(store, holdings, full=full)
    stored = await _stored_addresses(store, holdings, full=full)
    report = merge(holdings, stored, is_live)
    holdings.open_spaces()
    holdings.save(holdings.shelf.held.values(), writer.seq)
    holdings.problem = ""
    holdings.wake.set()
    return report


async def _sync_blocks(store: Store, holdings: Holdings, *, full: bool) -> None:
    if full:
        items, _ = await read_prefix(store, keys.BLOCKS)
    else:
        items = [kv for b in holdings.blocks if (kv := await store.get(keys.block_key(b)))]
    found: dict[IPNetwork, BlockRow] = {}
    for kv in items:
        record = Block.decode(kv.key, kv.value)
        if record.node == holdings.node:
            block = block_at(keys.ip_of(kv.key), record.size)
            found[block] = BlockRow(block, record.pool, kv.mod_revision)
    with holdings.journal.transaction():
        for block in set(holdings.blocks) - set(found):
            holdings.journal.drop_block(block)
            holdings.shelf.spaces.pop(block, None)
        for row in found.values():
            holdings.journal.save_block(row)
    holdings.blocks = found


async def _stored_addresses(
    store: Store, holdings: Holdings, *, full: bool
) -> dict[IPAddress, tuple[Address, int]]:
    items: list[KeyValue] = []
    if full:
        items.extend((await read_prefix(store, keys.ADDRESSES))[0])
    else:
        for block in holdings.blocks:
            items.extend((await read_range(store, *keys.address_range(block)))[0])
        read = {kv.key for kv in items}
        strays = [ip for ip in holdings.shelf.held if keys.address_key(ip) not in read]
        items.extend([kv for ip in strays if (kv := await store.get(keys.address_key(ip)))])
    return {keys.ip_of(kv.key): (Address.decode(kv.key, kv.value), kv.mod_revision) for kv in items}


def merge(holdings: Holdings, stored: dict[IPAddress, tuple[Address, int]], is_live: IsLive) -> SyncReport:
    """Bring what is held in line with ``stored`` (record and mod_revision by IP, ours and others')."""
    report = SyncReport()
    for held in list(holdings.shelf.held.values()):
        record, revision = stored.get(held.ip, (None, 0))
        if record is not None and record.node != holdings.node:
            report.lost.append(held.ip)
            holdings.lose(held, record)
        elif record is None and held.state is AddressState.ASSIGNED:
            report.asserted.append(held.ip)
            held.revision = 0
            holdings.shelf.want(held, held.record)
        elif record is None:
            # Warm or cooling, and the store knows nothing of it: nobody uses it.
            holdings.drop(held, reusable=True)
        elif held.record != record:
            held.revision = revision
            holdings.shelf.want(held, held.record)
        else:
            _confirmed(holdings, held, revision)
    for ip, (record, revision) in stored.items():
        if record.node != holdings.node:
            holdings.foreign(ip)
        elif ip not in holdings.shelf.held:
            _take_over(holdings, ip, record, revision, is_live, report)
    return report


def _confirmed(holdings: Holdings, held: Held, revision: int) -> None:
    was_settled = not held.dirty and (held.ready_at is not None or held.state is AddressState.WARM)
    holdings.shelf.confirm(held, revision, held.record)
    record = held.record
    assert record is not None
    queued = held in holdings.shelf.queued(record.network, held.ip.version)
    if not (queued or held.lent or (was_settled and held.state is AddressState.COOLING)):
        holdings.settle(held)


def _take_over(
    holdings: Holdings, ip: IPAddress, record: Address, revision: int, is_live: IsLive, report: SyncReport
) -> None:
    held = Held(ip, record, revision)
    holdings.shelf.add(held)
    holdings.used.add(record.network)
    if is_live(ip, record):
        report.adopted.append(ip)
    elif record.state is AddressState.COOLING:
        holdings.settle(held)
    else:
        # Also a warm one: an agent whose journal is lost may have given it to a container just ended.
        report.released.append(ip)
        holdings.shelf.want(held, cooling(record))
