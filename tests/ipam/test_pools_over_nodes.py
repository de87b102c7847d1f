"""Pools over nodes' own networks: what a node gives out, whichever came first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from ipam import keys
from ipam.errors import Exhausted, InvalidInput, TryAgain
from ipam.networks import NetworkChange, PoolSpec, get_network, list_networks, pool_usage, set_network
from ipam.nodes_networks import read_nodes_networks
from ipam.records import AddressState
from ipam.records import Node as NodeRecord
from ipam.reservations import reserve
from ipam.store import Delete, Put, Store, Txn
from ipam.taken import parse_all
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when
from tests.patience import PATIENCE

NewNode = Callable[..., Node]

LAN = ("address 10.50.0.3 eth0", "connected 10.50.0.0/29 eth0", "gateway 10.50.0.1 eth0")
POOL = "10.50.0.0/29"


async def say(store: Store, node: str, *said: str) -> None:
    """A node's agent says what its networks use."""
    record = NodeRecord(name=node, version="1", surroundings=list(said))
    await store.txn(Txn((), (Put(keys.NODES + node, record.encode()),)))


async def all_of(node: Node, net: object, most: int = 8) -> set[str]:
    """Addresses until there are none."""
    given: set[str] = set()
    for number in range(most):
        try:
            given.add(str((await node.add(net, f"c{number}"))[0]))
        except Exhausted:
            return given
    return given


async def test_a_forced_pool_gives_out_neither_a_node_nor_its_gateway(store: Store, node: Node) -> None:
    await say(store, "n9", *LAN)
    with pytest.raises(InvalidInput, match=r"the gateway 10\.50\.0\.1"):
        await network(store, POOL, warm=2)
    net = await network(store, "10.60.0.0/30", warm=2)
    await set_network(
        store, "prod", NetworkChange(add=(PoolSpec(POOL, forced=True),), disable=("10.60.0.0/30",))
    )
    await node.start()
    assert await all_of(node, net) == {"10.50.0.2", "10.50.0.4", "10.50.0.5", "10.50.0.6"}


async def test_a_pool_that_was_there_first_gives_out_nothing_of_the_lan(store: Store, node: Node) -> None:
    net = await network(store, POOL, warm=0)
    await node.start()
    await say(store, "n9", *LAN)
    await eventually(lambda: not any(p.usable(ip_address("10.50.0.2")) for p in node.catalogue.pools()))
    with pytest.raises(Exhausted, match="0 free"):
        await node.take(net)


async def test_warm_addresses_that_a_node_turns_out_to_use_go_back(store: Store, node: Node) -> None:
    net = await network(store, POOL, warm=6)
    await node.start()
    node.assign(await node.take(net), "c1")
    await eventually(lambda: node.states().get("warm", 0) >= 4 and node.is_quiet())
    await say(store, "n9", *LAN)
    kept = await stored_when(store, lambda found: len(found) == 1)
    assert [record.state for record in kept.values()] == [AddressState.ASSIGNED]


async def test_what_is_warm_is_not_lent_while_the_store_is_away(faulty: FaultyStore, node: Node) -> None:
    net = await network(faulty.store, POOL, warm=6)
    await node.start()
    node.assign(await node.take(net), "c1")
    await eventually(lambda: node.states().get("warm", 0) >= 4 and node.is_quiet())
    faulty.down = True
    node.catalogue.tell_own(parse_all(LAN))
    with pytest.raises(TryAgain):
        await node.take(net)


async def test_an_agent_starts_with_what_its_own_kernel_and_its_journal_say(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, POOL, warm=6)
    await say(faulty.store, "n9", "address 10.50.0.4 eth0")
    await node.start()
    node.assign(await node.take(net), "c1")
    await eventually(lambda: node.states().get("warm", 0) >= 3 and node.is_quiet())
    await node.crash()
    faulty.down = True
    node.load()
    node.catalogue.tell_own(parse_all(["address 10.50.0.6 eth0"]))
    (pool,) = node.catalogue.pools()
    assert not pool.usable(ip_address("10.50.0.4")), "another node's, as the journal remembers"
    assert not pool.usable(ip_address("10.50.0.6")), "its own"
    assert pool.usable(ip_address("10.50.0.5"))


async def test_the_kernel_knows_better_than_the_record_what_a_node_uses_itself(
    store: Store, node: Node
) -> None:
    await network(store, POOL, warm=0)
    await say(store, "n1", "address 10.50.0.4 eth0")
    await node.start()
    await eventually(node.catalogue.pools)
    (pool,) = node.catalogue.pools()
    assert not pool.usable(ip_address("10.50.0.4")), "as long as the kernel was not asked"
    node.catalogue.tell_own(parse_all(["address 10.50.0.5 eth0"]))
    await say(store, "n1", "address 10.50.0.4 eth1")
    await say(store, "n9", "address 10.50.0.6 eth0")
    await eventually(lambda: not any(p.usable(ip_address("10.50.0.6")) for p in node.catalogue.pools()))
    (pool,) = node.catalogue.pools()
    assert pool.usable(ip_address("10.50.0.4"))
    assert not pool.usable(ip_address("10.50.0.5"))


@pytest.mark.parametrize("reserved", [False, True])
async def test_an_address_asked_for_by_name_is_refused_with_whose_it_is(
    store: Store, node: Node, reserved: bool
) -> None:
    net = await network(store, POOL, warm=0)
    await node.start()
    if reserved:
        await reserve(store, ip_address("10.50.0.1"), "db")
    await say(store, "n9", "gateway 10.50.0.1 eth0")
    await eventually(lambda: not any(p.usable(ip_address("10.50.0.1")) for p in node.catalogue.pools()))
    with pytest.raises(InvalidInput, match=r"the gateway 10\.50\.0\.1 \(eth0\) of node n9; ask for another"):
        if reserved:
            await node.take(net, reservation="db")
        else:
            await node.take(net, "10.50.0.1")


async def test_an_address_that_a_node_uses_is_not_reserved_for_anybody(store: Store) -> None:
    await network(store, POOL)
    await say(store, "n9", "gateway 10.50.0.1 eth0")
    with pytest.raises(InvalidInput, match=r"the gateway 10\.50\.0\.1"):
        await reserve(store, ip_address("10.50.0.1"), "db")


async def test_an_address_that_is_assigned_stays_assigned_and_is_counted(store: Store, node: Node) -> None:
    net = await network(store, POOL, warm=0)
    await node.start()
    (kept,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    await say(store, "n9", f"address {kept} eth0")
    await eventually(lambda: not any(p.usable(kept) for p in node.catalogue.pools()))
    assert (await stored(store))[kept].state is AddressState.ASSIGNED
    _, (pool,) = await get_network(store, "prod")
    usage = await pool_usage(store, pool)
    assert (usage.usable, usage.assigned, usage.outside, usage.free) == (5, 1, 1, 5)
    node.delete(kept)
    await stored_when(store, lambda found: kept not in found)


async def test_addresses_come_back_when_no_node_uses_them_any_more(store: Store, node: Node) -> None:
    net = await network(store, POOL, warm=0)
    await say(store, "n9", *LAN)
    await node.start()
    with pytest.raises(Exhausted):
        await node.take(net)
    await store.txn(Txn((), (Delete(keys.NODES + "n9"),)))
    await eventually(lambda: any(p.usable(ip_address("10.50.0.2")) for p in node.catalogue.pools()))
    given: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while len(given) < 6:  # for a moment it is believed that there are none
            given |= await all_of(node, net)


async def test_a_node_that_says_something_else_of_itself_reopens_no_pool(store: Store, node: Node) -> None:
    await network(store, POOL)
    await node.start()
    await say(store, "n9", *LAN)
    await eventually(lambda: not any(p.usable(ip_address("10.50.0.2")) for p in node.catalogue.pools()))
    told: list[int] = []
    node.catalogue._on_change = lambda: told.append(1)
    record = NodeRecord(name="n9", version="2", surroundings=list(LAN))
    await store.txn(Txn((), (Put(keys.NODES + "n9", record.encode()),)))
    await say(store, "n8", "route 10.0.0.0/8 tun0")
    await eventually(lambda: node.catalogue.around.taken_by("n8"))
    assert told == []


@pytest.mark.parametrize("enabled", [False, True])
async def test_a_pool_that_is_used_already_can_be_forced_later(
    store: Store, node: Node, enabled: bool
) -> None:
    net = await network(store, POOL, warm=0)
    await say(store, "n9", *LAN)
    if not enabled:
        await set_network(store, "prod", NetworkChange(disable=(POOL,)))
    await set_network(store, "prod", NetworkChange(enable=(POOL,), force=True))
    ((_, (pool,)),) = await list_networks(store)
    assert (pool.forced, pool.disabled) == (True, False)
    await node.start()
    assert await all_of(node, net) == {"10.50.0.2", "10.50.0.4", "10.50.0.5", "10.50.0.6"}


async def test_the_records_of_all_nodes_count_and_unreadable_ones_do_not_hide_others(store: Store) -> None:
    await say(store, "n8", *LAN)
    await store.txn(Txn((), (Put(keys.NODES + "n9", b"{"),)))
    assert (await read_nodes_networks(store)).addresses() == {ip_address("10.50.0.3")}
