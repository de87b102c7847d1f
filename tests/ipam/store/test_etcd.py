"""The etcd store where its contract with one healthy member does not reach: sizes, history, space, absence."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from ipam.errors import Ambiguous, Compacted, StoreError, StoreUnavailable
from ipam.store import (
    Delete,
    Get,
    Put,
    Store,
    Txn,
    WatchBatch,
    etcd_calls,
    etcd_channel,
    etcd_link,
    etcd_watch,
    open_store,
    read_prefix,
)
from tests.ipam.faulty import eventually
from tests.ipam.store.conftest import Backend, etcd_backend
from tests.ipam.store.etcd_members import Cluster, free_ports
from tests.patience import PATIENCE

pytestmark = pytest.mark.etcd

Open = Callable[[str], Awaitable[Store]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens stores that are closed at the end."""
    stores: list[Store] = []

    async def open_one(url: str) -> Store:
        stores.append(await open_store(url))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.close()


@pytest.fixture
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    async with etcd_backend(request) as backend:
        yield backend
        for store in backend.opened:
            await store.close()


@pytest.fixture
def own() -> Iterator[Cluster]:
    """A member that the test may mistreat."""
    with Cluster(arguments=["--quota-backend-bytes", str(4 << 20)]) as cluster:
        yield cluster


async def put(store: Store, *keys: str, value: bytes = b"") -> int:
    return (await store.txn(Txn(then=tuple(Put(key, value) for key in keys)))).revision


async def until(
    watch: AsyncIterator[WatchBatch], revision: int, within: float = PATIENCE
) -> list[WatchBatch]:
    batches = []
    async with asyncio.timeout(within):
        async for batch in watch:
            batches.append(batch)
            if batch.revision >= revision:
                break
    return batches


async def patiently(action: Callable[[], Awaitable[object]], within: float = PATIENCE) -> None:
    """Repeat it while the store is unavailable."""
    async with asyncio.timeout(within):
        while True:
            try:
                await action()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)


# --- sizes


async def test_a_page_larger_than_a_reply_may_be_comes_in_parts(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_channel, "MAX_RECEIVE", 100_000)
    store = await backend.open()
    keys = [f"k/{i:02}" for i in range(40)]
    for key in keys:
        await put(store, key, value=key.encode() * 2000)
    page = await store.page("k/", "k0", limit=1000)
    assert 1 <= len(page.items) < 20
    items, _ = await read_prefix(store, "k/")
    assert [(kv.key, kv.value) for kv in items] == [(key, key.encode() * 2000) for key in keys]


async def test_a_transaction_whose_answer_is_too_large_may_have_been_applied(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = await backend.open()
    await put(big, "big", value=bytes(200_000))
    monkeypatch.setattr(etcd_channel, "MAX_RECEIVE", 100_000)
    store = await backend.open()

    with pytest.raises(Ambiguous, match="larger"):
        await store.txn(Txn(then=(Put("landed", b""), Get("big"))))
    assert await store.get("landed") is not None


async def test_a_watch_joins_what_etcd_had_to_split(backend: Backend) -> None:
    store = await backend.open()
    written = {}
    for i in range(6):
        keys = [f"k/{i}-{j}" for j in range(10)]
        written[await put(store, *keys, value=bytes(100_000))] = keys
    first, last = min(written), max(written)
    batches = await until(store.watch("k/", first), last)
    assert len(batches) > 1, "6 MB fitted into one reply; etcd splits at 2 MiB"
    assert {
        revision: [e.key for b in batches for e in b.events if e.revision == revision] for revision in written
    } == (written)
    for one, other in itertools.pairwise(batches):
        assert one.revision < other.events[0].revision


async def test_what_etcd_finds_too_large_is_refused_and_not_in_doubt(backend: Backend) -> None:
    store = await backend.open()
    for size in (1_600_000, 3_000_000):
        with pytest.raises(Exception, match="so large a transaction") as caught:
            await put(store, "k", value=bytes(size))
        assert not isinstance(caught.value, StoreUnavailable)
    assert await store.get("k") is None


# --- history


async def test_a_deletion_that_a_compaction_took_along_is_not_silently_missed(backend: Backend) -> None:
    store = await backend.open()
    await put(store, "k/a")
    gone = (await store.txn(Txn(then=(Delete("k/a"),)))).revision
    await backend.compact(gone)
    with pytest.raises(Compacted) as caught:
        await until(store.watch("k/", gone), gone)
    assert caught.value.compact_revision == gone


async def test_a_slow_watcher_whose_history_was_compacted_is_told_so(backend: Backend) -> None:
    store = await backend.open()
    start = await put(store, "k/start")
    watch = store.watch("k/", start)
    await anext(watch)
    # More bytes than the connection buffers, then more changes than etcd queues for a watch (1024): from
    # there on it has to read its history for this one.
    for _ in range(20):
        await put(store, "k/large", value=bytes(1_000_000))
    last = max(await asyncio.gather(*(put(store, f"k/{i}") for i in range(1500))))
    await backend.compact(last)
    with pytest.raises(Compacted) as caught:
        await until(watch, last)
    assert caught.value.compact_revision == last


async def test_a_quiet_watch_keeps_up_with_compaction(opened: Open) -> None:
    with Cluster(arguments=["--experimental-watch-progress-notify-interval", "200ms"]) as cluster:
        store = await opened(cluster.url())
        start = await put(store, "quiet/a")
        watch = store.watch("quiet/", start + 1)
        first = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.3)
        for i in range(10):
            last = await put(store, f"busy/{i}")
        await asyncio.sleep(0.6)
        await asyncio.to_thread(cluster.ctl, "compact", str(last))
        (member,) = cluster.members
        await asyncio.to_thread(member.kill)
        cluster.restart(member)
        await patiently(lambda: put(store, "quiet/b"))
        batch = await asyncio.wait_for(first, PATIENCE)
        assert [event.key for event in batch.events] == ["quiet/b"]


async def test_a_torrent_of_changes_comes_in_few_batches_and_whole(backend: Backend) -> None:
    store = await backend.open()
    start = await put(store, "k/start")
    watch = store.watch("k/", start + 1)
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.2)
    told = {await put(store, f"k/{i}"): f"k/{i}" for i in range(400)}
    batches = [await first]
    while batches[-1].revision < max(told):
        batches.append(await asyncio.wait_for(anext(watch), PATIENCE))
    events = [event for batch in batches for event in batch.events]
    assert [(event.revision, event.key) for event in events] == sorted(told.items())
    assert len(batches) < len(told) / 2


async def test_after_a_torrent_a_watch_hears_at_once_again(backend: Backend) -> None:
    store = await backend.open()
    start = await put(store, "k/start")
    watch = store.watch("k/", start + 1)
    await until(watch, max(await asyncio.gather(*(put(store, f"k/{i}") for i in range(100)))))
    quickest = PATIENCE
    for _ in range(
        10
    ):  # a watch that rests is never that quick, one that does not may be held up by the machine
        coming = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(1)
        began = time.monotonic()
        last = await put(store, "k/last")
        assert (await asyncio.wait_for(coming, PATIENCE)).revision == last
        quickest = min(quickest, time.monotonic() - began)
        if quickest < etcd_watch.REST:
            break
    assert quickest < etcd_watch.REST


# --- absence


async def test_a_store_that_nobody_serves_opens_at_once_and_says_why_it_cannot_work(opened: Open) -> None:
    (port,) = free_ports(1)
    began = time.monotonic()
    store = await opened(f"etcd://127.0.0.1:{port}")
    with pytest.raises(StoreUnavailable, match=f"cannot be reached at 127.0.0.1:{port} .*refused") as caught:
        await put(store, "a")
    assert not isinstance(caught.value, Ambiguous)
    assert time.monotonic() - began < PATIENCE / 2
    watch = asyncio.ensure_future(anext(store.watch("k/", 1)))
    await asyncio.sleep(0.2)
    assert not watch.done()
    await store.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(watch, PATIENCE)


async def test_reads_wait_for_an_etcd_that_comes_back_and_no_longer_than_their_bound(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_calls, "ASK", 1.5)
    (port,) = free_ports(1)
    store = await opened(f"etcd://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        await store.get("a")
    assert 0.5 < time.monotonic() - began < PATIENCE / 2


async def test_a_name_that_does_not_resolve_is_named(opened: Open) -> None:
    store = await opened("etcd://nowhere.invalid:2379")
    with pytest.raises(StoreUnavailable, match=r"nowhere\.invalid:2379"):
        await put(store, "a")


async def test_a_silent_endpoint_is_given_up_on(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_link, "CONNECT", 0.5)
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = await opened(f"etcd://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
        await put(store, "a")
    assert not isinstance(caught.value, Ambiguous)
    assert time.monotonic() - began < PATIENCE / 2
    await store.close()
    server.close()


async def test_a_watch_goes_on_over_a_restart_and_misses_nothing(own: Cluster, opened: Open) -> None:
    store = await opened(own.url())
    start = await put(store, "k/0")
    watching = asyncio.create_task(until(store.watch("k/", start), start + 6))
    (member,) = own.members
    for i in range(1, 7):
        if i % 3 == 0:
            await asyncio.to_thread(member.kill)
            own.restart(member)
        await patiently(lambda i=i: put(store, f"k/{i}"))
    events = [event for batch in await watching for event in batch.events]
    assert [event.key for event in events] == [f"k/{i}" for i in range(7)]
    assert [event.revision for event in events] == sorted({event.revision for event in events})


@pytest.mark.slow
async def test_a_lease_outlives_a_restart_shorter_than_its_ttl(own: Cluster, opened: Open) -> None:
    store = await opened(own.url())
    lease = await store.lease(6)
    await store.txn(Txn(then=(Put("alive", b"", lease.id),)))
    (member,) = own.members
    await asyncio.to_thread(member.kill)
    own.restart(member)
    await asyncio.sleep(7)
    assert lease.alive
    assert await store.get("alive") is not None


# --- space


async def test_out_of_space_is_said_with_its_cure_and_leaves_open_whether_it_was_applied(
    own: Cluster, opened: Open
) -> None:
    store = await opened(own.url())
    await put(store, "before")
    with pytest.raises(Ambiguous, match=r"out of space.*not known") as caught:
        async with asyncio.timeout(PATIENCE):
            while True:  # etcd looks at its size ten times a second
                await put(store, "filler", value=bytes(500_000))
                await asyncio.sleep(0.02)
    assert "etcdctl alarm disarm" in str(caught.value)
    assert await store.get("before") is not None
    assert (await store.txn(Txn(then=(Delete("before"),)))).results == (1,)
    last = (await store.get("filler")).mod_revision
    await store.txn(Txn(then=(Delete("filler"),)))
    for command in (("compact", "--physical", str(last + 2)), ("defrag",), ("alarm", "disarm")):
        await asyncio.to_thread(own.ctl, *command)
    await patiently(lambda: put(store, "after"))


# --- what others write


async def test_a_key_that_is_no_ascii_hides_nothing_and_ends_no_watch(own: Cluster, opened: Open) -> None:
    store = await opened(own.url())
    begun = await put(store, "k/a", "k/z")
    watch = store.watch("k/", begun + 1)
    for name in ("k/b\udcff", "k/\udcc3\udca4", "k/z\udcff"):
        await asyncio.to_thread(own.ctl, "put", f"/moorage/{name}", "theirs")
    last = await put(store, "k/c")
    async with asyncio.timeout(PATIENCE):
        assert [event.key for event in (await anext(watch)).events] == ["k/c"]
    items, _ = await read_prefix(store, "k/")
    assert [kv.key for kv in items] == ["k/a", "k/c", "k/z"]
    cursor: str | None = "k/"
    found = []
    while cursor is not None:
        page = await store.page(cursor, "k0", limit=1)
        found += [kv.key for kv in page.items]
        cursor = page.next_key
    assert found == ["k/a", "k/c", "k/z"]
    assert (await store.get("k/c")).mod_revision == last


async def test_a_watch_that_fails_on_a_bug_tells_who_follows_it(
    own: Cluster, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(own.url())

    def broken(*_: object) -> None:
        raise KeyError("a bug (test)")

    monkeypatch.setattr(store._codec, "events", broken)
    watch = store.watch("k/", await put(store, "k/a"))
    with pytest.raises(StoreError, match=r"a bug \(test\)"):
        async with asyncio.timeout(PATIENCE):
            await anext(watch)


# --- watches that are told nothing


class DeafCall:
    """A watch's stream that stands, and on which nothing comes after etcd has confirmed the watch."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._confirmed = False

    async def write(self, request: object) -> None:
        await self._call.write(request)

    async def read(self) -> Any:
        if self._confirmed:
            await asyncio.Event().wait()
        self._confirmed = True
        return await self._call.read()


async def test_a_watch_on_which_nothing_is_told_is_set_up_anew(
    own: Cluster, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_watch, "SILENCE", 0.3)
    store = await opened(own.url())
    begun = await put(store, "k/a")
    stream, deaf = store._calls.stream, [True]

    @contextlib.asynccontextmanager
    async def first_is_deaf(method: Any, timeout: float | None = None) -> AsyncIterator[Any]:
        async with stream(method, timeout) as call:
            yield DeafCall(call) if deaf and deaf.pop() else call

    monkeypatch.setattr(store._calls, "stream", first_is_deaf)
    watch = store.watch("k/", begun + 1)
    following = asyncio.ensure_future(anext(watch))
    await eventually(lambda: not deaf)
    await put(store, "k/b")
    async with asyncio.timeout(PATIENCE):
        assert [event.key for event in (await following).events] == ["k/b"]


async def test_a_quiet_watch_is_asked_for_its_progress_and_stays(
    own: Cluster, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_watch, "SILENCE", 1.0)
    store = await opened(own.url())
    begun = await put(store, "k/a")
    stream, streams = store._calls.stream, []
    monkeypatch.setattr(store._calls, "stream", lambda *args: streams.append(args) or stream(*args))
    following = asyncio.ensure_future(anext(store.watch("k/", begun + 1)))
    await asyncio.sleep(3.5)
    await put(store, "k/b")
    async with asyncio.timeout(PATIENCE):
        assert [event.key for event in (await following).events] == ["k/b"]
    assert len(streams) == 1
