"""Addresses that are promised to a uid before there is a container."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from ipam import keys
from ipam.errors import AddressTaken, InvalidInput, NotAllocated
from ipam.store import Store
from ipam.store.base import Delete, Txn
from tests.ipam.nodes import Node, network, stored, stored_when

POOLS = ("10.64.0.0/24", "fd64::/64")


async def test_a_uid_has_as_many_addresses_as_it_asked_for_and_the_store_says_whose(
    node: Node, store: Store
) -> None:
    net = await network(store, *POOLS)
    await node.start()
    ips = await node.allocate(net, "u1", ipv4=9, ipv6=2)
    assert sorted(ip.version for ip in ips) == [4] * 9 + [6] * 2
    found = await stored_when(store, lambda all_: sum(r.state == "allocated" for r in all_.values()) == 11)
    assert {ip for ip, r in found.items() if r.uid == "u1"} == set(ips)


async def test_no_address_is_allocated_to_two_uids(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    got = await asyncio.gather(*(node.allocate(net, f"u{n}", ipv4=3, ipv6=3) for n in range(20)))
    ips = [ip for each in got for ip in each]
    assert len(set(ips)) == len(ips) == 120


async def test_a_container_gets_what_was_allocated_and_its_uid_keeps_it_until_it_lets_go(
    node: Node, store: Store
) -> None:
    net = await network(store, *POOLS)
    await node.start()
    ips = await node.allocate(net, "u1", ipv4=2)
    node.isolate(ips, "c1")
    found = await stored_when(store, lambda all_: all(all_[ip].state == "assigned" for ip in ips))
    assert {(found[ip].container_id, found[ip].uid) for ip in ips} == {("c1", "u1")}
    node.release("u1")
    found = await stored_when(store, lambda all_: not any(r.uid for r in all_.values()))
    assert {(found[ip].container_id, found[ip].state.value) for ip in ips} == {("c1", "assigned")}
    node.delete(*ips)
    await stored_when(store, lambda all_: all(all_[ip].state == "cooling" for ip in ips if ip in all_))


async def test_what_was_allocated_and_not_used_cools_when_its_uid_lets_go(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    (ip,) = await node.allocate(net, "u1")
    node.release("u1")
    found = await stored_when(store, lambda all_: ip not in all_ or all_[ip].state != "allocated")
    assert ip not in found or not found[ip].uid


async def test_what_was_not_allocated_is_refused_by_name_and_reason(
    new_node: Callable[..., Node], store: Store
) -> None:
    net = await network(store, *POOLS)
    node, other = new_node(), new_node("n2")
    await node.start()
    await other.start()
    (mine,) = await node.allocate(net, "u1")
    (theirs,) = await other.allocate(net, "u2")
    (of_container,) = (ip for ip in await node.add(net, "c9") if ip.version == 4)
    for ips, why in (
        ([theirs], f"{theirs} is not allocated.*on node n1"),
        ([mine, theirs], f"{theirs} is not allocated"),
        ([of_container], f"{of_container} belongs to c9"),
        ([ip_address("192.0.2.1")], "192.0.2.1 is not allocated"),
    ):
        with pytest.raises(NotAllocated, match=why):
            node.isolate(ips, "c1")
    node.isolate([mine], "c1")
    with pytest.raises(NotAllocated, match=r"belongs to c1 \(eth0\)"):
        node.isolate([mine], "c2")


async def test_one_container_does_not_get_the_addresses_of_two_uids(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    ips = [*(await node.allocate(net, "u1")), *(await node.allocate(net, "u2"))]
    with pytest.raises(NotAllocated, match="several uids, u1, u2"):
        node.isolate(ips, "c1")
    assert len(node.holder.allocations.all()) == 2


async def test_a_restart_and_a_reboot_forget_nothing_that_was_allocated(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    ips = await node.allocate(net, "u1", ipv4=2, ipv6=1)
    node.boot_id = "boot-2"
    await node.restart()
    assert {held.ip for held in node.holder.allocations.of("u1")} == set(ips)
    node.isolate(ips, "c1")


async def test_a_lost_journal_gets_them_back_from_the_store_and_a_lost_store_from_the_journal(
    node: Node, store: Store
) -> None:
    net = await network(store, *POOLS)
    await node.start()
    (ip,) = await node.allocate(net, "u1")
    await stored_when(store, lambda all_: ip in all_ and all_[ip].state == "allocated")
    await node.crash()
    node.path.unlink()
    await node.start()
    assert [held.ip for held in node.holder.allocations.of("u1")] == [ip]
    await node.crash()
    await store.txn(Txn((), (Delete(keys.address_key(ip)),)))
    await node.start()
    found = await stored_when(store, lambda all_: ip in all_ and all_[ip].state == "allocated")
    assert found[ip].uid == "u1"


async def test_an_address_that_a_uid_has_is_nobody_elses_by_name(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    await node.allocate(net, "u1", "10.64.0.9")
    with pytest.raises(AddressTaken, match=r"10\.64\.0\.9 is allocated to u1 on node n1"):
        await node.add(net, "c1", "10.64.0.9")
    with pytest.raises(AddressTaken, match="allocated to u1"):
        await node.allocate(net, "u2", "10.64.0.9")


async def test_a_family_that_the_network_has_not_is_refused_and_takes_nothing(
    node: Node, store: Store
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    with pytest.raises(InvalidInput, match="no IPv6 pool"):
        await node.allocate(net, "u1", ipv4=1, ipv6=1)
    assert node.holder.allocations.all() == []


async def test_more_names_than_addresses_are_refused(node: Node, store: Store) -> None:
    net = await network(store, *POOLS)
    await node.start()
    with pytest.raises(InvalidInput, match="more IPv4 addresses than the 1"):
        await node.allocate(net, "u1", "10.64.0.9", "10.64.0.10", ipv4=1)


async def test_a_small_pool_is_used_to_its_end_and_comes_back(node: Node, store: Store) -> None:
    net = await network(store, "10.64.0.0/28", block_size=28, warm=2)
    await node.start()
    usable = len(await node.allocate(net, "u1", ipv4=13)) + 1
    assert usable == 14
    node.release("u1")
    again = await node.allocate(net, "u2", ipv4=13)
    assert len(set(again)) == 13
    assert all(r.uid in ("", "u2") for r in (await stored(store)).values())
