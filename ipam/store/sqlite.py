"""The embedded store: one SQLite file that the agent, the CLI and the listener share.

    event loop                          threads
    get, page, watch, read-only txn --> reader --+
    txn, lease, renewal             --> writer --+--> store.db (WAL: a reader never waits for a writer)
    watches                         <-- pulse  --+

Each thread has one connection. Watches are woken at once by this process's writes, and by the pulse when
another process committed. The pulse beats from the first watch on; without one nothing runs while idle.

There is no server to expire leases: whoever writes, reads or watches deletes the keys of leases that are
over, so they vanish for everybody although their owner died. The rules are in sqlite_mvcc.py, the file and
its errors in sqlite_file.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

from ipam.errors import StoreError, StoreUnavailable
from ipam.store import rules
from ipam.store import sqlite_mvcc as mvcc
from ipam.store.base import Event, KeyValue, Page, Standing, Txn, TxnResult, WatchBatch, prefix_end
from ipam.store.gate import Gate
from ipam.store.sqlite_file import Database, open_database
from ipam.store.sqlite_mvcc import Clock
from ipam.supervision import Job, Supervision
from ipam.worker import Worker

T = TypeVar("T")

BEAT = 0.05
"""Seconds between two looks for other processes' writes. Watches promise 100 ms; a look on a thread of its
own costs 0.1 ms of an idle processor (on the event loop it would be three times that)."""

RETRY = 0.25
"""Seconds before something in the background that failed is tried again."""

RENEWALS = 3
"""Renewals of a lease within its time to live: two may fail before it is lost."""

_AFTER_ASCII = "\x80"


class SqliteStore:
    """See ipam.store.base.Store for what it promises."""

    def __init__(self, path: Path, reader: _Desk, writer: _Desk, supervision: Supervision) -> None:
        self._path = path
        self._supervision = supervision
        self._reader = reader
        self._writer = writer
        self._clock = Clock.of_this_boot()
        self._closed = False
        self._watches: dict[asyncio.Event, tuple[str, str]] = {}
        self._pulse = _Pulse(path, self._clock, self._wake_watches)
        self._beating: asyncio.Task[None] | None = None
        self._keepers: set[asyncio.Task[None]] = set()
        self._expiry = _Expiry(self._clock)
        self._gate = Gate()

    @classmethod
    async def open(cls, path: Path, supervision: Supervision | None = None) -> SqliteStore:
        """Open the store at ``path``, made if there is none; see open_store. Raises StoreError, StoreUnavailable."""
        writer = await _Desk.open("moorage-store-writer", lambda: open_database(path))
        try:
            reader = await _Desk.open("moorage-store-reader", lambda: Database(path))
        except BaseException:
            await writer.close()
            raise
        return cls(path, reader, writer, supervision or Supervision())

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
        if written := rules.written(txn):
            return await self._write(lambda db: mvcc.run(db, txn), written)
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

    async def standing(self) -> Standing:
        device, inode = self._reader.identity
        revision = await self._read(mvcc.current)
        return Standing(
            cluster=f"{device:x}-{inode:x}", term=0, revision=revision, surplus=0, surplus_at_most=0
        )

    def verify_with(self, verify: Callable[[], Awaitable[None]]) -> None:
        self._gate.verify_with(verify)

    def reconnect(self) -> None:
        """A file is where it is."""

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake_watches()
        await self._gate.close()
        keepers = list(self._keepers)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
            await self._reader.run(self._pulse.join)
        await self._reader.close()
        await self._writer.close()

    # --- reading and writing

    async def _read(self, job: Callable[[Connection], T]) -> T:
        self._check_open()
        await self._gate.passed()

        def read(database: Database) -> tuple[T, bool]:
            with database.reading() as db:
                if self._clock.now() < mvcc.next_deadline(db, self._clock):
                    return job(db), False
            expired = self._expiry.attempt(database)
            with database.reading() as db:
                return job(db), expired

        answer, expired = await self._reader.run(read)
        if expired:
            self._wake_watches()
        return answer

    async def _write(self, job: Callable[[Connection], T], keys: Collection[str] | None = None) -> T:
        """keys: those it may change, if that is known; watches of others are not woken for it."""
        self._check_open()
        await self._gate.passed()

        def write(database: Database) -> tuple[T, bool]:
            with database.writing() as db:
                expired = mvcc.expire(db, self._clock)
                return job(db), expired

        answer, expired = await self._writer.run(write)
        self._wake_watches(None if expired else keys)
        return answer

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the store {self._path} was closed by this process; open it again")

    # --- watching

    async def _watch(self, start: str, end: str, revision: int) -> AsyncIterator[WatchBatch]:
        wake = asyncio.Event()
        self._watches[wake] = (start, end)
        if self._beating is None:
            self._beating = self._supervision.start("store pulse", self._pulse.run)
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
            del self._watches[wake]

    async def _events(self, start: str, end: str, revision: int) -> tuple[tuple[Event, ...], int]:
        """Those since ``revision``, once the store can be read."""
        while not self._closed:
            try:
                return await self._read(lambda db: mvcc.events(db, start, end, revision))
            except StoreUnavailable:
                await asyncio.sleep(RETRY)
        return (), revision - 1

    def _wake_watches(self, keys: Collection[str] | None = None) -> None:
        """keys: what changed, None for anything."""
        for wake, (start, end) in self._watches.items():
            if keys is None or any(start <= key < end for key in keys):
                wake.set()

    # --- leases

    async def renew(self, lease: int, ttl: float) -> float | None:
        """For SqliteLease: the new deadline, None if the lease is gone."""
        return await self._write(lambda db: mvcc.renew(db, lease, ttl, self._clock))

    async def revoke(self, lease: int) -> None:
        """For SqliteLease."""
        await self._write(lambda db: mvcc.revoke(db, lease))

    def keep(self, name: str, work: Job, *, longest: float) -> asyncio.Task[None]:
        """For SqliteLease: supervise its keep-alive, and have it end with the store."""
        task = self._supervision.start(name, work, longest=longest, ends=True)
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)
        return task

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
        self._keeper = store.keep(f"lease {lease}", self._keep_alive, longest=ttl / RENEWALS)

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


class _Expiry:
    """Expires leases on the way, on a thread that has something else to do."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._not_before = 0.0

    def attempt(self, database: Database) -> bool:
        """Delete the keys of leases that are over; whether there were any.

        Does not wait for another writer, who expires them too, nor insist while the disk is full.
        """
        if self._clock.now() < self._not_before:
            return False
        try:
            with database.writing(patient=False) as db:
                return mvcc.expire(db, self._clock)
        except StoreUnavailable:
            self._not_before = self._clock.now() + RETRY
            return False


class _Pulse:
    """A thread that looks for other processes' writes and for leases that are over."""

    def __init__(self, path: Path, clock: Clock, on_change: Callable[[], None]) -> None:
        """on_change: called on the event loop that ``run`` runs on."""
        self._path = path
        self._clock = clock
        self._on_change = on_change
        self._thread: threading.Thread | None = None

    async def run(self) -> None:
        """Until cancelled; the thread ends soon after. Raises what ended the thread."""
        beats = _Beats(asyncio.get_running_loop(), self._on_change)
        # Not of an executor, which a process that ends without closing the store would wait for.
        self._thread = threading.Thread(
            target=self._run, args=(beats,), name="moorage-store-pulse", daemon=True
        )
        self._thread.start()
        try:
            await beats.ended
        finally:
            beats.stopped.set()

    def join(self, _: Database) -> None:
        """Wait for the thread's end; not to be called on the event loop."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, beats: _Beats) -> None:
        while not beats.stopped.is_set():
            try:
                # Watches meet a store's error in their own reads; here is nobody to tell.
                with contextlib.suppress(StoreError), contextlib.closing(Database(self._path)) as database:
                    self._beat(database, beats)
            except Exception as error:
                beats.end(error)
                return
            beats.stopped.wait(RETRY)

    def _beat(self, database: Database, beats: _Beats) -> None:
        expiry = _Expiry(self._clock)
        changed = True  # since whatever the watches saw before this connection was there
        deadline = 0.0
        while True:
            if changed:
                beats.tell()
                with database.reading() as db:
                    deadline = mvcc.next_deadline(db, self._clock)
            if beats.stopped.wait(BEAT):
                return
            changed = database.changed()
            if self._clock.now() >= deadline:
                changed = expiry.attempt(database) or changed


class _Beats:
    """What a pulse's thread and the event loop tell each other."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]) -> None:
        self._loop = loop
        self._on_change = on_change
        self.stopped = threading.Event()
        self.ended: asyncio.Future[None] = loop.create_future()

    def tell(self) -> None:
        """Something changed; from the thread."""
        self._call(self._on_change)

    def end(self, error: Exception) -> None:
        """The thread ends of that; from the thread."""
        self._call(lambda: self._fail(error))

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def _call(self, what: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self.stopped.set()  # and nobody closed the store


class _Desk:
    """A connection, and the one thread that opens, uses and closes it."""

    def __init__(self, name: str) -> None:
        self._thread = Worker(name)
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

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        return self._database.identity

    async def run(self, job: Callable[[Database], T]) -> T:
        """Do a job on the thread, after those that were asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, job, self._database)

    async def close(self) -> None:
        await self.run(Database.close)
        self._thread.shutdown()
