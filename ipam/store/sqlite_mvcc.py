"""Keys, their versions and leases in SQLite tables: the store's semantics, with no file and no thread.

Every value a key ever had is a row of ``versions`` with the revisions between which it stood:

    key              revision  ended  value
    addresses/4/0a…  7         9      warm        as of revision 8 the key was warm
    addresses/4/0a…  9         12     assigned    revision 9 changed it, revision 12 deleted it
    networks/web     8         -      {…}         still stands

So what stood at revision R is ``revision <= R < ended``, what R changed is ``revision = R`` or ``ended =
R``, and forgetting history is deleting rows that ended long ago. The tables are in sqlite_file.py.

All functions run inside a transaction that the caller began; those that change anything need a write
transaction, and call ``expire`` first.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ipam.boottime import boottime
from ipam.errors import Compacted, StoreError
from ipam.store.base import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    OpResult,
    Page,
    Put,
    Txn,
    TxnResult,
)

HISTORY = 50_000
"""Versions kept after they ended: some 25 MB at half a kilobyte each, and 100 s for a watch or a listing to
fall behind at 500 changes a second. Counted in versions, so that large transactions cannot bloat the file."""

COMPACT_EVERY = 256
"""Revisions between two looks at how much history there is: a look costs 2 ms when there is all of it."""

SWEEP = 512
"""Forgotten versions removed by one write: 5 ms at most, and more than writes usually leave."""

BATCH = 1000
"""Events after which a watch's batch ends, at the next whole revision."""

_KEY_VALUE = "key, value, created, revision, lease"
_KEY_ONLY = "key, x'', created, revision, lease"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Clock:
    """Time that all processes of one boot share, and that neither suspend nor NTP disturbs."""

    boot_id: str

    @classmethod
    def of_this_boot(cls) -> Clock:
        return cls(_BOOT_ID.read_text().strip())

    def now(self) -> float:
        """Seconds since boot."""
        return boottime() / 1e9


# --- reading -----------------------------------------------------------------------------------------


def current(db: sqlite3.Connection) -> int:
    """The revision of the last write."""
    return _meta(db, "revision")


def get(db: sqlite3.Connection, key: str) -> KeyValue | None:
    row = db.execute(f"SELECT {_KEY_VALUE} FROM versions WHERE key = ? AND ended IS NULL", (key,)).fetchone()
    return KeyValue(*row) if row else None


def page(db: sqlite3.Connection, start: str, end: str, *, limit: int, revision: int, keys_only: bool) -> Page:
    """See Store.page."""
    last = current(db)
    at = revision or last
    _check_kept(db, at)
    if at > last:
        raise StoreError(
            f"revision {at} was asked for and the store is at {last}: it went back in time; list again"
        )
    columns = _KEY_ONLY if keys_only else _KEY_VALUE
    if at == last:
        source = "versions INDEXED BY live WHERE ended IS NULL"
    else:
        source = "versions WHERE revision <= :at AND (ended IS NULL OR ended > :at)"
    rows = db.execute(
        f"SELECT {columns} FROM {source} AND key >= :start AND key < :end ORDER BY key LIMIT :limit",
        {"at": at, "start": start, "end": end, "limit": limit + 1},
    ).fetchall()
    next_key = rows.pop()[0] if len(rows) > limit else None
    return Page(tuple(KeyValue(*row) for row in rows), at, next_key)


_EVENTS = f"""
    SELECT revision, 0, {_KEY_VALUE} FROM versions INDEXED BY by_revision
     WHERE revision BETWEEN :first AND :last AND key >= :start AND key < :end
    UNION ALL
    SELECT ended, 1, {_KEY_ONLY} FROM versions AS old INDEXED BY by_end
     WHERE ended BETWEEN :first AND :last AND ended IS NOT NULL AND key >= :start AND key < :end
       AND NOT EXISTS (SELECT 1 FROM versions AS new WHERE new.key = old.key AND new.revision = old.ended)
    ORDER BY 1, 3
"""


def events(db: sqlite3.Connection, start: str, end: str, from_revision: int) -> tuple[tuple[Event, ...], int]:
    """What happened in [start, end) since ``from_revision``, and the revision up to which that is all.

    About BATCH events at most, and only whole revisions. Raises Compacted.
    """
    _check_kept(db, from_revision)
    last = current(db)
    bounds = {"first": from_revision, "last": last, "start": start, "end": end}
    found: list[Event] = []
    with contextlib.closing(db.execute(_EVENTS, bounds)) as cursor:
        for revision, gone, *row in cursor:
            if len(found) >= BATCH and revision > found[-1].revision:
                return tuple(found), found[-1].revision
            found.append(Event(row[0], revision, None if gone else KeyValue(*row)))
    return tuple(found), max(last, from_revision - 1)


# --- transactions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decided:
    """A transaction whose compares have been looked at: only what will run is left."""

    held: bool
    ops: tuple[Put | Delete | Get | _Decided, ...]


def run(db: sqlite3.Connection, txn: Txn) -> TxnResult:
    """Run a transaction that passed ``rules.check``. Raises StoreError if it puts on a lease that is gone.

    As in etcd all compares, nested ones included, see the state before the transaction, and a Get sees
    what the operations before it did.
    """
    decided = _decide(db, txn)
    revision = current(db)
    if _changes_something(db, decided):
        revision += 1
        result = _apply(db, decided, revision)
        _wrote(db, revision)
        return result
    return _apply(db, decided, revision)


def _decide(db: sqlite3.Connection, txn: Txn) -> _Decided:
    held = all(_holds(db, compare) for compare in txn.compares)
    ops = txn.then if held else txn.orelse
    return _Decided(held, tuple(_decide(db, op) if isinstance(op, Txn) else op for op in ops))


def _holds(db: sqlite3.Connection, compare: Compare) -> bool:
    if compare.range_end is None:
        row = db.execute(
            "SELECT revision FROM versions WHERE key = ? AND ended IS NULL", (compare.key,)
        ).fetchone()
        return bool((row[0] if row else 0) == compare.mod_revision)
    row = db.execute(
        "SELECT 1 FROM versions INDEXED BY live WHERE key >= ? AND key < ? AND ended IS NULL LIMIT 1",
        (compare.key, compare.range_end),
    ).fetchone()
    return row is None


def _changes_something(db: sqlite3.Connection, decided: _Decided) -> bool:
    for op in decided.ops:
        match op:
            case Put():
                return True
            case Delete(key):
                if get(db, key) is not None:
                    return True
            case _Decided():
                if _changes_something(db, op):
                    return True
    return False


def _apply(db: sqlite3.Connection, decided: _Decided, revision: int) -> TxnResult:
    results: list[OpResult] = []
    for op in decided.ops:
        match op:
            case Put():
                _put(db, op, revision)
                results.append(None)
            case Delete(key):
                results.append(_end(db, "key = :what", key, revision))
            case Get(key):
                results.append(get(db, key))
            case _Decided():
                results.append(_apply(db, op, revision))
    return TxnResult(decided.held, revision, tuple(results))


def _put(db: sqlite3.Connection, op: Put, revision: int) -> None:
    if op.lease and not db.execute("SELECT 1 FROM leases WHERE id = ?", (op.lease,)).fetchone():
        raise StoreError(
            f"key {op.key} was to be written on lease {op.lease}, which expired or was revoked; "
            "take a new lease"
        )
    before = get(db, op.key)
    if before is not None:
        _end(db, "key = :what", op.key, revision)
    db.execute(
        "INSERT INTO versions (key, revision, created, lease, value) VALUES (?, ?, ?, ?, ?)",
        (op.key, revision, before.create_revision if before else revision, op.lease, op.value),
    )


def _end(db: sqlite3.Connection, condition: str, what: str | int, revision: int) -> int:
    """End the live versions that meet the condition, and say how many did."""
    return db.execute(
        f"UPDATE versions SET ended = :revision WHERE ended IS NULL AND {condition}",
        {"what": what, "revision": revision},
    ).rowcount


def _wrote(db: sqlite3.Connection, revision: int) -> None:
    """To be called once for every new revision."""
    _set_meta(db, "revision", revision)
    if revision % COMPACT_EVERY == 0:
        _forget_surplus(db)
    _sweep(db)


# --- leases ------------------------------------------------------------------------------------------


def grant(db: sqlite3.Connection, ttl: float, clock: Clock) -> tuple[int, float]:
    """A new lease: its id, and its deadline on the clock."""
    deadline = clock.now() + ttl
    cursor = db.execute("INSERT INTO leases (deadline, boot_id) VALUES (?, ?)", (deadline, clock.boot_id))
    assert cursor.lastrowid is not None
    return cursor.lastrowid, deadline


def renew(db: sqlite3.Connection, lease: int, ttl: float, clock: Clock) -> float | None:
    """The lease's new deadline, None if it is gone."""
    deadline = clock.now() + ttl
    renewed = db.execute("UPDATE leases SET deadline = ? WHERE id = ?", (deadline, lease)).rowcount
    return deadline if renewed else None


def revoke(db: sqlite3.Connection, lease: int) -> None:
    """End the lease, if it is there, and delete its keys as one revision."""
    db.execute("DELETE FROM leases WHERE id = ?", (lease,))
    revision = current(db) + 1
    if _end(db, "lease <> 0 AND lease = :what", lease, revision):
        _wrote(db, revision)


def expire(db: sqlite3.Connection, clock: Clock) -> bool:
    """Revoke every lease that is over or of another boot; whether there was one."""
    due = db.execute(
        "SELECT id FROM leases WHERE deadline <= ? OR boot_id <> ? ORDER BY deadline, id",
        (clock.now(), clock.boot_id),
    ).fetchall()
    for (lease,) in due:
        revoke(db, lease)
    return bool(due)


def next_deadline(db: sqlite3.Connection, clock: Clock) -> float:
    """When ``expire`` has something to do: on the clock, infinity if never."""
    row = db.execute(
        "SELECT min(CASE boot_id WHEN ? THEN deadline ELSE 0 END) FROM leases", (clock.boot_id,)
    ).fetchone()
    return math.inf if row[0] is None else float(row[0])


# --- history -----------------------------------------------------------------------------------------


def compact(db: sqlite3.Connection, oldest: int) -> None:
    """Make ``oldest`` the oldest revision that can be read or watched; its rows go in later writes."""
    _set_meta(db, "oldest", min(max(oldest, _meta(db, "oldest")), current(db)))


def _forget_surplus(db: sqlite3.Connection) -> None:
    row = db.execute(
        "SELECT ended FROM versions INDEXED BY by_end WHERE ended IS NOT NULL "
        "ORDER BY ended DESC LIMIT 1 OFFSET ?",
        (HISTORY,),
    ).fetchone()
    if row:
        compact(db, row[0])


def _sweep(db: sqlite3.Connection) -> None:
    db.execute(
        "DELETE FROM versions WHERE (key, revision) IN (SELECT key, revision FROM versions INDEXED BY by_end "
        "WHERE ended IS NOT NULL AND ended < ? LIMIT ?)",
        (_meta(db, "oldest"), SWEEP),
    )


def _check_kept(db: sqlite3.Connection, revision: int) -> None:
    oldest = _meta(db, "oldest")
    if revision < oldest:
        raise Compacted(
            f"the store's revision {revision} is compacted, the oldest kept is {oldest}; "
            "list again and go on from there",
            oldest,
        )


def _meta(db: sqlite3.Connection, name: str) -> int:
    value: int = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0]
    return value


def _set_meta(db: sqlite3.Connection, name: str, value: int) -> None:
    db.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))
