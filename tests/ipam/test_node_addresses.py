"""The node's own addresses: had, kept, moved and given up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import keys
from ipam.errors import AddressTaken
from ipam.keys import IPAddress
from ipam.networks import NetworkChange, set_network
from ipam.node_addresses import NodeAddresses
from ipam.nodes import get_node
from ipam.records import NODE_ENGINE, Address, AddressState, Network
from ipam.store import Delete, Put, Store, Txn, open_store
from tests.ipam.faulty import eventually
from tests.ipam.nodes import Node, network, stored, stored_when

FOUR, SIX = "10.64.0.0/24", "fd64::/112"


@pytest.fixture
async def store(store_url: Callable[[Path], str], tmp_path: Path) -> AsyncIterator[Store]:
    """A SQLite file, and a real etcd."""
    opened = await open_store(store_url(tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
async def node(new_node: Callable[..., Node], store: Store) -> Node:
    """A node on that store, not started. A long cooldown, so that whoever needs one is seen."""
    return new_node(store=store, cooldown=60.0)


def own(node: Node) -> NodeAddresses:
    return NodeAddresses(node.name, "mfbvxlan", node.holder, node.catalogue)


async def started(node: Node, *networks: Network) -> NodeAddresses:
    """The node's own addresses, had of these networks and known to the store."""
    await node.start()
    addresses = own(node)
    assert await addresses.settle(networks) == {}
    await eventually(node.is_quiet)
    return addresses


def is_own(record: Address, node: str = "n1") -> bool:
    return (record.state, record.engine, record.container_id, record.ifname, record.node) == (
        AddressState.ASSIGNED, NODE_ENGINE, f"node:{node}", "mfbvxlan", node,
    )  # fmt: skip


async def test_there_is_one_of_each_family_and_the_store_says_whose(store: Store, node: Node) -> None:
    web = await network(store, FOUR, SIX)
    addresses = await started(node, web)
    ips = addresses.current()
    assert list(ips) == [4, 6]
    found = await stored_when(store, lambda found: set(found) == set(ips.values()))
    assert all(is_own(record) for record in found.values())


async def test_nothing_else_is_taken_or_kept_warm_for_it(store: Store, node: Node) -> None:
    addresses = await started(
        node, await network(store, FOUR, SIX, name="a"), await network(store, "10.65.0.0/24", name="b")
    )
    await eventually(lambda: node.states() == {"own": 2})
    assert len(node.holder.status()["blocks"]) == 2
    before = addresses.current()
    assert await addresses.settle(node.catalogue.networks()) == {}
    assert addresses.current() == before


async def test_a_family_that_no_network_has_is_not_missed(store: Store, node: Node) -> None:
    addresses = await started(node, await network(store, SIX))
    assert list(addresses.current()) == [6]


async def test_families_may_come_from_different_networks(store: Store, node: Node) -> None:
    addresses = await started(node, await network(store, FOUR, name="a"), await network(store, SIX, name="b"))
    assert list(addresses.current()) == [4, 6]


async def test_a_pool_that_the_node_has_a_block_of_is_preferred(store: Store, node: Node) -> None:
    first = await network(store, FOUR, name="a")
    second = await network(store, "10.65.0.0/24", name="b")
    await node.start()
    await node.add(second, "c1")
    addresses = own(node)
    assert await addresses.settle([first, second]) == {}
    assert str(addresses.current()[4]).startswith("10.65.")


async def test_a_full_pool_is_passed_over(store: Store, node: Node, new_node: Callable[..., Node]) -> None:
    full = await network(store, "10.64.0.0/31", name="a", block_size=31, warm=0)
    roomy = await network(store, "10.65.0.0/24", name="b")
    other = new_node("n2", store=store)
    await other.start()
    for container in ("c1", "c2"):
        await other.add(full, container)
    addresses = await started(node, full, roomy)
    assert str(addresses.current()[4]).startswith("10.65.")


async def test_why_there_is_none_is_said_and_the_other_family_goes_on(store: Store, node: Node) -> None:
    full = await network(store, "10.64.0.0/31", name="a", block_size=31, warm=0)
    six = await network(store, SIX, name="b")
    await node.start()
    for container in ("c1", "c2"):
        await node.add(full, container)
    addresses = own(node)
    missing = await addresses.settle([full, six])
    assert "no free IPv4 address" in missing[4]
    assert list(addresses.current()) == [6]


async def test_a_family_that_a_network_has_no_more_of_does_not_keep_it_from_its_other_one(
    store: Store, node: Node, new_node: Callable[..., Node]
) -> None:
    full = await network(store, "10.64.0.0/31", SIX, name="a", block_size=31, warm=0)
    other = new_node("n2", store=store)
    await other.start()
    for container in ("c1", "c2"):
        await other.add(full, container)
    await node.start()
    addresses = own(node)
    missing = await addresses.settle([full])
    assert list(missing) == [4]
    assert list(addresses.current()) == [6]


async def test_they_outlive_the_agent(store: Store, node: Node) -> None:
    web = await network(store, FOUR, SIX)
    before = (await started(node, web)).current()
    await node.restart()
    addresses = own(node)
    assert addresses.known
    assert addresses.current() == before
    assert await addresses.settle([web]) == {}
    assert addresses.current() == before


async def test_without_the_journal_they_are_unknown_until_the_store_was_heard(
    store: Store, node: Node
) -> None:
    web = await network(store, FOUR, SIX)
    before = (await started(node, web)).current()
    await node.crash()
    node.path.unlink()
    node.live = set(before.values())  # as an isolator says of the node's own
    node.load()
    addresses = own(node)
    assert not addresses.known
    report = await node.holder.sync()
    assert set(report.adopted) == set(before.values())
    assert addresses.known
    assert addresses.current() == before


async def test_one_that_is_not_wanted_is_free_when_its_device_has_lost_it_and_not_sooner(
    store: Store, node: Node
) -> None:
    web = await network(store, FOUR, SIX)
    addresses = await started(node, web)
    carried = addresses.current()
    assert await addresses.settle([]) == {}
    assert addresses.current() == {}
    addresses.free_but(carried.values())
    await eventually(node.is_quiet)
    assert set(await stored(store)) == set(carried.values())
    addresses.free_but([carried[6]])
    await stored_when(store, lambda found: set(found) == {carried[6]})
    addresses.free_but([])
    await stored_when(store, lambda found: found == {})  # without the cooldown of 60 s


async def test_one_that_is_wanted_again_before_it_was_free_is_kept(store: Store, node: Node) -> None:
    web = await network(store, FOUR)
    addresses = await started(node, web)
    before = addresses.current()
    await addresses.settle([])
    await addresses.settle([web])
    addresses.free_but([])
    assert addresses.current() == before
    await eventually(node.is_quiet)
    assert set(await stored(store)) == set(before.values())


async def test_out_of_a_disabled_pool_it_moves_to_another(store: Store, node: Node) -> None:
    web = await network(store, FOUR, "10.65.0.0/24")
    addresses = await started(node, web)
    before = addresses.current()[4]
    pool = next(p for p in node.catalogue.pools() if before in p.cidr)
    await set_network(store, web.name, NetworkChange(disable=(str(pool.cidr),)))
    await eventually(lambda: any(p.disabled for p in node.catalogue.pools()))
    assert await addresses.settle([web]) == {}
    after = addresses.current()[4]
    assert after not in pool.cidr
    addresses.free_but([after])
    found = await stored_when(store, lambda found: set(found) == {after})
    assert is_own(found[after])


async def test_one_that_the_store_says_is_anothers_is_lost_and_another_taken(
    store: Store, node: Node
) -> None:
    web = await network(store, FOUR)
    before = (await started(node, web)).current()[4]
    await node.crash()
    await give_to("n2", before, store)
    await node.start()
    addresses = own(node)
    assert addresses.current() == {}
    assert [conflict.ip for conflict in node.conflicts] == [before]
    assert await addresses.settle([web]) == {}
    after = addresses.current()[4]
    assert after != before
    found = await stored_when(store, lambda found: after in found)
    assert found[before].node == "n2"


async def give_to(node: str, ip: IPAddress, store: Store) -> None:
    record = (await stored(store))[ip].with_(node=node, engine="mesos", container_id="c9", ifname="eth0")
    assert (await store.txn(Txn((), (Put(keys.address_key(ip), record.encode()),)))).succeeded


async def test_one_that_the_store_forgot_is_asserted_anew(store: Store, node: Node) -> None:
    web = await network(store, FOUR)
    before = (await started(node, web)).current()[4]
    await node.crash()
    kv = await store.get(keys.address_key(before))
    assert kv is not None
    assert (await store.txn(Txn((), (Delete(kv.key),)))).succeeded
    report = await node.start()
    assert report.asserted == [before]
    found = await stored_when(store, lambda found: before in found)
    assert is_own(found[before])


async def test_a_drained_node_keeps_what_it_has_and_takes_nothing(store: Store, node: Node) -> None:
    web = await network(store, FOUR)
    addresses = await started(node, web)
    await node.join()
    node.holder.drain.begin()
    assert await addresses.settle([web]) == {}
    assert 4 in addresses.current()
    await eventually(lambda: node.holder.drain.confirmed)
    # They are no container's: nothing keeps the node from being removed.
    assert (await get_node(store, "n1")).kept == {}
    await addresses.settle([])
    addresses.free_but([])
    assert "is drained" in (await addresses.settle([web]))[4]


async def test_nobody_else_is_given_it_by_name(
    store: Store, node: Node, new_node: Callable[..., Node]
) -> None:
    web = await network(store, FOUR)
    ip = (await started(node, web)).current()[4]
    other = new_node("n2", store=store)
    await other.start()
    for one in (node, other):
        with pytest.raises(AddressTaken, match="node:n1"):
            await one.take(web, str(ip))
    assert ip_address(ip) in await stored(store)
