"""Every store: leases."""

from __future__ import annotations

import asyncio
import time

import pytest

from ipam.errors import StoreError
from ipam.store import Put, Store, Txn
from tests.ipam.store.conftest import KEPT, Backend
from tests.patience import PATIENCE


async def put_on(store: Store, lease: int, *keys: str) -> int:
    return (await store.txn(Txn(then=tuple(Put(key, b"leased", lease) for key in keys)))).revision


async def gone(store: Store, key: str, within: float) -> float:
    """Seconds until the key was seen to be gone."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while await store.get(key) is not None:
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def test_a_leased_key_names_its_lease(store: Store) -> None:
    lease = await store.lease(10)
    await put_on(store, lease.id, "a")
    assert lease.id != 0
    assert (await store.get("a")).lease == lease.id
    await lease.revoke()


@pytest.mark.slow
async def test_a_kept_lease_outlives_its_ttl(backend: Backend, store: Store) -> None:
    ttl = backend.shortest_ttl * KEPT
    lease = await store.lease(ttl)
    await put_on(store, lease.id, "a")
    await asyncio.sleep(ttl * 1.5)
    assert lease.alive
    assert await store.get("a") is not None
    await lease.revoke()


async def test_renewals_do_not_raise_the_revision(backend: Backend, store: Store) -> None:
    lease = await store.lease(backend.shortest_ttl * KEPT)
    revision = await put_on(store, lease.id, "a")
    await asyncio.sleep(backend.shortest_ttl * KEPT / 2)  # renewed after a third
    assert (await store.txn(Txn())).revision == revision
    await lease.revoke()


async def test_revoke_deletes_all_keys_now_as_one_revision(store: Store) -> None:
    lease = await store.lease(10)
    revision = await put_on(store, lease.id, "k/a", "k/b", "k/c")
    await store.txn(Txn(then=(Put("k/other", b""),)))
    watch = store.watch("k/", revision + 2)
    await lease.revoke()
    assert not lease.alive
    assert [await store.get(f"k/{name}") for name in "abc"] == [None] * 3
    assert await store.get("k/other") is not None
    batch = await asyncio.wait_for(anext(watch), PATIENCE)
    assert sorted((e.key, e.revision, e.kv) for e in batch.events) == [
        (f"k/{name}", revision + 2, None) for name in "abc"
    ]
    await lease.revoke()


async def test_an_abandoned_lease_ends_by_itself_and_not_before(backend: Backend, store: Store) -> None:
    lease = await store.lease(backend.shortest_ttl)
    await put_on(store, lease.id, "a")
    await lease.abandon()
    assert await store.get("a") is not None
    waited = await gone(store, "a", within=PATIENCE)
    assert waited > backend.shortest_ttl / 2
    assert not lease.alive


async def test_expiry_is_one_revision_that_watches_hear_though_nobody_reads(backend: Backend) -> None:
    holder, watcher = await backend.open(), await backend.open()
    lease = await holder.lease(backend.shortest_ttl)
    revision = await put_on(holder, lease.id, "k/a", "k/b")
    await holder.close()
    batch = await asyncio.wait_for(anext(watcher.watch("k/", revision + 1)), PATIENCE)
    assert sorted(e.key for e in batch.events) == ["k/a", "k/b"]
    assert {(e.revision, e.kv) for e in batch.events} == {(revision + 1, None)}


async def test_nothing_can_be_put_on_a_lease_that_is_over(backend: Backend, store: Store) -> None:
    lease = await store.lease(backend.shortest_ttl)
    await put_on(store, lease.id, "a")
    await lease.abandon()
    await gone(store, "a", within=PATIENCE)
    with pytest.raises(StoreError, match="lease"):
        await put_on(store, lease.id, "a")
    assert await store.get("a") is None


async def test_a_key_rewritten_without_the_lease_stays(store: Store) -> None:
    lease = await store.lease(10)
    await put_on(store, lease.id, "a", "b")
    await store.txn(Txn(then=(Put("a", b"for good"),)))
    await lease.revoke()
    assert (await store.get("a")).value == b"for good"
    assert await store.get("b") is None


async def test_a_key_moved_to_another_lease_follows_that_one(store: Store) -> None:
    old, new = await store.lease(10), await store.lease(10)
    await put_on(store, old.id, "a")
    await put_on(store, new.id, "a")
    await old.revoke()
    assert await store.get("a") is not None
    await new.revoke()
    assert await store.get("a") is None


async def test_a_lease_is_taken_for_dead_when_its_time_is_up_and_nobody_can_be_asked(
    backend: Backend,
) -> None:
    store = await backend.open()
    lease = await store.lease(backend.shortest_ttl)
    assert lease.alive
    await store.close()
    await asyncio.sleep(backend.shortest_ttl * 1.1)
    assert not lease.alive


async def test_a_lease_has_a_time_to_live(store: Store) -> None:
    with pytest.raises(ValueError, match="lease of 0"):
        await store.lease(0)
