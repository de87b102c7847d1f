"""Where a store's history stands, and that it is looked at before anything else is asked."""

from __future__ import annotations

import asyncio

import pytest

from ipam.errors import StoreError, StoreUnavailable
from ipam.store import Put, Store, Txn


async def put(store: Store, key: str) -> int:
    return (await store.txn(Txn(then=(Put(key, b""),)))).revision


async def test_nothing_of_where_the_history_stands_goes_back_while_it_is_written(store: Store) -> None:
    before = await store.standing()

    async def write(key: str) -> None:
        for _ in range(40):
            await put(store, key)

    writing = [asyncio.create_task(write(f"k/{number}")) for number in range(4)]
    while not all(task.done() for task in writing):
        now = await store.standing()
        assert now.cluster == before.cluster
        assert now.term == before.term
        assert now.revision >= before.revision
        assert now.surplus_at_most >= before.surplus
        before = now
    await asyncio.gather(*writing)


async def test_who_verifies_does_so_before_anything_else_is_asked_and_once(store: Store) -> None:
    looked: list[str] = []

    async def verify() -> None:
        assert await store.get("k/first") is None
        await asyncio.sleep(0.05)
        looked.append("looked")

    store.verify_with(verify)
    answers = await asyncio.gather(put(store, "k/first"), put(store, "k/second"), store.get("k/third"))
    assert looked == ["looked"]
    assert all(answers[:2])


async def test_a_look_that_fails_lets_nothing_pass_and_is_repeated(store: Store) -> None:
    failures = [StoreUnavailable("not now"), StoreError("not this")]

    async def verify() -> None:
        if failures:
            raise failures.pop(0)

    store.verify_with(verify)
    for _ in range(2):
        with pytest.raises(StoreError, match="not"):
            await put(store, "k")
    assert await store.get("k") is None
    assert await put(store, "k")


async def test_one_who_waits_for_a_look_and_gives_up_does_not_end_it_for_others(store: Store) -> None:
    go_on = asyncio.Event()
    store.verify_with(go_on.wait)
    one, other = asyncio.create_task(put(store, "k/one")), asyncio.create_task(put(store, "k/other"))
    await asyncio.sleep(0.05)
    one.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    assert await other
    assert await store.get("k/one") is None


async def test_a_store_that_is_closed_during_a_look_says_so(store: Store) -> None:
    store.verify_with(asyncio.Event().wait)
    waiting = asyncio.create_task(put(store, "k"))
    await asyncio.sleep(0.05)
    await store.close()
    with pytest.raises((StoreUnavailable, asyncio.CancelledError)):
        async with asyncio.timeout(5):
            await waiting
