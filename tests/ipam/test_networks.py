from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import keys
from ipam.errors import AlreadyExists, InvalidInput, NotFound, StoreError, StoreUnavailable, TryAgain
from ipam.networks import (
    MAX_POOLS,
    NetworkChange,
    PoolSpec,
    create_network,
    delete_network,
    get_network,
    list_networks,
    pool_usage,
    set_network,
    set_pools_disabled,
    validate,
)
from ipam.records import Address, AddressState, Network, Pool
from ipam.reservations import list_reservations, reserve
from ipam.store import Put, Store, Txn, open_store, read_prefix
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when
from tests.ipam.racing_creates import create


async def test_a_created_network_is_listed_with_its_pools_in_order(store: Store) -> None:
    await network(store, "10.65.0.0/16", "10.64.0.0/16", "fd00:64::/64")
    ((found, pools),) = await list_networks(store)
    assert found.name == "prod"
    assert [pool.cidr for pool in pools] == ["10.65.0.0/16", "10.64.0.0/16", "fd00:64::/64"]
    assert await get_network(store, "prod") == (found, pools)


async def test_an_unknown_network_names_the_known_ones(store: Store) -> None:
    await network(store, "10.64.0.0/16")
    with pytest.raises(NotFound, match=r"no network 'nope' \(known: prod\)"):
        await get_network(store, "nope")


@pytest.mark.parametrize("cidr", ["10.64.0.0/16", "10.64.3.0/24", "10.0.0.0/8", "10.64.0.1/32"])
async def test_a_pool_that_overlaps_another_networks_is_refused_naming_it(store: Store, cidr: str) -> None:
    await network(store, "10.64.0.0/16")
    with pytest.raises(AlreadyExists, match=r"overlaps 10\.64\.0\.0/16 of network prod"):
        await network(store, cidr, name="other")
    assert [found.name for found, _ in await list_networks(store)] == ["prod"]


async def test_pools_of_one_network_may_not_overlap(store: Store) -> None:
    with pytest.raises(AlreadyExists, match="leave one out"):
        await network(store, "10.64.0.0/16", "10.64.1.0/24")


async def test_a_name_that_is_taken_is_refused(store: Store) -> None:
    await network(store, "10.64.0.0/16")
    with pytest.raises(AlreadyExists, match="network prod exists already"):
        await network(store, "10.65.0.0/16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "-x"}, "no network name"),
        ({"name": "a/b"}, "no network name"),
        ({"mtu": 1000}, "MTU 1000"),
        ({"warm": -1}, "warm -1"),
        ({"dns": ["dns.example"]}, "no IP address"),
        ({"search": ["a b"]}, "no domain name"),
    ],
)
def test_a_network_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        validate(Network(name="prod", pools=[]).with_(**change))


@pytest.mark.parametrize("count", [0, MAX_POOLS + 1])
async def test_a_network_has_some_pools_and_not_too_many(store: Store, count: int) -> None:
    with pytest.raises(InvalidInput, match="pool"):
        await network(store, *(f"10.64.{i}.0/24" for i in range(count)))


async def test_of_twenty_concurrent_creates_with_overlapping_pools_exactly_one_succeeds(
    tmp_path: Path,
) -> None:
    url = f"sqlite://{tmp_path}/store.db"
    answers = await asyncio.gather(*(create(url, f"n{i}", f"10.64.0.0/{16 + i % 8}") for i in range(20)))
    assert sorted(answers) == ["created"] + ["refused"] * 19


async def test_creates_from_several_processes_do_not_overlap_either(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/store.db"
    await (await open_store(url)).close()

    async def spawn(i: int) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.ipam.racing_creates",
            url,
            f"n{i}",
            "10.64.0.0/16",
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0].decode().strip()

    assert sorted(await asyncio.gather(*(spawn(i) for i in range(4)))) == ["created"] + ["refused"] * 3


async def test_concurrent_creates_of_disjoint_pools_all_succeed(store: Store) -> None:
    await asyncio.gather(*(network(store, f"10.{i}.0.0/16", name=f"n{i}") for i in range(10)))
    assert len(await list_networks(store)) == 10


async def test_each_network_gets_the_smallest_next_hop_that_is_free_and_keeps_it(store: Store) -> None:
    for i, name in enumerate(("a", "b", "c")):
        await network(store, f"10.{i}.0.0/16", name=name)
    await set_network(store, "b", NetworkChange(mtu=1400, add=(PoolSpec("10.9.0.0/16"),)))
    await delete_network(store, "a")
    await network(store, "10.4.0.0/16", name="d")
    await network(store, "10.5.0.0/16", name="e")
    assert {n.name: n.next_hop for n, _ in await list_networks(store)} == {"b": 2, "c": 3, "d": 1, "e": 4}


async def test_concurrent_creates_get_different_next_hops(store: Store) -> None:
    await asyncio.gather(*(network(store, f"10.{i}.0.0/16", name=f"n{i}") for i in range(10)))
    assert sorted(n.next_hop for n, _ in await list_networks(store)) == list(range(1, 11))


async def test_a_network_from_before_there_was_a_choice_has_the_first_next_hop(store: Store) -> None:
    older = json.loads(Network(name="old", pools=[]).encode())
    del older["next_hop"]
    await store.txn(Txn(then=(Put(keys.NETWORKS + "old", json.dumps(older).encode()),)))
    await network(store, "10.1.0.0/16", name="new")
    assert {n.name: n.next_hop for n, _ in await list_networks(store)} == {"old": 1, "new": 2}


@pytest.mark.parametrize("number", [0, 255, -1, "2"])
def test_a_record_with_an_impossible_next_hop_is_not_believed(number: object) -> None:
    raw = json.dumps({"name": "prod", "pools": [], "next_hop": number}).encode()
    with pytest.raises(StoreError, match="holds no valid network"):
        Network.decode("networks/prod", raw)


async def test_unknown_fields_of_a_pool_survive_a_rewrite(store: Store) -> None:
    await network(store, "10.64.0.0/16")
    key = keys.POOLS + "10.64.0.0-16"
    kv = await store.get(key)
    assert kv is not None
    newer = {**json.loads(kv.value), "colour": {"deep": [1, None]}, "unknown": "a field of that name"}
    await store.txn(Txn(then=(Put(key, json.dumps(newer).encode()),)))
    await set_pools_disabled(store, ["10.64.0.0-16"], True)
    kv = await store.get(key)
    assert kv is not None
    assert json.loads(kv.value) == {**newer, "disabled": True}


async def put_address(store: Store, ip: str, state: AddressState, node: str = "n9") -> None:
    record = Address(pool="10.64.0.0-24", state=state, node=node, network="prod")
    await store.txn(Txn(then=(Put(keys.address_key(ip_address(ip)), record.encode()),)))


async def test_usage_counts_by_state_and_node_and_does_not_stumble_over_an_unreadable_record(
    store: Store,
) -> None:
    await network(store, "10.64.0.0/24")
    await put_address(store, "10.64.0.1", AddressState.ASSIGNED)
    await put_address(store, "10.64.0.2", AddressState.WARM, "n1")
    await put_address(store, "10.64.0.3", AddressState.COOLING)
    await store.txn(Txn(then=(Put(keys.address_key(ip_address("10.64.0.4")), b"?"),)))
    ((_, (pool,)),) = await list_networks(store)
    usage = await pool_usage(store, pool)
    assert (usage.usable, usage.assigned, usage.warm, usage.cooling, usage.free) == (254, 1, 1, 1, 250)
    assert usage.by_node == {"n1": {"warm": 1}, "n9": {"assigned": 1, "cooling": 1}, "?": {"unreadable": 1}}


@pytest.mark.parametrize("state", [AddressState.ASSIGNED, AddressState.COOLING])
async def test_a_network_in_use_is_not_deleted_and_its_pools_stay_enabled(
    store: Store, state: AddressState
) -> None:
    await network(store, "10.64.0.0/24")
    await put_address(store, "10.64.0.1", state)
    with pytest.raises(TryAgain, match=f"prod is in use: 10.64.0.0/24 has .*n9: 1 {state}"):
        await delete_network(store, "prod")
    ((_, (pool,)),) = await list_networks(store)
    assert not pool.disabled


async def test_a_network_whose_agent_gives_back_is_deleted_with_pools_and_reservations(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await node.start()
    ips = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 8)
    await reserve(store, ip_address("10.64.0.200"), "db")
    node.delete(*ips)
    await stored_when(
        store, lambda found: not any(r.state in ("assigned", "cooling") for r in found.values())
    )
    await delete_network(store, "prod")
    for prefix in (keys.NETWORKS, keys.POOLS, keys.BLOCKS, keys.ADDRESSES, keys.RESERVATIONS):
        assert (await read_prefix(store, prefix))[0] == []


async def test_a_network_with_more_reservations_than_fit_a_transaction_is_deleted_with_all_of_them(
    store: Store,
) -> None:
    await network(store, "10.64.0.0/23")
    for i in range(1, 201):
        await reserve(store, ip_address("10.64.0.0") + i, f"key-{i}")
    await delete_network(store, "prod")
    assert await list_reservations(store) == []


async def test_a_delete_that_fails_enables_the_pools_again(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    await put_address(store, "10.64.0.1", AddressState.WARM)
    with pytest.raises(TryAgain, match="1 warm"):
        await delete_network(store, "prod", patience=0.1)
    ((_, (pool,)),) = await list_networks(store)
    assert not pool.disabled


async def test_a_delete_that_fails_leaves_disabled_what_was_disabled_before(store: Store) -> None:
    await network(store, "10.64.0.0/24", "10.65.0.0/24")
    await set_pools_disabled(store, ["10.65.0.0-24"], True)
    await put_address(store, "10.64.0.1", AddressState.WARM)
    with pytest.raises(TryAgain):
        await delete_network(store, "prod", patience=0.0)
    ((_, pools),) = await list_networks(store)
    assert [pool.disabled for pool in pools] == [False, True]


async def test_a_block_that_nobody_gives_back_is_named_with_its_node(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    node.delete(*(await node.add(net, "c1")))
    await stored_when(store, lambda found: not found)
    await node.crash()
    with pytest.raises(TryAgain, match="1 blocks held by n1"):
        await delete_network(store, "prod", patience=0.1)


async def test_a_delete_whose_reply_is_lost_has_deleted(faulty: FaultyStore) -> None:
    await network(faulty.store, "10.64.0.0/24")
    faulty.faults("", "reply lost")
    await delete_network(faulty, "prod")
    assert await list_networks(faulty.store) == []


async def test_a_delete_that_cannot_enable_the_pools_again_says_so(faulty: FaultyStore) -> None:
    await network(faulty.store, "10.64.0.0/24")
    await put_address(faulty.store, "10.64.0.1", AddressState.WARM)
    seen = 0

    def fault(txn: Txn) -> str:
        nonlocal seen
        seen += any(isinstance(op, Put) and b'"disabled":false' in op.value for op in txn.then)
        return "refused" if seen else ""

    faulty.fault = fault
    with pytest.raises(TryAgain, match="its pools stay disabled"):
        await delete_network(faulty, "prod", patience=0.0)


async def test_deleting_an_unknown_network_changes_nothing(store: Store) -> None:
    with pytest.raises(NotFound):
        await delete_network(store, "nope")
    assert await store.get(keys.POOLSET) is None


async def test_nothing_is_created_while_the_store_is_away(faulty: FaultyStore) -> None:
    faulty.faults("refused")
    with pytest.raises(StoreUnavailable):
        await network(faulty, "10.64.0.0/24")
    assert await list_networks(faulty) == []


async def test_a_stored_pool_keeps_what_the_operator_wrote(store: Store) -> None:
    spec = PoolSpec("10.64.0.0/24", block_size=28, static=("10.64.0.0/28",), excluded=("10.64.0.254",))
    await create_network(store, Network(name="prod", pools=[]), [spec])
    ((_, pools),) = await list_networks(store)
    assert pools == [
        Pool(
            name="10.64.0.0-24",
            cidr="10.64.0.0/24",
            network="prod",
            block_size=28,
            static=["10.64.0.0/28"],
            excluded=["10.64.0.254"],
        )
    ]


async def test_two_nodes_never_share_an_address_of_a_small_pool(
    store: Store, new_node: Callable[..., Node]
) -> None:
    net = await network(store, "10.64.0.0/26", warm=2, block_size=29)
    nodes = [new_node(f"n{i}") for i in range(4)]
    for node in nodes:
        await node.start()
    answers = await asyncio.gather(
        *(node.add(net, f"{node.name}-{i}") for i in range(20) for node in nodes), return_exceptions=True
    )
    given = [answer[0] for answer in answers if isinstance(answer, list)]
    assert len(given) == len(set(given))
    for node in nodes:
        await eventually(node.is_quiet)
    assert {ip for ip, r in (await stored(store)).items() if r.state == "assigned"} == set(given)


# -- set


async def test_a_change_keeps_what_it_does_not_name(store: Store) -> None:
    before = await network(store, "10.64.0.0/24", dns=["10.0.0.2"], mtu=1400)
    changed, pools = await set_network(
        store,
        "prod",
        NetworkChange(add=(PoolSpec("10.65.0.0/24", 28),), warm=9, nat=False, search=("a.org",)),
    )
    assert changed == before.with_(
        pools=["10.64.0.0-24", "10.65.0.0-24"], warm=9, nat=False, search=["a.org"]
    )
    assert [(pool.cidr, pool.block_size) for pool in pools] == [("10.64.0.0/24", 26), ("10.65.0.0/24", 28)]
    assert (await set_network(store, "prod", NetworkChange(dns=()))) == (changed.with_(dns=[]), pools)


async def test_a_pool_is_disabled_and_enabled(store: Store) -> None:
    await network(store, "10.64.0.0/24", "10.65.0.0/24")
    _, pools = await set_network(store, "prod", NetworkChange(disable=("10.64.0.0/24",)))
    assert [pool.disabled for pool in pools] == [True, False]
    change = NetworkChange(enable=("10.64.0.0/24",), disable=("10.65.0.0/24",))
    assert [pool.disabled for pool in (await set_network(store, "prod", change))[1]] == [False, True]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (NetworkChange(mtu=100), InvalidInput, "the MTU 100 is not between"),
        (NetworkChange(warm=-1), InvalidInput, "warm -1 is not between"),
        (NetworkChange(dns=("x",)), InvalidInput, "is no IP address"),
        (
            NetworkChange(add=(PoolSpec("10.64.0.0/25"),)),
            AlreadyExists,
            "overlaps 10.64.0.0/24 of network prod",
        ),
        (
            NetworkChange(add=(PoolSpec("10.66.1.0/24"),)),
            AlreadyExists,
            "overlaps 10.66.0.0/16 of network other",
        ),
        (
            NetworkChange(add=(PoolSpec("10.7.0.0/24"), PoolSpec("10.7.0.0/25"))),
            AlreadyExists,
            "overlaps 10.7.0.0/24",
        ),
        (
            NetworkChange(disable=("10.66.0.0/16",)),
            NotFound,
            "has no pool '10.66.0.0/16' (it has 10.64.0.0/24)",
        ),
        (NetworkChange(enable=("ten",)), NotFound, "has no pool 'ten'"),
        (
            NetworkChange(enable=("10.64.0.0/24",), disable=("10.64.0.0/24",)),
            InvalidInput,
            "both disabled and enabled",
        ),
        (
            NetworkChange(add=tuple(PoolSpec(f"10.9.{n}.0/24") for n in range(MAX_POOLS))),
            InvalidInput,
            f"{MAX_POOLS + 1} pools",
        ),
    ],
)
async def test_a_change_that_makes_no_sense_changes_nothing(
    store: Store, change: NetworkChange, error: type[Exception], sentence: str
) -> None:
    await network(store, "10.64.0.0/24")
    await network(store, "10.66.0.0/16", name="other")
    before = await list_networks(store)
    with pytest.raises(error, match=re.escape(sentence)):
        await set_network(store, "prod", change)
    assert await list_networks(store) == before


async def test_changes_at_the_same_moment_all_count(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    await asyncio.gather(
        *(set_network(store, "prod", NetworkChange(add=(PoolSpec(f"10.65.{n}.0/24"),))) for n in range(8)),
        set_network(store, "prod", NetworkChange(warm=3)),
    )
    found, pools = await get_network(store, "prod")
    assert (found.warm, len(pools)) == (3, 9)


async def test_an_agent_moves_to_the_pool_that_was_added_when_the_old_one_is_disabled(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    (old,) = await node.add(net, "c1")
    net, _ = await set_network(
        store, "prod", NetworkChange(disable=("10.64.0.0/24",), add=(PoolSpec("10.65.0.0/24"),), warm=2)
    )
    found = await stored_when(
        store, lambda found: [str(ip)[:6] for ip in found] == ["10.64.", "10.65.", "10.65."]
    )
    assert found[old].state is AddressState.ASSIGNED
    (new,) = await node.add(net, "c2")
    assert str(new).startswith("10.65.")
