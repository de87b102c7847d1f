"""The store's schema version, and the steps from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ipam import keys, schema
from ipam.errors import TryAgain
from ipam.membership import Membership
from ipam.records import Alive, Node
from ipam.schema import Commit, Migration, SchemaTooNew, ensure_schema, read_schema, upgrade
from ipam.store import Delete, Put, Store, Txn, read_prefix, unchanged
from ipam.writer import Writer


async def shout(store: Store, commit: Commit) -> None:
    """A migration: every value under loud/ in capitals, a transaction each."""
    items, _ = await read_prefix(store, "loud/")
    for kv in items:
        if kv.value != kv.value.upper():
            await commit((unchanged(kv),), (Put(kv.key, kv.value.upper()),))


async def forget(store: Store, commit: Commit) -> None:
    await commit((), (Delete("loud/a"),))


STEPS: Sequence[Migration] = (Migration(2, shout), Migration(3, forget))


async def an_agent(store: Store, name: str, *features: str) -> None:
    await store.txn(
        Txn(
            then=(
                Put(keys.NODES + name, Node(name=name, version="1", features=list(features)).encode()),
                Put(keys.ALIVE + name, Alive(instance=name, boot_id="b").encode()),
            )
        )
    )


@pytest.fixture
async def filled(store: Store) -> Store:
    await ensure_schema(store)
    await store.txn(Txn(then=(Put("loud/a", b"a"), Put("loud/b", b"b"))))
    return store


async def values(store: Store) -> list[bytes]:
    return [kv.value for kv in (await read_prefix(store, "loud/"))[0]]


async def test_today_there_is_nothing_to_upgrade(filled: Store) -> None:
    assert await upgrade(filled) == (schema.VERSION, schema.VERSION)


async def test_every_step_is_taken_in_order(filled: Store) -> None:
    assert await upgrade(filled, STEPS[:1]) == (1, 2)
    assert await values(filled) == [b"A", b"B"]
    assert await upgrade(filled, STEPS) == (2, 3)
    assert await values(filled) == [b"B"]
    assert await upgrade(filled, STEPS) == (3, 3)


async def test_an_older_moorage_refuses_an_upgraded_store(filled: Store) -> None:
    await upgrade(filled, STEPS)
    with pytest.raises(SchemaTooNew, match="version 3 and this moorage knows 1"):
        await ensure_schema(filled)
    with pytest.raises(SchemaTooNew):
        await upgrade(filled)


async def test_a_living_agent_that_is_too_old_keeps_the_store_as_it_is(filled: Store) -> None:
    await an_agent(filled, "new", "routed", "schema-3")
    await an_agent(filled, "older", "schema-1")
    await an_agent(filled, "oldest")
    with pytest.raises(TryAgain, match="too old for schema version 2 are running: older, oldest;"):
        await upgrade(filled, STEPS)
    assert await values(filled) == [b"a", b"b"]
    await ensure_schema(filled)  # and they go on


async def test_an_agent_between_two_versions_stops_the_upgrade_between_them(filled: Store) -> None:
    await an_agent(filled, "n1", "schema-2")
    with pytest.raises(TryAgain, match="version 3 are running: n1"):
        await upgrade(filled, STEPS)
    assert (await read_schema(filled)).version == 2
    assert await values(filled) == [b"A", b"B"]


async def test_an_interrupted_step_is_begun_again(filled: Store) -> None:
    async def half(store: Store, commit: Commit) -> None:
        await commit((), (Put("loud/a", b"A"),))
        raise EOFError

    with pytest.raises(EOFError):
        await upgrade(filled, [Migration(2, half)])
    with pytest.raises(SchemaTooNew):
        await ensure_schema(filled)
    assert await upgrade(filled, STEPS[:1]) == (1, 2)
    assert await values(filled) == [b"A", b"B"]


async def test_of_two_upgrades_at_once_one_goes_on(filled: Store) -> None:
    async def slow(store: Store, commit: Commit) -> None:
        await upgrade(store, STEPS[:1])
        await commit((), (Put("loud/a", b"too late"),))

    with pytest.raises(TryAgain, match="somebody else upgrades"):
        await upgrade(filled, [Migration(2, slow)])
    assert await values(filled) == [b"A", b"B"]
    assert (await read_schema(filled)).version == 2


async def test_an_agent_that_is_too_old_does_not_register_any_more(filled: Store) -> None:
    await Writer(filled, "n1", "i", "b").claim(0)
    membership = Membership(filled, Node(name="n1", version="1"), "i", "b", lambda _: None)

    async def meanwhile(store: Store, commit: Commit) -> None:
        with pytest.raises(SchemaTooNew):
            await membership.register()

    await upgrade(filled, [Migration(2, meanwhile)])
    assert await filled.get(keys.ALIVE + "n1") is None
