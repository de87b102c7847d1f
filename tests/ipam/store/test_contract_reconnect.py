"""Every store: new connections, because this machine's address changed."""

from __future__ import annotations

import asyncio

from ipam.store import Put, Store, Txn
from tests.patience import PATIENCE


async def put(store: Store, key: str) -> int:
    return (await store.txn(Txn(then=(Put(key, b"x"),)))).revision


async def test_calls_go_on_and_so_do_watches_and_leases_that_were_there_before(store: Store) -> None:
    lease = await store.lease(PATIENCE)
    revision = await put(store, "k/1")
    watch = store.watch("k/", revision + 1)
    heard = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.1)
    store.reconnect()
    await put(store, "k/2")
    assert [event.key for event in (await asyncio.wait_for(heard, PATIENCE)).events] == ["k/2"]
    assert await store.get("k/2") is not None
    assert lease.alive
    await lease.revoke()
    await watch.aclose()


async def test_what_is_in_flight_ends_as_it_would_have(store: Store) -> None:
    writing = [asyncio.ensure_future(put(store, f"k/{number}")) for number in range(20)]
    await asyncio.sleep(0)
    store.reconnect()
    revisions = await asyncio.gather(*writing)
    assert len(set(revisions)) == 20
