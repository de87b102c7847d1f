"""Following prefixes of the store: when it ends, and what ends it."""

from __future__ import annotations

import asyncio

import pytest

from ipam.errors import Compacted, StoreError
from ipam.following import follow
from ipam.store.base import Put, Store, Txn, WatchBatch
from tests.ipam.faulty import FaultyStore, eventually
from tests.patience import PATIENCE


async def put(store: Store, key: str, value: bytes = b"x") -> int:
    return (await store.txn(Txn((), (Put(key, value),)))).revision


async def test_changes_below_each_prefix_are_delivered_from_where_it_was_listed(store: Store) -> None:
    before = await put(store, "a/1")
    heard: list[tuple[str, str]] = []

    def deliver(prefix: str, batch: WatchBatch) -> None:
        heard.extend((prefix, event.key) for event in batch.events)

    task = asyncio.create_task(follow(store, {"a/": before, "b/": before}, deliver, asyncio.Event()))
    await put(store, "a/2")
    await put(store, "b/1")
    await put(store, "c/1")
    await eventually(lambda: sorted(heard) == [("a/", "a/2"), ("b/", "b/1")])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_it_returns_when_the_store_went_back_in_time(store: Store) -> None:
    rewound = asyncio.Event()
    task = asyncio.create_task(follow(store, {"a/": 0}, lambda *_: None, rewound))
    rewound.set()
    await asyncio.wait_for(task, PATIENCE)


async def test_it_returns_when_what_comes_next_is_compacted(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def compacted(*_: object) -> object:
        raise Compacted("gone", 7)
        yield

    monkeypatch.setattr(faulty, "watch", compacted)
    await asyncio.wait_for(follow(faulty, {"a/": 0}, lambda *_: None, asyncio.Event()), PATIENCE)


async def test_trouble_with_the_store_is_raised_as_it_is(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> object:
        raise StoreError("no")
        yield

    monkeypatch.setattr(faulty, "watch", broken)
    with pytest.raises(StoreError, match="no"):
        await asyncio.wait_for(follow(faulty, {"a/": 0}, lambda *_: None, asyncio.Event()), PATIENCE)


async def test_a_cancellation_is_not_lost_in_the_moment_in_which_it_would_return(store: Store) -> None:
    for _ in range(20):
        rewound = asyncio.Event()

        async def for_ever(rewound: asyncio.Event = rewound) -> None:
            while True:
                await follow(store, {"a/": 0}, lambda *_: None, rewound)
                rewound.clear()

        task = asyncio.create_task(for_ever())
        await asyncio.sleep(0.005)
        rewound.set()
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=PATIENCE)
        assert done == {task}
