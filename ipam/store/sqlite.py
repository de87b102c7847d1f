"""The embedded store: one SQLite file that the agent, the CLI and the listener share.

    event loop                          threads
    get, page, watch, read-only txn --> reader --+
    poll, every 25 ms while watched --> reader   +--> store.db (WAL: a reader never waits for a writer)
    txn, lease, renewal             --> writer --+

Each thread has one connection. Watches are woken at once by this process's writes, and by the poll when
another process committed. Nothing runs while nothing is watched and no lease is held.

There is no server to expire leases: whoever writes, reads or watches deletes the keys of leases that are
over, so they vanish for everybody although their owner died. The rules are in sqlite_mvcc.py, the file and
its errors in sqlite_file.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

from ipam.errors import StoreError, StoreUnavailable
from ipam.store import rules
from ipam.store import sqlite_mvcc as mvcc
from ipam.store.base import Event, KeyValue, Page, Txn, TxnResult, WatchBatch, prefix_end
from ipam.store.sqlite_file import Database, open_database
from ipam.store.sqlite_mvcc import Clock

T = TypeVar("T")

POLL = 0.025
"""Seconds between two looks for other processes' writes: a quarter of the 100 ms that watches promise."""

RETRY = 0.25
"""Seconds before something in the background that failed is tried again."""

RENEWALS = 3
"""Renewals of a lease within its time to live: two may fail before it is lost."""

_AFTER_ASCII = "\x80"


class SqliteStore:
    """See ipam.store.base.Store for what it promises."""

    def __init__(self, path: Path, reader: _Desk, writer: _Desk) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._clock = Clock.of_this_boot()
        self._closed = False
        self._watches: set[asyncio.Event] = set()
        self._poll: asyncio.Task[None] | None = None
        self._keepers: set[asyncio.Task[None]] = set()
        # These two belong to the reader's thread. Zero: look.
        self._next_deadline = 0.0
        self._no_expiry_before = 0.0

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open the store at ``path``, made if there is none. Raises StoreError, StoreUnavailable."""
        writer = await _Desk.open("moorage-store-writer", lambda: open_database(path))
        try:
            reader = await _Desk.open("moorage-store-reader", lambda: Database(path))
        except BaseException:
            await writer.close()
            raise
        return cls(path, reader, writer)

    async def get(self, key: str) -> KeyValue | None:
        rules.check_key(key)
        return await self._read(lambda db: mvcc.get(db, key))

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        if limit < 1:
            raise ValueError(f"a page of {limit} keys never ends; ask for at least 1")
        return await self._read(
            lambda db: mvcc.page(db, start, end, limit=limit, revision=revision, keys_only=keys_only)
        )

    async def txn(self, txn: Txn) -> TxnResult:
        rules.check(txn)
        if rules.writes(txn):
            return await self._write(lambda db: mvcc.run(db, txn))
        return await self._read(lambda db: mvcc.run(db, txn))

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        if from_revision < 1:
            raise ValueError(f"a watch from revision {from_revision}; revisions start at 1")
        return self._watch(prefix, prefix_end(prefix) if prefix else _AFTER_ASCII, from_revision)

    async def lease(self, ttl: float) -> SqliteLease:
        if ttl <= 0:
            raise ValueError(f"a lease of {ttl} s is over before it began")
        lease, deadline = await self._write(lambda db: mvcc.grant(db, ttl, self._clock))
        return SqliteLease(self, lease, ttl, deadline)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake_watches()
        tasks = [*self._keepers, *([self._poll] if self._poll else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.close()
        await self._writer.close()

    # --- reading and writing

    async def _read(self, job: Callable[[Connection], T]) -> T:
        self._check_open()

        def read(database: Database) -> tuple[T, bool]:
            # Before the snapshot that the answer comes from, so that it shows nothing expired.
            with database.reading() as db:
                deadline = mvcc.next_deadline(db, self._clock)
                if self._clock.now() < deadline:
                    return job(db), False
            expired = self._expire(database)
            with database.reading() as db:
                return job(db), expired

        answer, expired = await self._reader.run(read)
        if expired:
            self._wake_watches()
        return answer

    async def _write(self, job: Callable[[Connection], T]) -> T:
        self._check_open()

        def write(database: Database) -> T:
            with database.writing() as db:
                mvcc.expire(db, self._clock)
                return job(db)

        answer = await self._writer.run(write)
        self._wake_watches()
        return answer

    def _expire(self, database: Database) -> bool:
        """Try to delete the keys of leases that are over; on the reader's thread.

        Does not wait for another writer, which expires them itself, nor insist while the disk is full.
        """
        if self._clock.now() < self._no_expiry_before:
            return False
        try:
            with database.writing(wait=0) as db:
                expired = mvcc.expire(db, self._clock)
                self._next_deadline = mvcc.next_deadline(db, self._clock)
            return expired
        except StoreUnavailable:
            self._no_expiry_before = self._clock.now() + RETRY
            return False

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the store {self._path} was closed by this process; open it again")

    # --- watching

    async def _watch(self, start: str, end: str, revision: int) -> AsyncIterator[WatchBatch]:
        wake = asyncio.Event()
        self._watches.add(wake)
        if self._poll is None:
            self._poll = asyncio.create_task(self._poll_for_changes(), name="moorage-store-poll")
        try:
            while not self._closed:
                wake.clear()
                events, upto = await self._events(start, end, revision)
                if self._closed:
                    return
                if events:
                    yield WatchBatch(events, upto)
                if upto < revision:
                    await wake.wait()
                revision = upto + 1
        finally:
            self._watches.discard(wake)
            if not self._watches and self._poll is not None:
                self._poll.cancel()
                self._poll = None

    async def _events(self, start: str, end: str, revision: int) -> tuple[tuple[Event, ...], int]:
        """Those since ``revision``, once the store can be read."""
        while not self._closed:
            try:
                return await self._read(lambda db: mvcc.events(db, start, end, revision))
            except StoreUnavailable:
                await asyncio.sleep(RETRY)
        return (), revision - 1

    async def _poll_for_changes(self) -> None:
        def look(database: Database) -> bool:
            changed = database.changed()
            if changed or self._next_deadline == 0.0:
                with database.reading() as db:
                    self._next_deadline = mvcc.next_deadline(db, self._clock)
            if self._clock.now() >= self._next_deadline:
                return self._expire(database) or changed
            return changed

        while True:
            try:
                if await self._reader.run(look):
                    self._wake_watches()
                await asyncio.sleep(POLL)
            except StoreError:  # watches meet it too, in their own reads
                await asyncio.sleep(RETRY)

    def _wake_watches(self) -> None:
        for wake in self._watches:
            wake.set()

    # --- leases

    async def renew(self, lease: int, ttl: float) -> float | None:
        """For SqliteLease: the new deadline, None if the lease is gone."""
        return await self._write(lambda db: mvcc.renew(db, lease, ttl, self._clock))

    async def revoke(self, lease: int) -> None:
        """For SqliteLease."""
        await self._write(lambda db: mvcc.revoke(db, lease))

    def keep(self, task: asyncio.Task[None]) -> None:
        """For SqliteLease: have its keep-alive end with the store."""
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    def now(self) -> float:
        """The time that leases are measured in."""
        return self._clock.now()


class SqliteLease:
    """See ipam.store.base.Lease."""

    def __init__(self, store: SqliteStore, lease: int, ttl: float, deadline: float) -> None:
        self._store = store
        self._id = lease
        self._ttl = ttl
        self._deadline = deadline
        self._gone = False
        self._keeper = asyncio.create_task(self._keep_alive(), name=f"moorage-lease-{lease}")
        store.keep(self._keeper)

    @property
    def id(self) -> int:
        return self._id

    @property
    def alive(self) -> bool:
        # The deadline is the one that stands in the store, on the clock that everybody judges it by.
        return not self._gone and self._store.now() < self._deadline

    async def revoke(self) -> None:
        await self._stop()
        self._gone = True
        await self._store.revoke(self._id)

    async def abandon(self) -> None:
        await self._stop()

    async def _stop(self) -> None:
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep_alive(self) -> None:
        pause = self._ttl / RENEWALS
        while True:
            await asyncio.sleep(pause)
            try:
                deadline = await self._store.renew(self._id, self._ttl)
                pause = self._ttl / RENEWALS
            except StoreError:
                pause = min(RETRY, self._ttl / RENEWALS)
                continue
            if deadline is None:
                self._gone = True
                return
            self._deadline = deadline


class _Desk:
    """A connection, and the one thread that opens, uses and closes it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._database: Database

    @classmethod
    async def open(cls, name: str, connect: Callable[[], Database]) -> _Desk:
        """Raises what ``connect`` raises."""
        desk = cls(name)
        try:
            desk._database = await asyncio.get_running_loop().run_in_executor(desk._thread, connect)
        except BaseException:
            desk._thread.shutdown(wait=False)
            raise
        return desk

    async def run(self, job: Callable[[Database], T]) -> T:
        """Do a job on the thread, after those that were asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, job, self._database)

    async def close(self) -> None:
        await self.run(Database.close)
        self._thread.shutdown()
