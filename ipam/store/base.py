"""The store: a small asynchronous key-value interface modelled on etcd v3.

Keys are text below a prefix the store was opened with; values are bytes. Every successful write
transaction raises one store-wide *revision*; each key remembers the revision that last wrote it
(``mod_revision``). That number is the compare-and-swap token everywhere in moorage.

    result = await store.txn(Txn(
        compares=(absent("addresses/4/0a400001"),),
        then=(Put("addresses/4/0a400001", value),),
        orelse=(Get("addresses/4/0a400001"),),
    ))
    if not result.succeeded:
        holder = result.results[0]          # KeyValue of whoever was faster

Contract, checked by one test suite for every implementation (tests/ipam/store/):

- A transaction is atomic; all keys it writes get the same ``mod_revision``, ``result.revision``. A
  transaction that writes nothing does not raise the revision.
- A nested ``Txn`` among ``then``/``orelse`` has a verdict of its own: a failed nested compare undoes
  nothing outside it. All compares, nested ones too, see the state before the transaction; a Get sees what
  the operations before it wrote.
- A key is written at most once per transaction, nested ones included: ``ValueError`` otherwise, as etcd
  refuses it. At most MAX_OPS operations, nested ones counted: ``ValueError``. Both exactly: rules.py.
- ``txn`` raises ``Ambiguous`` when the outcome is unknown, ``StoreUnavailable`` when it is known not to
  have been applied. Implementations never retry a transaction by themselves.
- Keys on a lease vanish when the lease expires or is revoked, as one revision.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

MAX_OPS = 128
"""Operations in one transaction, nested ones counted: etcd's default ``--max-txn-ops``."""

SCAN_PAGE = 5000
"""Keys in a page of a scan. For every page etcd counts all that is left of the range, so many small ones of a large
range take longer than reading it: 100,000 keys took 1.9 s by 1,000 and 0.7 s by 5,000."""

IN_A_ROW = 500
"""Keys of a page that are dealt with before others on the event loop have their turn: an ADD waits for some of them."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it stood at some revision."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds if ``key`` was last written at ``mod_revision`` (0: absent).

    With ``range_end`` (exclusive) it holds if that is true of *every* key in [key, range_end); only
    absence (``mod_revision`` 0, "no key in here") is meaningful and allowed there.
    """

    key: str
    mod_revision: int
    range_end: str | None = None


def unchanged(kv: KeyValue) -> Compare:
    """The key still stands as read."""
    return Compare(kv.key, kv.mod_revision)


def absent(key: str) -> Compare:
    """The key does not exist."""
    return Compare(key, 0)


def none_between(start: str, end: str) -> Compare:
    """No key exists in [start, end)."""
    return Compare(start, 0, end)


def prefix_end(prefix: str) -> str:
    """The end (exclusive) of the key range that starts with ``prefix``; keys are ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key; on a lease if ``lease`` is not 0. Its result is None."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key. Its result is the number of keys deleted (0 or 1)."""

    key: str


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key inside the transaction. Its result is a KeyValue, or None if absent."""

    key: str


@dataclass(frozen=True, slots=True)
class Txn:
    """If all ``compares`` hold do ``then``, else ``orelse``. Nested, its result is a TxnResult."""

    compares: tuple[Compare, ...] = ()
    then: tuple[Op, ...] = ()
    orelse: tuple[Op, ...] = ()


Op: TypeAlias = Put | Delete | Get | Txn


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What a transaction did. ``results`` has one entry per operation of the branch that ran."""

    succeeded: bool
    revision: int
    results: tuple[OpResult, ...]


OpResult: TypeAlias = KeyValue | int | TxnResult | None


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a range, in key order. ``next_key`` is where the next page starts, None on the last."""

    items: tuple[KeyValue, ...]
    revision: int
    next_key: str | None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a store's history stands. Of one history term, revision and surplus never go back.

    cluster: names the servers that have it, or the file. term: raft's, 0 of a file.
    surplus, surplus_at_most: entries in the servers' log beyond one for each revision, at least and at most, since they
    cannot be read in one moment. A backup has the revisions and not the log, so that of a store restored from one is
    lower, whatever was done to its revision.
    """

    cluster: str
    term: int
    revision: int
    surplus: int
    surplus_at_most: int


@dataclass(frozen=True, slots=True)
class Event:
    """One change: ``kv`` is None for a deletion."""

    key: str
    revision: int
    kv: KeyValue | None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All changes below the watched prefix of one or more whole revisions, oldest first.

    A revision is never split between batches. ``revision`` is where the watch has got to.
    """

    events: tuple[Event, ...]
    revision: int


class Lease(Protocol):
    """A time to live shared by the keys put on it. Kept alive by the store until closed."""

    @property
    def id(self) -> int: ...

    @property
    def alive(self) -> bool:
        """False once the lease is known, or has to be assumed, to have expired."""
        ...

    async def revoke(self) -> None:
        """End the lease and delete its keys now."""
        ...

    async def abandon(self) -> None:
        """Stop keeping it alive without deleting its keys: they vanish when the time is up."""
        ...


class Store(Protocol):
    """See the module's docstring. Safe for concurrent use from one event loop."""

    async def get(self, key: str) -> KeyValue | None:
        """The key as it stands now (linearizable). Raises StoreUnavailable."""
        ...

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        """Up to ``limit`` keys of [start, end) at ``revision`` (0: now).

        Pages of one range ask for the revision that the first page returned. Raises Compacted,
        StoreUnavailable.
        """
        ...

    async def txn(self, txn: Txn) -> TxnResult:
        """Run a transaction. Raises Ambiguous, StoreUnavailable, ValueError."""
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        """Changes below ``prefix`` from ``from_revision`` (inclusive) on, for ever.

        Survives lost connections by itself. Raises Compacted when ``from_revision`` is gone.
        """
        ...

    async def lease(self, ttl: float) -> Lease:
        """A lease that expires ``ttl`` seconds after its last renewal."""
        ...

    async def standing(self) -> Standing:
        """Where the history stands of who answers now. Raises StoreError, StoreUnavailable."""
        ...

    def verify_with(self, verify: Callable[[], Awaitable[None]]) -> None:
        """Have ``verify`` called before anything else is sent over a connection that is new; gate.py."""
        ...

    def reconnect(self) -> None:
        """Calls made from now on go over new connections: this machine's address changed, and what comes to the
        old one is lost. What is in flight ends as it would have."""
        ...

    async def close(self) -> None:
        """Release connections and files; running watches end."""
        ...


async def scan(store: Store, start: str, end: str) -> AsyncIterator[KeyValue]:
    """All of [start, end) at one revision, in order, a page in memory at a time. For ranges that may be large.

    Raises Compacted, StoreUnavailable.
    """
    async for page in pages(store, start, end):
        for number, kv in enumerate(page.items):
            if number % IN_A_ROW == 0:
                await asyncio.sleep(0)
            yield kv


async def pages(store: Store, start: str, end: str) -> AsyncIterator[Page]:
    """All of [start, end) at one revision, page by page; see ``scan``."""
    cursor: str | None = start
    revision = 0
    while cursor is not None:
        page = await store.page(cursor, end, limit=SCAN_PAGE, revision=revision)
        yield page
        cursor, revision = page.next_key, page.revision


async def read_range(
    store: Store, start: str, end: str, *, limit: int = 1000, keys_only: bool = False
) -> tuple[Sequence[KeyValue], int]:
    """The whole of [start, end) at one revision, and that revision. For ranges known to be small."""
    items: list[KeyValue] = []
    page = await store.page(start, end, limit=limit, keys_only=keys_only)
    items.extend(page.items)
    while page.next_key is not None:
        page = await store.page(page.next_key, end, limit=limit, revision=page.revision, keys_only=keys_only)
        items.extend(page.items)
    return items, page.revision


async def read_prefix(store: Store, prefix: str) -> tuple[Sequence[KeyValue], int]:
    """All keys below ``prefix`` at one revision, and that revision."""
    return await read_range(store, prefix, prefix_end(prefix))
