"""Making journal and store agree, at start and whenever the fence says that something happened.

The store wins where it names another owner; the journal wins where the store knows nothing of an
address that an endpoint uses (it is asserted anew). What the store has for this node and the journal
does not know was written by an agent whose journal is lost: a live endpoint keeps it, anything else
cools down before it is used.

So does what the journal has an earlier word of: a copy of it was put back, its log was lost, or its disk was full. The
fence tells: it is ahead of the last write that the journal knows of by more than what may have been confirmed in the
moment the agent was killed (docs/decisions/whose-word-counts.md).

Reads only what is this node's: its blocks and journalled addresses outside of them. Everything is
scanned only if the journal knows nothing, or of an earlier moment, or the store went back in time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import structlog

from ipam import keys
from ipam.continuity import Continuity
from ipam.errors import StoreError, TryAgain
from ipam.holdings import Holdings
from ipam.journal import BlockRow
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import block_at
from ipam.records import Address, AddressState, Block
from ipam.schema import check_schema, read_schema
from ipam.shelf import Held, doubtful, netgroups_told
from ipam.store.base import KeyValue, Store, prefix_end, read_prefix, read_range, scan
from ipam.writer import StoreRewound, Writer

log = structlog.get_logger(__name__)

IsLive = Callable[[IPAddress, Address], bool]

Stored: TypeAlias = dict[IPAddress, tuple[Address | None, int]]
"""Record and mod_revision by IP; None stands for a record that cannot be read."""


@dataclass(slots=True)
class SyncReport:
    """What a sync brought to light. unreadable: keys whose records are left as they are, and why.

    behind: the journal was older than the store, put back or cut off: store and kernel won.
    """

    adopted: list[IPAddress] = field(default_factory=list)
    released: list[IPAddress] = field(default_factory=list)
    asserted: list[IPAddress] = field(default_factory=list)
    lost: list[IPAddress] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    behind: bool = False


async def sync(
    store: Store, writer: Writer, holdings: Holdings, is_live: IsLive, continuity: Continuity
) -> SyncReport:
    """Take the fence and make journal and store agree.

    is_live: whether an endpoint here carries an address that the journal does not know.
    Raises Fenced, SchemaMismatch, StoreRewound, StoreUnavailable; ``holdings.problem`` stays as it was then.
    """
    # Of one that somebody loads a dump into nothing can be said yet.
    check_schema(await read_schema(store))
    await continuity.look()
    confirmed, unconfirmed = holdings.journal.confirmed_seq, holdings.journal.unconfirmed
    with contextlib.suppress(TryAgain):
        holdings.journal.note_attempt()
    # After a first sync the journal may be behind, of a full disk; it was compared then.
    as_new = await writer.claim(writer.seq if holdings.synced else max(confirmed, writer.seq))
    if not as_new and writer.was_removed:
        log.warning("node was removed from the store; what it holds is asserted anew")
    elif not as_new and not continuity.doubted:
        await continuity.move(f"it forgot writes of node {holdings.node}")
    known = continuity.incarnation, continuity.doubted
    fresh = as_new and not continuity.doubted
    # The claim itself is the last of its writes.
    report = SyncReport(behind=bool(confirmed) and as_new and writer.seq - 1 > confirmed + unconfirmed)
    if fresh:
        await holdings.catalogue.refresh()
    else:
        await holdings.catalogue.start_over()
    journalled = set(holdings.blocks) | {row.block for row in holdings.journal.load_blocks()}
    full = not fresh or report.behind or not confirmed or not (journalled or holdings.shelf.held)
    await _sync_blocks(store, holdings, report, journalled, full=full)
    stored = await _stored_addresses(store, holdings, report, full=full)
    if report.behind and any(held.recalled for held in holdings.shelf.held.values()):
        log.warning(
            "journal is older than the store; store and kernel say what this node holds",
            journal=confirmed,
            store=writer.seq - 1,
        )
    if continuity.doubted:
        holdings.in_question |= {ip for ip, held in holdings.shelf.held.items() if _is_taken(held)}
    # A journal that is older itself does not know better than the store; one that is new knows that nothing is used.
    rewound = (not fresh and not report.behind) if confirmed else holdings.grace.left > 0
    merge(holdings, stored, is_live, report, rewound=rewound)
    holdings.open_spaces()
    holdings.save(holdings.shelf.held.values(), writer.seq)
    if not holdings.has_unsaved:
        try:
            holdings.journal.own_boot()
        except TryAgain as error:
            log.warning("journal is still of an earlier boot", why=str(error))
    for key, why in report.unreadable.items():
        log.error("record is left as it is", key=key, why=why)
    if known != (continuity.incarnation, continuity.doubted):
        raise StoreRewound("the store came into doubt while it was read; it is read once more")
    holdings.problem = ""
    holdings.serving = holdings.synced = True
    holdings.disputed = False
    holdings.wake.set()
    return report


async def _sync_blocks(
    store: Store, holdings: Holdings, report: SyncReport, journalled: set[IPNetwork], *, full: bool
) -> None:
    if full:
        items, _ = await read_prefix(store, keys.BLOCKS)
    else:
        items = [kv for b in journalled if (kv := await store.get(keys.block_key(b)))]
    found: dict[IPNetwork, BlockRow] = {}
    for kv in items:
        try:
            record = Block.decode(kv.key, kv.value)
            block = block_at(keys.ip_of(kv.key), record.size)
        except StoreError as error:
            report.unreadable[kv.key] = str(error)
            continue
        if record.node == holdings.node:
            found[block] = BlockRow(block, record.pool, kv.mod_revision)
    for block in journalled - set(found):
        holdings.drop_block(block)
    for row in found.values():
        holdings.keep_block(row)


async def _stored_addresses(store: Store, holdings: Holdings, report: SyncReport, *, full: bool) -> Stored:
    items: list[KeyValue] = []
    if full:
        items.extend(await _of_concern(store, holdings))
    else:
        for block in holdings.blocks:
            items.extend((await read_range(store, *keys.address_range(block)))[0])
        seen = {kv.key for kv in items}
        strays = [ip for ip in holdings.shelf.held if keys.address_key(ip) not in seen]
        items.extend([kv for ip in strays if (kv := await store.get(keys.address_key(ip)))])
    return {ip: read for kv in items if (ip := _ip(kv, report)) and (read := _address(kv, report))}


class _Whose(msgspec.Struct):
    """Of an address's record the one field that says whether to read the others."""

    node: str


_whose = msgspec.json.Decoder(_Whose).decode


async def _of_concern(store: Store, holdings: Holdings) -> list[KeyValue]:
    """Of everybody's addresses those that are this node's, are held by it, or lie in its blocks, or might."""
    held = {keys.address_key(ip) for ip in holdings.shelf.held}
    blocks = [keys.address_range(block) for block in holdings.blocks]

    def concerns(kv: KeyValue) -> bool:
        try:
            if _whose(kv.value).node == holdings.node:
                return True
        except (msgspec.MsgspecError, RecursionError):
            return True
        return kv.key in held or any(start <= kv.key < end for start, end in blocks)

    everybodys = scan(store, keys.ADDRESSES, prefix_end(keys.ADDRESSES))
    return [kv async for kv in everybodys if concerns(kv)]


def _ip(kv: KeyValue, report: SyncReport) -> IPAddress | None:
    try:
        return keys.ip_of(kv.key)
    except StoreError as error:
        report.unreadable[kv.key] = str(error)
        return None


def _address(kv: KeyValue, report: SyncReport) -> tuple[Address | None, int]:
    try:
        return Address.decode(kv.key, kv.value), kv.mod_revision
    except StoreError as error:
        report.unreadable[kv.key] = str(error)
        return None, kv.mod_revision


def merge(
    holdings: Holdings, stored: Stored, is_live: IsLive, report: SyncReport, *, rewound: bool = False
) -> None:
    """Bring what is held in line with what is stored, ours and others'.

    rewound: the store may be older than the journal, so what only the store knows of this node, this node gave back:
    another one may have it since.
    """
    for held in list(holdings.shelf.held.values()):
        record, revision = stored.get(held.ip, (None, 0))
        is_recalled, held.recalled = held.recalled, False
        if held.carried:
            _complete(holdings, held, record, is_live)
        if record is None and revision:
            _leave_unreadable(holdings, held)
        elif record is None:
            _assert_or_drop(holdings, held, report, rewound=rewound)
        elif record.node != holdings.node:
            if not holdings.contest(held, record):
                report.lost.append(held.ip)
                holdings.lose(held, record)
        elif is_recalled and _is_outdated(held, record, revision, is_live, report):
            holdings.shelf.drop(held, reusable=False)
            _take_over(holdings, held.ip, record, revision, is_live, report, rewound=rewound)
        elif held.record != record:
            held.revision, held.told = revision, netgroups_told(record)
            holdings.shelf.want(held, held.record)
        else:
            _confirmed(holdings, held, revision)
    for ip, (record, revision) in stored.items():
        if record is None or record.node != holdings.node:
            if ip not in holdings.shelf.held:
                holdings.foreign(ip)
        elif ip not in holdings.shelf.held:
            _take_over(holdings, ip, record, revision, is_live, report, rewound=rewound)


def _is_outdated(held: Held, record: Address, revision: int, is_live: IsLive, report: SyncReport) -> bool:
    """Whether the journal had an earlier word of an address than the store has.

    What the store has confirmed and the journal was not told any more is later; what the journal calls dirty is
    later than that, unless the journal itself is from before. An endpoint that is there is what counts in any case.
    """
    is_used = (
        held.record is not None and held.state is AddressState.ASSIGNED and is_live(held.ip, held.record)
    )
    if is_used and held.record is not None and not _same_owner(held.record, record):
        return False
    if report.behind and held.state is AddressState.WARM:
        return True  # somebody may have had it since
    return held.record != record and revision > held.revision and (report.behind or not held.dirty)


def _same_owner(one: Address, other: Address) -> bool:
    return (one.state, one.container_id, one.ifname) == (other.state, other.container_id, other.ifname)


def _complete(holdings: Holdings, held: Held, record: Address | None, is_live: IsLive) -> None:
    """What the kernel did not say of an address that an endpoint has."""
    assert held.record is not None, "what is carried has a record"
    held.carried = False
    if record is not None and record.node == holdings.node and _same_owner(held.record, record):
        held.record = record
        is_live(held.ip, record)  # its endpoint may have lost what this says
        return
    pool = holdings.catalogue.pool_of(held.ip)
    uid = record.uid if record is not None and record.node == holdings.node and record.state.is_taken else ""
    held.record = held.record.with_(pool=pool.name if pool is not None else "", uid=uid)


def _assert_or_drop(holdings: Holdings, held: Held, report: SyncReport, *, rewound: bool) -> None:
    """The store knows nothing of it."""
    cools = rewound and held.state is AddressState.COOLING and not held.is_withdrawn
    if _is_taken(held) or cools or (held.lent and held.ip not in holdings.asking):
        # Somebody uses it, or did just now, or an ADD is about to.
        report.asserted.append(held.ip)
        held.revision, held.told = 0, ()
        holdings.shelf.want(held, held.record)
    else:
        holdings.drop(held, reusable=True)


def _leave_unreadable(holdings: Holdings, held: Held) -> None:
    """Nobody can say whose it is: what uses it goes on, nothing is written over it, nobody new gets it."""
    if _is_taken(held):
        holdings.shelf.rest(held)
    else:
        holdings.drop(held, reusable=False)
        holdings.foreign(held.ip)


def _is_taken(held: Held) -> bool:
    return held.state is not None and held.state.is_taken


def _confirmed(holdings: Holdings, held: Held, revision: int) -> None:
    cools = not held.dirty and held.ready_at is not None
    holdings.shelf.confirm(held, revision, held.record)
    if not cools:
        holdings.settle(held)


def _take_over(
    holdings: Holdings,
    ip: IPAddress,
    record: Address,
    revision: int,
    is_live: IsLive,
    report: SyncReport,
    *,
    rewound: bool,
) -> None:
    live = is_live(ip, record)
    held = Held(ip, record, revision, told=netgroups_told(record))
    holdings.shelf.add(held)
    holdings.note_use(record)
    if live:
        report.adopted.append(ip)
    elif rewound:
        report.released.append(ip)
        holdings.shelf.want(held, None)
    elif record.state is AddressState.COOLING:
        holdings.settle(held)
    else:
        # Also a warm one: an agent whose journal is lost may have given it to a container just ended.
        report.released.append(ip)
        holdings.shelf.want(held, doubtful(record))
