from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from ipam import keys, membership
from ipam.errors import Fenced, StoreUnavailable
from ipam.membership import Membership
from ipam.nodes import list_nodes
from ipam.records import Alive, Node
from ipam.store import Delete, Put, Store, Txn
from ipam.store.sqlite import SqliteLease
from ipam.writer import Writer
from tests.ipam.faulty import FaultyStore
from tests.patience import PATIENCE

FACTS = Node(name="n1", version="1.0", underlay=["192.0.2.1"])


async def member(store: Store, instance: str = "a") -> Membership:
    await Writer(store, "n1", instance, "boot").claim(0)
    return Membership(store, FACTS, instance, "boot", lambda _: None)


async def test_a_registered_node_is_listed_as_alive_with_its_facts(store: Store) -> None:
    await (await member(store)).register()
    (node,) = await list_nodes(store)
    assert (node.name, node.alive, node.version, node.underlay, node.instance) == (
        "n1", True, "1.0", ["192.0.2.1"], "a",
    )  # fmt: skip


async def test_a_node_is_known_since_its_first_registration(store: Store) -> None:
    begun = time.time()
    await (await member(store)).register()
    (first,) = await list_nodes(store)
    assert begun <= first.since <= time.time()
    await (await member(store, "b")).register()
    (again,) = await list_nodes(store)
    assert (again.instance, again.since) == ("b", first.since)


async def test_a_node_that_left_is_listed_and_not_alive(store: Store) -> None:
    one = await member(store)
    await one.register()
    await one.leave()
    (node,) = await list_nodes(store)
    assert (node.alive, node.instance) == (False, "")


async def test_a_node_whose_lease_was_lost_registers_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LOOK", 0.01)
    monkeypatch.setattr(membership, "LEASE", 0.2)
    one = await member(store)
    await one.register()
    assert isinstance(one._lease, SqliteLease)
    await one._lease.revoke()
    assert await store.get(keys.ALIVE + "n1") is None
    keeping = asyncio.create_task(one.keep())
    async with asyncio.timeout(PATIENCE):
        while await store.get(keys.ALIVE + "n1") is None:
            await asyncio.sleep(0.01)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping


async def test_an_agent_without_the_fence_does_not_call_itself_alive(store: Store) -> None:
    old = await member(store, "old")
    await old.register()
    await (await member(store, "new")).register()
    with pytest.raises(Fenced, match="another agent writes for node n1"):
        await old.register()
    kv = await store.get(keys.ALIVE + "n1")
    assert kv is not None
    assert Alive.decode(kv.key, kv.value).instance == "new"


async def test_a_removed_node_does_not_register_before_it_holds_a_fence_again(store: Store) -> None:
    one = await member(store)
    await store.txn(Txn(then=(Delete(keys.WRITERS + "n1"),)))
    with pytest.raises(Fenced):
        await one.register()


async def test_fields_that_a_newer_agent_wrote_about_the_node_are_kept(store: Store) -> None:
    await store.txn(Txn(then=(Put(keys.NODES + "n1", b'{"name":"n1","version":"2","rack":"r7"}'),)))
    await (await member(store)).register()
    kv = await store.get(keys.NODES + "n1")
    assert kv is not None
    assert json.loads(kv.value)["rack"] == "r7"
    assert json.loads(kv.value)["version"] == "1.0"


async def test_a_registration_that_fails_leaves_no_lease_that_is_kept_alive(faulty: FaultyStore) -> None:
    one = await member(faulty)
    before = asyncio.all_tasks()
    faulty.faults("refused")
    with pytest.raises(StoreUnavailable):
        await one.register()
    assert asyncio.all_tasks() == before


async def test_who_is_replaced_is_told_and_registers_again_when_it_has_the_name_back(store: Store) -> None:
    told: list[Fenced] = []
    older = Membership(store, FACTS, "older", "boot", told.append)
    newer = Membership(store, FACTS, "newer", "boot", lambda _: None)
    await Writer(store, "n1", "older", "boot").claim(0)
    await older.register()
    tasks = [asyncio.create_task(older.follow()), asyncio.create_task(older.keep())]
    try:
        await Writer(store, "n1", "newer", "boot").claim(0)
        await newer.register()
        async with asyncio.timeout(PATIENCE):
            while not told:
                await asyncio.sleep(0.01)
        await newer.leave()
        await Writer(store, "n1", "older", "boot").claim(0)
        async with asyncio.timeout(PATIENCE):
            while (kv := await store.get(keys.ALIVE + FACTS.name)) is None or b"older" not in kv.value:
                await asyncio.sleep(0.01)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def registered_as(store: Store, instance: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while (kv := await store.get(keys.ALIVE + "n1")) is None or instance.encode() not in kv.value:
            await asyncio.sleep(0.01)


async def test_a_node_with_a_longer_name_does_not_take_this_one_over(store: Store) -> None:
    told: list[Fenced] = []
    longer = FACTS.with_(name="n10")
    await Writer(store, "n10", "b", "boot").claim(0)
    await Membership(store, longer, "b", "boot", told.append).register()
    await Writer(store, "n1", "a", "boot").claim(0)
    one = Membership(store, FACTS, "a", "boot", told.append)
    async with beside(one.follow()):
        await one.register()
        await asyncio.sleep(0.1)
    assert told == []


async def test_the_sign_of_life_of_a_killed_predecessor_is_replaced_and_fences_nobody(store: Store) -> None:
    await (await member(store, "killed")).register()
    told: list[Fenced] = []
    writer = Writer(store, "n1", "next", "boot")
    one = Membership(store, FACTS, "next", "boot", told.append, has_claimed=lambda: writer.has_claimed)
    async with beside(one.follow(), one.keep()):
        # As long as the fence is not claimed, the predecessor holds it, too.
        await asyncio.sleep(0.1)
        assert told == []
        await writer.claim(0)
        await registered_as(store, "next")
        assert await writer.claim(0)
    assert told == []


async def test_a_sign_of_life_of_a_predecessor_that_comes_back_is_replaced(store: Store) -> None:
    told: list[Fenced] = []
    writer = Writer(store, "n1", "next", "boot")
    one = Membership(store, FACTS, "next", "boot", told.append, has_claimed=lambda: writer.has_claimed)
    await writer.claim(0)
    await one.register()
    async with beside(one.follow(), one.keep()):
        killed = Alive(instance="killed", boot_id="boot").encode()
        await store.txn(Txn(then=(Put(keys.ALIVE + "n1", killed),)))
        assert await writer.claim(0), "nobody else has held the fence since"
        await registered_as(store, "next")
    assert told == []
