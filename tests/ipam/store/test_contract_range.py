"""Every store: pages of a range, at one revision."""

from __future__ import annotations

import asyncio
import random

import pytest

from ipam.errors import Compacted, StoreError
from ipam.store import Delete, Put, Store, Txn, read_prefix, read_range
from tests.ipam.store.conftest import Backend


async def fill(store: Store, keys: list[str], value: bytes = b"") -> int:
    revision = 0
    for start in range(0, len(keys), 100):
        result = await store.txn(Txn(then=tuple(Put(key, value) for key in keys[start : start + 100])))
        revision = result.revision
    return revision


async def test_pages_join_to_the_whole_range_in_key_order(store: Store) -> None:
    keys = [f"k/{i:04}" for i in range(1000)]
    await fill(store, random.Random(1).sample(keys, len(keys)))
    await fill(store, ["j", "k", "k.", "k0"])
    for limit in (1, 7, 999, 1000, 1001):
        if limit == 1:
            items, _ = await read_range(store, "k/0100", "k/0150", limit=limit)
            assert [kv.key for kv in items] == keys[100:150]
        else:
            items, _ = await read_range(store, "k/", "k0", limit=limit)
            assert [kv.key for kv in items] == keys


async def test_the_last_page_has_no_next_key(store: Store) -> None:
    await fill(store, ["a", "b"])
    page = await store.page("a", "c", limit=2)
    assert (len(page.items), page.next_key) == (2, None)
    page = await store.page("a", "c", limit=1)
    assert page.next_key is not None


async def test_a_page_of_nothing_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="page of 0"):
        await store.page("a", "b", limit=0)


async def test_keys_only_leaves_the_values_behind(store: Store) -> None:
    revision = await fill(store, ["a"], b"large")
    (kv,) = (await store.page("a", "b", keys_only=True)).items
    assert (kv.key, kv.value, kv.mod_revision) == ("a", b"", revision)


async def test_pages_show_one_revision_while_writers_go_on(backend: Backend) -> None:
    reader, writer = await backend.open(), await backend.open()
    keys = [f"k/{i:03}" for i in range(300)]
    at = await fill(writer, keys, b"before")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    done = asyncio.Event()

    async def write() -> int:
        count = 0
        while not done.is_set():
            ops = [Put(chance.choice(keys), b"after"), Put(f"k/new{count:05}", b"after")]
            gone = chance.choice(keys)
            if gone != ops[0].key:
                ops.append(Delete(gone))
            await writer.txn(Txn(then=tuple(ops)))
            count += 1
        return count

    page = await reader.page("k/", "k0", limit=10)
    writing = asyncio.create_task(write())
    items = list(page.items)
    while page.next_key is not None:
        await asyncio.sleep(0.002)
        page = await reader.page(page.next_key, "k0", limit=10, revision=page.revision)
        items.extend(page.items)
    done.set()
    assert await writing > 5
    assert page.revision == at
    assert [(kv.key, kv.value, kv.mod_revision <= at) for kv in items] == [(k, b"before", True) for k in keys]


async def test_every_kept_revision_can_be_read_as_it_was(store: Store) -> None:
    first = (await store.txn(Txn(then=(Put("a", b"1"), Put("b", b"1"))))).revision
    second = (await store.txn(Txn(then=(Delete("a"), Put("b", b"2"))))).revision
    third = (await store.txn(Txn(then=(Put("a", b"3"),)))).revision
    seen = {}
    for revision in (first - 1, first, second, third):
        page = await store.page("a", "z", revision=revision)
        assert page.revision == revision
        seen[revision] = [(kv.key, kv.value, kv.create_revision, kv.mod_revision) for kv in page.items]
    assert seen == {
        first - 1: [],
        first: [("a", b"1", first, first), ("b", b"1", first, first)],
        second: [("b", b"2", first, second)],
        third: [("a", b"3", third, third), ("b", b"2", first, second)],
    }


async def test_a_revision_that_is_not_there_yet_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError):
        await store.page("a", "b", revision=(await store.page("a", "b")).revision + 1000)


async def test_a_compacted_revision_says_which_is_the_oldest(backend: Backend, store: Store) -> None:
    for i in range(10):
        last = await fill(store, ["a"], str(i).encode())
    await backend.compact(last - 2)
    for revision in (last - 2, last - 1, last):
        page = await store.page("a", "b", revision=revision)
        assert page.items[0].value == str(9 - last + revision).encode()
    with pytest.raises(Compacted) as caught:
        await store.page("a", "b", revision=last - 3)
    assert caught.value.compact_revision == last - 2


async def test_what_still_stands_survives_compaction(backend: Backend, store: Store) -> None:
    await fill(store, [f"old/{i}" for i in range(10)])
    last = await fill(store, ["new"])
    await backend.compact(last)
    await fill(store, ["newer"])
    items, _ = await read_prefix(store, "old/")
    assert len(items) == 10
