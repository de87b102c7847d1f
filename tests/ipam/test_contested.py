"""Addresses that are used here and that a store in doubt has as another node's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ipam import keys
from ipam.errors import MoorageError, TryAgain
from ipam.keys import IPAddress
from ipam.records import Address, AddressState, Fence
from ipam.store import Put, Store, Txn
from ipam.store.base import unchanged
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when, warm_now

NewNode = Callable[..., Node]


async def given_to_n2(store: Store, ip: IPAddress, state: AddressState = AddressState.ASSIGNED) -> None:
    """The store, restored, has the address as another node's."""
    kv = await store.get(keys.address_key(ip))
    assert kv is not None
    record = Address.decode(kv.key, kv.value).with_(node="n2", container_id="theirs", state=state)
    await store.txn(Txn((unchanged(kv),), (Put(kv.key, record.encode()),)))


async def taken_by_n2(store: Store, node: Node) -> IPAddress:
    """An address of a container of the node, which the store has as n2's, and n2 has not looked yet."""
    node.holder._holdings.yields_to = lambda _: False
    net = await network(store, "10.64.0.0/24", warm=1)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    await given_to_n2(store, ip)
    return ip


async def contested(store: Store, node: Node) -> IPAddress:
    """An address of a container of the node, which n2 may not know to have given away."""
    ip = await taken_by_n2(store, node)
    await node.holder.continuity.verify()
    await node.holder.continuity.move("it was restored")
    await eventually(lambda: ip in node.holder._holdings.contested)
    return ip


@pytest.fixture
def loaded(new_node: NewNode) -> Node:
    node = new_node("n1")
    node.load()
    node.load = lambda: None
    return node


async def test_it_stays_with_who_uses_it_until_the_other_node_has_looked(store: Store, loaded: Node) -> None:
    ip = await contested(store, loaded)
    assert ip in loaded.holder.assigned()
    loaded.holder._holdings.yields_to = lambda _: True
    await eventually(lambda: [c.ip for c in loaded.conflicts] == [ip])


async def test_it_is_never_yielded_to_what_nobody_uses(store: Store, loaded: Node) -> None:
    ip = await contested(store, loaded)
    await given_to_n2(store, ip, AddressState.COOLING)
    loaded.holder._holdings.yields_to = lambda _: True
    await asyncio.sleep(1.5)
    assert (loaded.conflicts, ip in loaded.holder.assigned()) == ([], True)


async def test_its_del_writes_nothing_over_the_other_nodes_record(store: Store, loaded: Node) -> None:
    ip = await contested(store, loaded)
    before = (await stored(store))[ip]
    loaded.delete(ip)
    await eventually(lambda: loaded.holder.held(ip) is None and loaded.is_quiet())
    assert (await stored(store))[ip] == before


async def test_a_node_without_a_journal_gives_up_what_nobody_uses_there_while_the_store_is_in_doubt(
    store: Store, loaded: Node, new_node: NewNode
) -> None:
    ip = await contested(store, loaded)
    reinstalled = new_node("n2")
    reinstalled.load()
    await reinstalled.holder.continuity.verify()
    reinstalled.load = lambda: None
    await reinstalled.start()
    await stored_when(store, lambda found: ip in found and found[ip].node == "n1")
    assert loaded.conflicts == []


async def test_a_store_that_was_never_in_doubt_is_right_at_once(store: Store, loaded: Node) -> None:
    ip = await taken_by_n2(store, loaded)
    loaded.delete(ip)
    await eventually(lambda: loaded.holder.held(ip) is None)
    assert (await stored(store))[ip].node == "n2"


async def test_a_restart_in_doubt_gives_nothing_out_before_the_store_was_heard(
    store: Store, faulty: FaultyStore, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    await node.add(net, "c0")
    await warm_now(node, 2)
    await node.holder.continuity.verify()
    faulty.down = True
    await node.crash()
    node.load()
    assert node.holder.serves, "a store that is away is in no doubt"
    node.holder.continuity._doubt("it was restored")
    await node.crash()
    node.load()
    with pytest.raises(MoorageError):
        await node.take(net)


async def test_a_full_disk_does_not_bring_a_doubt_back_at_each_sync(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24", warm=1)
    await node.start()
    for number in range(5):
        await node.add(net, f"c{number}")
        await eventually(node.is_quiet)
    kv = await store.get(keys.WRITERS + "n1")
    assert kv is not None
    older = Fence.decode(kv.key, kv.value).with_(seq=2)
    await store.txn(Txn(then=(Put(kv.key, older.encode()),)))

    def full(_: int) -> None:
        raise TryAgain("disk full (test)")

    monkeypatch.setattr(node.journal, "save_confirmed_seq", full)
    found = set()
    for _ in range(3):
        node.holder._lose_sync(TryAgain("an outage (test)"))
        node.holder._holdings.wake.set()
        await eventually(lambda: not node.holder.problem)
        found.add(node.holder.continuity.incarnation)
    assert len(found) == 1
