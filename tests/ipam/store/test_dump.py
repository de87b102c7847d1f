"""Dumps, from every kind of store and into every kind."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import keys, networks
from ipam.dump import dump, load, verify
from ipam.errors import InvalidInput, StoreUnavailable, TryAgain
from ipam.networks import NetworkChange, set_network
from ipam.records import AddressState, Alive, Fence
from ipam.schema import LoadUnfinished, ensure_schema, read_schema
from ipam.store import Delete, Put, Store, Txn, TxnResult, open_store, read_range
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[Store]:
    """Another store, empty."""
    opened = await open_store(f"sqlite://{tmp_path}/other.db")
    yield opened
    await opened.close()


async def content(store: Store) -> dict[str, bytes]:
    items, _ = await read_range(store, "!", "~")
    return {kv.key: kv.value for kv in items if kv.key != keys.INCARNATION}  # each load makes a new one


async def dumped(store: Store) -> io.BytesIO:
    out = io.BytesIO()
    await dump(store, out)
    out.seek(0)
    return out


async def put(store: Store, key: str, value: bytes, lease: int = 0) -> None:
    await store.txn(Txn(then=(Put(key, value, lease),)))


async def fill(store: Store, addresses: int = 250) -> None:
    """More than fit one transaction, and one value that is no text."""
    await ensure_schema(store)
    await network(store, "10.64.0.0/16", "fd00:64::/64")
    for number in range(addresses):
        await put(store, keys.address_key(ip_address("10.64.0.1") + number), b'{"n":%d}' % number)
    await put(store, keys.ADDRESSES + "6/garbage", b"\xff\xfe")
    await put(store, keys.WRITERS + "n1", Fence(instance="i", boot_id="b", seq=5).encode())


async def test_a_dump_of_either_store_is_loaded_into_the_other(store: Store, other: Store) -> None:
    await fill(store)
    made = await load(other, await dumped(store))
    expected = {k: v for k, v in (await content(store)).items() if not k.startswith(keys.WRITERS)}
    assert await content(other) == expected
    assert made.count == len(expected) - 1  # the schema is in the header
    await ensure_schema(other)


async def test_a_dump_can_be_loaded_where_it_came_from(store: Store, other: Store) -> None:
    await fill(other, 10)
    await load(store, await dumped(other))
    again = await dumped(store)
    assert again.read().splitlines()[1:] == (await dumped(other)).read().splitlines()[1:]


async def test_leases_intents_and_fences_stay_behind(store: Store) -> None:
    await fill(store, 1)
    lease = await store.lease(60)
    await put(store, keys.INTENTS + "n1/1", b"{}", lease.id)
    said = (await dumped(store)).read().decode()
    assert not any(prefix in said for prefix in (keys.INTENTS, keys.WRITERS, keys.ALIVE))
    await lease.revoke()


async def test_neither_dump_nor_load_goes_on_beside_an_agent(store: Store, other: Store) -> None:
    await fill(other, 1)
    made = await dumped(other)
    lease = await store.lease(60)
    await put(store, keys.ALIVE + "n1", Alive(instance="i", boot_id="b").encode(), lease.id)
    with pytest.raises(TryAgain, match="agents are running: n1"):
        await dump(store, io.BytesIO())
    with pytest.raises(TryAgain, match="agents are running: n1"):
        await load(store, made)
    await lease.revoke()


@pytest.mark.parametrize("key", ["networks/a", "pools/a", "addresses/4/0a400001", "blocks/4/0a400000"])
async def test_a_store_that_holds_something_is_not_overwritten(store: Store, other: Store, key: str) -> None:
    await fill(other, 1)
    made = await dumped(other)
    await put(store, key, b"{}")
    before = await content(store)
    with pytest.raises(TryAgain, match="holds networks or addresses already"):
        await load(store, made)
    assert await content(store) == before


async def test_what_agents_left_in_an_empty_store_is_replaced(store: Store, other: Store) -> None:
    await fill(other, 1)
    await put(store, keys.WRITERS + "n9", b"{}")
    await put(store, keys.NODES + "n9", b"{}")
    await load(store, await dumped(other))
    assert not any(key.endswith("/n9") for key in await content(store))


class Stopping(FaultyStore):
    """Fails from the n-th transaction on."""

    def __init__(self, store: Store, after: int) -> None:
        super().__init__(store)
        self._left = after

    async def txn(self, txn: Txn) -> TxnResult:
        self._left -= 1
        if self._left < 0:
            raise TryAgain("stopped")
        return await super().txn(txn)


@pytest.mark.parametrize("after", [1, 2, 3])
async def test_an_interrupted_load_leaves_a_store_that_nobody_uses_and_is_begun_again(
    store: Store, other: Store, after: int
) -> None:
    await fill(other)
    made = await dumped(other)
    with pytest.raises(TryAgain, match="stopped"):
        await load(Stopping(store, after), made)
    with pytest.raises(LoadUnfinished, match="load` again"):
        await ensure_schema(store)
    await put(store, keys.ADDRESSES + "4/ffffffff", b"of another dump")
    made.seek(0)
    await load(store, made)
    assert keys.ADDRESSES + "4/ffffffff" not in await content(store)
    assert len(await content(store)) == len(await content(other)) - 1
    assert (await read_schema(store)).loading is False


HEADER = b'{"moorage":"store dump","schema":1,"count":1,"taken":0}\n'
LINE = b'{"key":"networks/a","value":"{}"}\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "no dump of a store"),
        (b"PK\x03\x04", "no dump of a store"),
        (b'{"key":"a","value":"b"}\n', "no dump of a store"),
        (HEADER.replace(b'"schema":1', b'"schema":2'), "schema version 2 and this moorage knows 1"),
        (HEADER, "has 0 of the 1 entries"),
        (HEADER + LINE + LINE.replace(b"networks/a", b"networks/b"), "has 2 of the 1 entries"),
        (HEADER + LINE[:-9], "line 2 of the dump is damaged"),
        (HEADER + LINE + LINE, "line 3 of the dump is damaged"),
        (HEADER + b'{"key":"networks/a"}\n', "line 2"),
        (HEADER + b'{"key":"networks/a","base64":"x"}\n', "line 2"),
        (HEADER + b'{"key":"alive/n1","value":"{}"}\n', "line 2"),
        (HEADER + b'{"key":"schema","value":"{}"}\n', "line 2"),
        (HEADER + '{"key":"networks/ä","value":"{}"}\n'.encode(), "line 2"),
    ],
)
async def test_a_damaged_dump_is_refused_before_anything_is_written(
    other: Store, text: bytes, sentence: str
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        verify(io.BytesIO(text))
    with pytest.raises(InvalidInput, match=sentence):
        await load(other, io.BytesIO(text))
    assert await content(other) == {}


def test_the_format_is_what_it_says() -> None:
    assert json.loads(HEADER)["count"] == verify(io.BytesIO(HEADER + LINE)).count == 1


async def test_agents_come_up_with_a_loaded_store_and_assert_anew(
    store: Store, other: Store, tmp_path: Path
) -> None:
    """A write that had not reached the old store reaches the new one; what is stale in the journal is not believed."""
    net = await network(store, "10.64.0.0/24", warm=2)
    node = Node(tmp_path, store)
    await node.start()
    (kept,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    (unwritten,) = [held.ip for held in await node.take(net)][:1]
    await node.crash()
    # Behind the agent's back, so that its journal remembers another network than the dump has.
    await set_network(store, "prod", NetworkChange(warm=5))
    made = await dumped(store)
    await load(other, made)
    again = Node(tmp_path, other)
    report = await again.start()
    assert not report.lost
    assert report.released == []
    try:
        assert (await stored(other))[kept].state is AddressState.ASSIGNED
        assert unwritten in await stored(other)
        assert [n.warm for n in again.catalogue.networks()] == [5]
        (new,) = await again.add((await networks.get_network(other, "prod"))[0], "c2")
        await eventually(again.is_quiet)
        assert (await stored(other))[new].container_id == "c2"
    finally:
        await again.crash()


async def test_a_loaded_store_replaces_what_a_journal_remembers_at_the_very_same_revision(
    other: Store, tmp_path: Path, store: Store
) -> None:
    await network(store, "10.64.0.0/24", warm=2)
    node = Node(tmp_path, store)
    await node.start()
    revisions = dict(node.catalogue._revisions)
    await node.crash()
    await set_network(store, "prod", NetworkChange(warm=7))
    await load(other, await dumped(store))
    again = Node(tmp_path, other)
    again.load()
    rows = [(key, value, revisions[key]) for key, value, _ in again.journal.load_cache()]
    at = {kv.key: kv.mod_revision for kv in (await read_range(other, "networks/", "pools/~"))[0]}
    again.journal.save_cache([(key, value, at[key]) for key, value, _ in rows], [])
    again.journal.close()
    await again.start()
    try:
        assert [n.warm for n in again.catalogue.networks()] == [7]
    finally:
        await again.crash()


async def test_an_agent_that_was_cut_off_when_a_load_began_writes_nothing_into_what_is_loaded(
    store: Store, other: Store, faulty: FaultyStore, node: Node
) -> None:
    await ensure_schema(other)
    await network(other, "10.66.0.0/24", name="loaded")
    source = await dumped(other)
    net = await network(store, "10.65.0.0/24", warm=2)
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 2)
    lent = await node.take(net)
    faulty.down = True
    for kv in (await read_range(store, "!", "~"))[0]:
        await store.txn(Txn(then=(Delete(kv.key),)))
    half = io.BytesIO(source.getvalue())
    interrupted = FaultyStore(store)
    interrupted.faults("", "refused")  # the mark is set, and nothing loaded yet
    with pytest.raises(StoreUnavailable):
        await load(interrupted, half)
    before = await content(store)
    faulty.down = False
    node.assign(lent, "c2")
    with pytest.raises(AssertionError):
        await eventually(lambda: not node.holder.problem and node.is_quiet(), timeout=0.5)
    assert await content(store) == before
    await load(store, source)
    await stored_when(store, lambda found: {r.container_id for r in found.values()} >= {"c1", "c2"})
