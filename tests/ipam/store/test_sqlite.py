"""The SQLite store only: its file, its threads, and what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ipam.errors import Ambiguous, Compacted, StoreError, StoreUnavailable
from ipam.store import Delete, Put, Store, Txn, open_store, read_prefix, sqlite_file
from ipam.store import sqlite_mvcc as mvcc
from ipam.store.sqlite_file import Database, translated
from tests.ipam.faulty import eventually
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moorage" / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite://{path}")
    yield store
    await store.close()


async def put(store: Store, *keys: str, value: bytes = b"") -> int:
    return (await store.txn(Txn(then=tuple(Put(key, value) for key in keys)))).revision


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def content(path: Path) -> bytes:
    """Only of files that this process has no store open on: see sqlite_file.py on POSIX locks."""
    return path.read_bytes()


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


async def made(path: Path, keys: int = 0) -> None:
    """A store with some keys, closed again."""
    store = await open_store(f"sqlite://{path}")
    for start in range(0, keys, 100):
        await put(store, *(f"k/{i:06}" for i in range(start, start + 100)), value=b"v" * 200)
    await store.close()


# --- the file


async def test_only_its_owner_can_read_it(store: Store, path: Path) -> None:
    await put(store, "a")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert files == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}


async def test_a_confirmed_transaction_is_on_the_disk(path: Path) -> None:
    await made(path)
    with contextlib.closing(Database(path)) as database:
        assert database.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.connection.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_it_is_there_again_after_a_restart(path: Path) -> None:
    await made(path, keys=100)
    store = await open_store(f"sqlite://{path}")
    items, revision = await read_prefix(store, "k/")
    assert (len(items), revision) == (100, items[0].mod_revision)
    await store.close()


def foreign(path: Path) -> None:
    path.write_bytes(b"this is a letter and no database\n" * 100)


def foreign_database(path: Path) -> None:
    path.unlink()
    with raw(path) as db:
        db.execute("CREATE TABLE songs (title)")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribbled_in(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        for offset in range(8192, size, 16384):
            file.seek(offset)
            file.write(os.urandom(2048))


def header_lost(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


@pytest.mark.parametrize(
    "damage",
    [foreign, foreign_database, emptied, truncated, scribbled_in, header_lost],
    ids=lambda f: f.__name__,
)
async def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(path: Path, damage) -> None:
    await made(path, keys=2000)
    damage(path)
    before = content(path)
    with pytest.raises(StoreError) as caught:
        await open_store(f"sqlite://{path}")
    assert not isinstance(caught.value, StoreUnavailable)
    assert str(path) in str(caught.value)
    assert f"mv {path}* {path.parent}/damaged/" in str(caught.value)
    assert content(path) == before
    assert set(os.listdir(path.parent)) == {"store.db"}


async def test_a_newer_schema_is_refused_by_name(path: Path) -> None:
    await made(path)
    with raw(path) as db:
        db.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
    with pytest.raises(StoreError, match=r"newer moorage \(schema 99, this one knows 1\)") as caught:
        await open_store(f"sqlite://{path}")
    assert str(path) in str(caught.value)


async def test_a_log_without_its_file_is_not_thrown_away(path: Path) -> None:
    store = await open_store(f"sqlite://{path}")
    await put(store, "a")
    log = path.with_name("store.db-wal")
    kept = content(log)
    await store.close()
    os.unlink(path)
    overwrite(log, kept)
    with pytest.raises(StoreError, match="put both back"):
        await open_store(f"sqlite://{path}")
    assert content(log) == kept
    assert os.listdir(path.parent) == [log.name]


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=f"{tmp_path}/file/store.db"):
        await open_store(f"sqlite://{tmp_path}/file/store.db")
    (tmp_path / "directory").mkdir()
    with pytest.raises(StoreUnavailable, match="cannot be read or written"):
        await open_store(f"sqlite://{tmp_path}/directory")


async def test_a_log_removed_while_in_use_is_noticed_and_a_restart_keeps_what_was_written(
    store: Store, path: Path
) -> None:
    await put(store, "a")
    path.with_name(f"{path.name}-wal").unlink()
    for attempt in (store.get("a"), put(store, "b"), store.page("a", "b")):
        with pytest.raises(StoreUnavailable, match=r"write-ahead log store\.db-wal .* was removed"):
            await attempt
    await store.close()
    again = await open_store(f"sqlite://{path}")
    try:
        assert await again.get("a") is not None
        await put(again, "b")
    finally:
        await again.close()


async def test_a_file_moved_while_in_use_is_noticed_until_it_is_back(store: Store, path: Path) -> None:
    await put(store, "a")
    aside = path.with_name("aside.db")
    os.rename(path, aside)
    for attempt in (store.get("a"), put(store, "a"), store.page("a", "b")):
        with pytest.raises(StoreUnavailable, match="moved or replaced"):
            await attempt
    overwrite(path, b"another one")
    with pytest.raises(StoreUnavailable, match="moved or replaced"):
        await put(store, "a")
    os.rename(aside, path)
    await put(store, "a")


def test_a_disk_that_fails_within_the_commit_leaves_the_outcome_open() -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    with pytest.raises(Ambiguous), translated(Path("/s"), committing=True):
        raise error
    with pytest.raises(StoreUnavailable) as caught, translated(Path("/s")):
        raise error
    assert not isinstance(caught.value, Ambiguous)


# --- a full disk, in a file system of its own

FULL_DISK = """
import asyncio, os, sys
from ipam.errors import Ambiguous, StoreUnavailable
from ipam.store import Put, Txn, open_store

async def main():
    store = await open_store("sqlite://" + sys.argv[1] + "/store.db")
    await store.txn(Txn(then=(Put("a", b"before"),)))
    lease = await store.lease(0.2)
    await store.txn(Txn(then=(Put("leased", b"", lease.id),)))
    await lease.abandon()
    with open(sys.argv[1] + "/ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    refused = applied = 0
    for i in range(300):
        try:
            await store.txn(Txn(then=(Put("a", b"%d" % i + bytes(20000)),)))
            applied = i
        except Ambiguous:
            raise
        except StoreUnavailable as error:
            refused += 1
            assert "is full" in str(error), error
            assert refused > 1 or print(error) is None
    assert refused > 200, refused
    found = await store.get("a")
    assert found.value.rstrip(b"\\0") in (b"before", b"%d" % applied), found.value[:10]
    await asyncio.sleep(0.3)
    await store.get("leased")
    os.unlink(sys.argv[1] + "/ballast")
    await store.txn(Txn(then=(Put("a", b"after"),)))
    assert (await store.get("a")).value == b"after"
    assert await store.get("leased") is None
    await store.close()
    store = await open_store("sqlite://" + sys.argv[1] + "/store.db")
    assert (await store.get("a")).value == b"after"
    await store.close()
    print("survived")

asyncio.run(main())
"""


@pytest.mark.kernel
def test_a_full_disk_refuses_writes_and_space_brings_them_back(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=1m none "$0" && exec "$1" -c "$2" "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, str(tmp_path), sys.executable, FULL_DISK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.endswith("survived\n"), done.stdout + done.stderr


# --- other processes


async def test_a_stuck_writer_makes_the_store_unavailable_but_readable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT", 0.3)
    store = await open_store(f"sqlite://{path}")
    await put(store, "a", value=b"before")
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"locked by another process.*fuser"):
            await put(store, "a")
        assert time.monotonic() - began > 0.25
        assert (await store.get("a")).value == b"before"
        other.execute("ROLLBACK")
    await put(store, "a", value=b"after")
    assert (await store.get("a")).value == b"after"
    await store.close()


async def test_the_event_loop_and_readers_go_on_while_a_writer_waits(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT", PATIENCE)
    store = await open_store(f"sqlite://{path}")
    await put(store, "a")
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(put(store, "a"))
        await asyncio.sleep(0.01)
        for _ in range(50):
            await store.get("a")
            await asyncio.sleep(0.002)
        assert not writing.done()
        other.execute("ROLLBACK")
    await asyncio.wait_for(writing, PATIENCE)
    await store.close()


# --- leases


async def test_leases_of_another_boot_are_over(store: Store, path: Path) -> None:
    lease = await store.lease(1000)
    revision = (await store.txn(Txn(then=(Put("alive/node", b"", lease.id),)))).revision
    watch = store.watch("alive/", revision + 1)
    coming = asyncio.ensure_future(anext(watch))
    with raw(path) as db:
        db.execute("UPDATE leases SET boot_id = 'an earlier one'")
    batch = await asyncio.wait_for(coming, PATIENCE)
    assert [(event.key, event.kv) for event in batch.events] == [("alive/node", None)]
    assert await store.get("alive/node") is None


@pytest.mark.kernel
async def test_a_command_in_a_time_namespace_ends_no_lease(store: Store, path: Path) -> None:
    lease = await store.lease(30)
    await store.txn(Txn(then=(Put("k", b"", lease.id),)))
    reading = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom ipam.store.sqlite import SqliteStore\n"
        "async def read():\n    store = await SqliteStore.open(Path(sys.argv[1]))\n"
        "    print(await store.get('k') is not None)\n    await store.close()\nasyncio.run(read())"
    )
    unshare = ("unshare", "--time", "--boottime", "100000", sys.executable, "-c", reading, str(path))
    shown = await asyncio.to_thread(subprocess.run, unshare, capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("True\n", "")
    assert await store.get("k") is not None


async def test_a_read_shows_nothing_expired_though_nobody_watches(store: Store, path: Path) -> None:
    lease = await store.lease(1000)
    await store.txn(Txn(then=(Put("a", b"", lease.id),)))
    with raw(path) as db:
        db.execute("UPDATE leases SET deadline = 0")
    assert (await store.page("a", "b")).items == ()


# --- history


async def test_history_is_bounded_and_forgotten_in_passing(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvcc, "HISTORY", 200)
    monkeypatch.setattr(mvcc, "COMPACT_EVERY", 10)
    start = await put(store, "k/kept")
    for i in range(150):
        await put(store, *(f"k/{n}" for n in range(5)), value=str(i).encode())
    await store.txn(Txn(then=(Delete("k/0"),)))
    with raw(path) as db:
        (ended,) = db.execute("SELECT count(*) FROM versions WHERE ended IS NOT NULL").fetchone()
        (oldest,) = db.execute("SELECT value FROM meta WHERE name = 'oldest'").fetchone()
    assert 200 <= ended <= 300
    with pytest.raises(Compacted) as caught:
        await anext(store.watch("k/", start))
    assert caught.value.compact_revision == oldest
    batch = await anext(store.watch("k/", oldest))
    assert batch.events[0].revision == oldest
    items, _ = await read_prefix(store, "k/")
    assert [kv.key for kv in items] == ["k/1", "k/2", "k/3", "k/4", "k/kept"]


async def test_a_watch_that_was_overtaken_is_told(store: Store, path: Path) -> None:
    revision = await put(store, "k/a")
    watch = store.watch("k/", revision)
    await anext(watch)
    for _ in range(5):
        last = await put(store, "k/a")
    with contextlib.closing(Database(path)) as database, database.writing() as db:
        mvcc.compact(db, last)
    with pytest.raises(Compacted):
        await anext(watch)


# --- cost


@pytest.mark.slow
async def test_a_large_range_is_paged_and_never_held_whole(path: Path) -> None:
    await made(path)
    with raw(path) as db:
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO versions (key, revision, created, lease, value) VALUES (?, 2, 2, 0, zeroblob(400))",
            ((f"addresses/4/{i:08x}",) for i in range(100_000)),
        )
        db.execute("UPDATE meta SET value = 2 WHERE name = 'revision'")
        db.execute("COMMIT")
    store = await open_store(f"sqlite://{path}")
    gc.collect()
    tracemalloc.start()
    first = await store.page("addresses/", "addresses0")
    await put(store, "other")  # so that the other pages are read from history
    count, page, slowest = len(first.items), first, 0.0
    while page.next_key is not None:
        began = time.perf_counter()
        page = await store.page(page.next_key, "addresses0", revision=first.revision)
        slowest = max(slowest, time.perf_counter() - began)
        count += len(page.items)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"peak {peak / 2**20:.1f} MiB, slowest page {slowest * 1000:.1f} ms (traced)")
    assert count == 100_000
    assert peak < 8 * 2**20
    await store.close()


async def test_nothing_is_left_behind_after_close(path: Path) -> None:
    def held() -> tuple[set[str], int, int]:
        gc.collect()
        threads = {thread.name for thread in threading.enumerate()}
        return threads, len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

    async def once() -> None:
        store = await open_store(f"sqlite://{path}")
        revision = await put(store, "a")
        lease = await store.lease(10)
        watch = store.watch("", revision)
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.01)
        await store.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert lease.alive
        with pytest.raises(StoreUnavailable):
            await lease.revoke()

    await once()
    threads, files, tasks = held()
    for _ in range(5):
        await once()
    after = held()
    assert after[0] <= threads
    # Descriptors that an earlier test had left to the garbage collector may have gone meanwhile.
    assert after[1] <= files
    assert after[2] == tasks
    assert not any("moorage" in name for name in threads)


async def test_a_refused_file_leaves_no_thread_and_no_descriptor(path: Path) -> None:
    await made(path)
    foreign(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(StoreError):
            await open_store(f"sqlite://{path}")
    await eventually(lambda: not any("moorage" in thread.name for thread in threading.enumerate()))
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_an_idle_watched_store_costs_next_to_nothing(store: Store) -> None:
    revision = await put(store, "a")
    watches = [store.watch(prefix, revision + 1) for prefix in "abcd"]
    waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0.2)
    began = time.process_time()
    await asyncio.sleep(1.5)
    share = (time.process_time() - began) / 1.5
    print(f"idle with 4 watches: {share * 100:.2f} % of a core")
    for task in waiting:
        task.cancel()
    assert share < 0.05
