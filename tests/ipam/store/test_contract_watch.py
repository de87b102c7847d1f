"""Every store: watches."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from ipam.errors import Compacted
from ipam.store import Delete, Event, KeyValue, Put, Store, Txn, WatchBatch
from tests.ipam.faulty import eventually
from tests.ipam.store.conftest import Backend
from tests.patience import PATIENCE


async def put(store: Store, key: str, value: bytes = b"") -> int:
    return (await store.txn(Txn(then=(Put(key, value),)))).revision


async def collect(watch: AsyncIterator[WatchBatch], until: int) -> list[Event]:
    """All events up to a revision; checks on the way that no batch splits one or goes back."""
    events: list[Event] = []
    async with asyncio.timeout(PATIENCE):
        async for batch in watch:
            assert batch.events
            assert all(event.revision <= batch.revision for event in batch.events)
            if events:
                assert batch.events[0].revision > events[-1].revision
            events.extend(batch.events)
            if batch.revision >= until:
                break
    return events


async def test_a_watch_tells_puts_and_deletions_in_order(store: Store) -> None:
    first = await put(store, "k/a", b"1")
    second = (await store.txn(Txn(then=(Put("k/b", b"2"), Put("k/a", b"2"))))).revision
    third = (await store.txn(Txn(then=(Delete("k/a"),)))).revision
    last = await put(store, "k/a", b"4")
    events = await collect(store.watch("k/", first), last)
    assert events[0] == Event("k/a", first, KeyValue("k/a", b"1", first, first))
    assert sorted(events[1:3], key=lambda event: event.key) == [
        Event("k/a", second, KeyValue("k/a", b"2", first, second)),
        Event("k/b", second, KeyValue("k/b", b"2", second, second)),
    ]
    assert events[3:] == [
        Event("k/a", third, None),
        Event("k/a", last, KeyValue("k/a", b"4", last, last)),
    ]


async def test_a_watch_starts_at_its_revision_inclusive(store: Store) -> None:
    await put(store, "k/a", b"1")
    second = await put(store, "k/a", b"2")
    third = await put(store, "k/a", b"3")
    assert [e.revision for e in await collect(store.watch("k/", second), third)] == [second, third]


async def test_a_watch_hears_its_prefix_only(store: Store) -> None:
    start = await put(store, "other")
    for key in ("k", "k/a", "k.", "k0", "k/", "kk/a"):
        last = await put(store, key)
    await put(store, "k/z")
    events = await collect(store.watch("k/", start), last + 1)
    assert [event.key for event in events] == ["k/a", "k/", "k/z"]
    events = await collect(store.watch("", start), last + 1)
    assert len(events) == 8


async def test_a_watch_can_wait_for_a_revision_to_come(store: Store) -> None:
    now = await put(store, "k/a", b"old")
    watch = store.watch("k/", now + 1)
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.05)
    assert not first.done()
    await put(store, "other")
    revision = await put(store, "k/a", b"new")
    batch = await asyncio.wait_for(first, PATIENCE)
    assert [(event.revision, event.kv.value) for event in batch.events] == [(revision, b"new")]


async def test_own_writes_are_seen_at_once(store: Store) -> None:
    revision = await put(store, "k/a")
    watch = store.watch("k/", revision)
    await anext(watch)
    delays = []
    for i in range(50):
        coming = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await put(store, "k/a", str(i).encode())
        confirmed = time.perf_counter()
        await coming
        delays.append(time.perf_counter() - confirmed)
    delays.sort()
    print(f"own write to watch: median {delays[25] * 1000:.2f} ms, slowest {delays[-1] * 1000:.2f} ms")
    assert delays[5] < 0.02  # on a busy machine, too, some are that quick


async def test_everything_arrives_once_and_in_order_while_writers_go_on(backend: Backend) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    stores = [await backend.open() for _ in range(3)]
    start = await put(stores[0], "k/start")
    told: dict[int, dict[str, bytes | None]] = {}

    async def write(store: Store, name: str) -> None:
        for i in range(60):
            keys = chance.sample([f"k/{name}{n}" for n in range(8)], chance.randint(1, 5))
            ops = tuple(Put(k, f"{i}".encode()) if chance.random() < 0.7 else Delete(k) for k in keys)
            result = await store.txn(Txn(then=ops))
            happened = {
                op.key: op.value if isinstance(op, Put) else None
                for op, answer in zip(ops, result.results, strict=True)
                if answer != 0
            }
            if happened:
                told[result.revision] = happened

    watching = [asyncio.create_task(collect(s.watch("k/", start + 1), start + 150)) for s in stores]
    await asyncio.gather(*(write(store, name) for store, name in zip(stores, "xyz", strict=True)))
    late = stores[0].watch("k/", start + 1)
    last = max(told)
    expected = [(r, k, v) for r in sorted(told) for k, v in sorted(told[r].items())]

    def plain(events: list[Event]) -> list[tuple[int, str, bytes | None]]:
        return sorted((e.revision, e.key, e.kv.value if e.kv else None) for e in events)

    assert plain(await collect(late, last)) == sorted(expected)
    for task in watching:
        events = await task
        assert [e.revision for e in events] == sorted(e.revision for e in events)
        seen = plain(events)
        assert seen == sorted(expected)[: len(seen)]
        assert events[-1].revision >= start + 150


async def test_a_revision_is_never_split_between_batches(store: Store) -> None:
    start = await put(store, "k/start")
    sizes = {}
    for n in (1, 700, 700, 3, 1500, 1):
        nested = tuple(
            Txn(then=tuple(Put(f"k/{i}-{j}", b"") for j in range(min(50, n - 50 * i))))
            for i in range((n + 49) // 50)
        )
        revision = (await store.txn(Txn(then=nested))).revision
        sizes[revision] = n
    seen: dict[int, int] = {}
    for event in await collect(store.watch("k/", start + 1), max(sizes)):
        seen[event.revision] = seen.get(event.revision, 0) + 1
    assert seen == sizes


async def test_a_watch_from_a_compacted_revision_says_so(backend: Backend, store: Store) -> None:
    for i in range(5):
        last = await put(store, "k/a", str(i).encode())
    await backend.compact(last - 1)
    with pytest.raises(Compacted) as caught:
        await anext(store.watch("k/", last - 2))
    assert caught.value.compact_revision == last - 1
    first = last - 1 + backend.margin
    events = await collect(store.watch("k/", first), last)
    assert [event.revision for event in events] == list(range(first, last + 1))


async def test_a_deletion_at_the_oldest_revision_is_still_told(backend: Backend, store: Store) -> None:
    await put(store, "k/a")
    gone = (await store.txn(Txn(then=(Delete("k/a"),)))).revision
    await backend.compact(gone - backend.margin)
    last = await put(store, "k/b")
    events = await collect(store.watch("k/", gone), last)
    assert [(e.key, e.kv is None) for e in events] == [("k/a", True), ("k/b", False)]


async def test_revisions_start_at_one(store: Store) -> None:
    with pytest.raises(ValueError, match="revision 0"):
        store.watch("k/", 0)


async def test_close_ends_watches(store: Store) -> None:
    revision = await put(store, "k/a")
    watches = [store.watch("k/", revision + n) for n in (0, 1, 100)]

    heard: list[list[Event]] = [[] for _ in watches]

    async def drain(number: int) -> None:
        async for batch in watches[number]:
            heard[number] += batch.events

    tasks = [asyncio.create_task(drain(number)) for number in range(len(watches))]
    await eventually(lambda: heard[0])
    await store.close()
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    assert [len(events) for events in heard] == [1, 0, 0]


async def test_a_watch_of_another_handle_goes_on_when_one_is_closed(backend: Backend) -> None:
    one, other = await backend.open(), await backend.open()
    revision = await put(one, "k/a")
    watch = other.watch("k/", revision + 1)
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.05)
    await put(one, "k/b")
    await one.close()
    assert [e.key for e in (await asyncio.wait_for(first, PATIENCE)).events] == ["k/b"]
