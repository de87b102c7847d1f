"""The picture of the cluster that every node keeps: against an obvious one, made from all the store's records."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipam import cluster as cluster_module
from ipam import grace, keys
from ipam.catalogue import Catalogue
from ipam.cluster import Cluster, Holding, Member
from ipam.keys import IPAddress
from ipam.networks import NetworkChange, PoolSpec, create_network, set_network
from ipam.ranges import Ranges, range_of
from ipam.records import NODE_ENGINE, Address, AddressState, Block, Network, Node
from ipam.store import Page, open_store
from ipam.store.base import Delete, Put, Store, Txn, read_prefix
from tests.ipam.faulty import eventually
from tests.patience import PATIENCE

POOLS = ("10.64.0.0/24", "fd64::/120")
BLOCKS = [ip_network(f"10.64.0.{n}/28") for n in (0, 16, 32)] + [ip_network("fd64::/122")]
IPS = [ip_address(f"10.64.0.{n}") for n in (1, 17, 18, 40)] + [ip_address(f"fd64::{n:x}") for n in (5, 0x41)]
NODES = ("a", "b", "c")


class Forgetful:
    """A catalogue cache that remembers nothing."""

    def load_cache(self) -> list[tuple[str, bytes, int]]:
        return []

    def save_cache(self, changed: object, gone: object) -> None: ...


class Told:
    """What the follower told, by kind."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.members: dict[IPAddress, Member] = {}

    def on_topology(self, nodes: set[str]) -> None:
        self.nodes |= nodes

    def on_members(self, changes: Sequence[tuple[IPAddress, Member | None]]) -> None:
        for ip, member in changes:
            if member is None:
                self.members.pop(ip, None)
            else:
                self.members[ip] = member


@contextlib.asynccontextmanager
async def following(store: Store) -> AsyncIterator[tuple[Cluster, Told]]:
    def on_change() -> None:
        cluster.pools_changed()

    def on_rewound() -> None:
        cluster.start_over()

    catalogue = Catalogue(store, Forgetful(), on_change, on_rewound)
    told = Told()
    cluster = Cluster(store, catalogue, told.on_topology, told.on_members)
    await catalogue.refresh()
    tasks = [asyncio.create_task(work()) for work in (catalogue.follow, cluster.follow)]
    try:
        await asyncio.wait_for(cluster.listed.wait(), PATIENCE)
        yield cluster, told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def address(node: str, state: AddressState = AddressState.ASSIGNED, **more: Any) -> bytes:
    return Address(pool="p", state=state, node=node, network="web", **more).encode()


def block(node: str, size: int) -> bytes:
    return Block(pool="p", size=size, node=node, claimed_at=0.0).encode()


async def put(store: Store, key: str, value: bytes | None) -> None:
    await store.txn(Txn((), (Delete(key),) if value is None else (Put(key, value),)))


async def obvious(store: Store) -> tuple[dict[str, set[str]], dict[str, set[str]], dict[str, str]]:
    """Blocks and strays by node, and who has each assigned or announced address, from all records there are."""
    blocks: defaultdict[str, set[str]] = defaultdict(set)
    owners = {}
    for kv in (await read_prefix(store, keys.BLOCKS))[0]:
        record = Block.decode(kv.key, kv.value)
        cidr = next(b for b in BLOCKS if b.network_address == keys.ip_of(kv.key))
        blocks[record.node].add(str(cidr))
        owners[cidr] = record.node
    strays: defaultdict[str, set[str]] = defaultdict(set)
    assigned = {}
    for kv in (await read_prefix(store, keys.ADDRESSES))[0]:
        ip, held = keys.ip_of(kv.key), Address.decode(kv.key, kv.value)
        owner = next((o for b, o in owners.items() if b.version == ip.version and ip in b), None)
        if held.node != owner:
            strays[held.node].add(str(ip))
        announced = held.state in (AddressState.WARM, AddressState.ALLOCATED) and held.netgroups
        if held.state is AddressState.ASSIGNED or announced:
            assigned[str(ip)] = held.node
    return blocks, strays, assigned


def seen(cluster: Cluster) -> tuple[dict[str, set[str]], dict[str, set[str]], dict[str, str]]:
    blocks = {n: {str(b.cidr) for b in cluster.blocks_of(n)} for n in NODES if cluster.blocks_of(n)}
    strays = {n: {str(ip) for ip, _ in cluster.strays_of(n)} for n in NODES if cluster.strays_of(n)}
    return blocks, strays, {str(ip): member.node for ip, member in cluster.members()}


async def until_seen(cluster: Cluster, store: Store) -> None:
    wanted = await obvious(store)
    await eventually(lambda: seen(cluster) == wanted)


async def network(store: Store) -> None:
    await create_network(
        store, Network(name="web", pools=[]), [PoolSpec(POOLS[0], 28), PoolSpec(POOLS[1], 122)]
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.sampled_from(BLOCKS), st.sampled_from([None, *NODES])),
        st.tuples(
            st.just("address"),
            st.sampled_from(IPS),
            st.sampled_from(
                [None, *((n, s, g) for n in NODES for s in AddressState for g in ((), ("web",), ("x",)))]
            ),
        ),
        st.tuples(st.just("rewound"), st.none(), st.none()),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_it_shows_what_the_records_say_whatever_happened(steps: list[Any], tmp_path_factory: Any) -> None:
    async def run() -> None:
        store = await open_store(f"sqlite://{tmp_path_factory.mktemp('store')}/store.db")
        try:
            await network(store)
            async with following(store) as (cluster, told):
                for kind, what, value in steps:
                    if kind == "block":
                        raw = None if value is None else block(value, what.prefixlen)
                        await put(store, keys.block_key(what), raw)
                    elif kind == "address":
                        raw = None if value is None else address(*value[:2], netgroups=list(value[2]))
                        await put(store, keys.address_key(what), raw)
                    else:
                        cluster.start_over()
                await until_seen(cluster, store)
                assert told.members == dict(cluster.members())
        finally:
            await store.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grace, "SECONDS", 0.0)
        asyncio.run(run())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(f"sqlite://{tmp_path}/store.db")
    await network(opened)
    yield opened
    await opened.close()


async def test_a_node_that_claims_a_block_is_told_of_and_so_is_who_has_an_address_in_it(store: Store) -> None:
    async with following(store) as (cluster, told):
        await put(store, keys.address_key(IPS[1]), address("b"))
        await until_seen(cluster, store)
        told.nodes.clear()
        await put(store, keys.block_key(BLOCKS[1]), block("b", 28))
        await until_seen(cluster, store)
        assert told.nodes == {"b"}
        assert cluster.strays_of("b") == []
        assert cluster.owner_of(IPS[2]) == "b"


async def test_an_address_in_its_own_block_is_no_news_for_the_fabric(store: Store) -> None:
    async with following(store) as (cluster, told):
        await put(store, keys.block_key(BLOCKS[1]), block("b", 28))
        await until_seen(cluster, store)
        told.nodes.clear()
        await put(store, keys.address_key(IPS[1]), address("b", netgroups=["x"]))
        await until_seen(cluster, store)
        assert told.nodes == set()
        assert told.members == {IPS[1]: Member("b", "web", ("x",))}


@pytest.mark.parametrize("state", [AddressState.WARM, AddressState.ALLOCATED])
async def test_what_is_announced_is_a_member_before_it_is_assigned_and_not_while_it_cools(
    store: Store, state: AddressState
) -> None:
    announced, assigned = Member("a", "web", ("web",), announced=True), Member("a", "web", ("web",))
    async with following(store) as (cluster, told):
        for value, member in (
            (address("a", state), None),
            (address("a", state, netgroups=["web"]), announced),
            (address("a", netgroups=["web"]), assigned),
            (address("a", AddressState.COOLING, netgroups=["web"]), None),
        ):
            await put(store, keys.address_key(IPS[0]), value)
            await eventually(lambda member=member: cluster.holder_of(IPS[0]) == Holding("a", member))
            assert told.members.get(IPS[0]) == member


async def test_a_registered_node_without_a_sign_of_life_is_away_unless_it_runs_no_containers(
    store: Store,
) -> None:
    for node in (Node(name="a", version="1"), Node(name="b", version="1", gateway=True)):
        await put(store, keys.NODES + node.name, node.encode())
    await put(store, keys.ALIVE + "a", b"{}")
    async with following(store) as (cluster, _):
        assert cluster.away == set()
        await put(store, keys.ALIVE + "a", None)
        await eventually(lambda: cluster.away == {"a"})
        cluster.start_over()
        await put(store, keys.ALIVE + "a", b"{}")
        await eventually(lambda: cluster.listed.is_set() and cluster.away == set())
        await put(store, keys.ALIVE + "a", None)
        await put(store, keys.NODES + "a", None)
        await put(store, keys.ALIVE + "b", b"{}")
        await eventually(lambda: set(cluster.alive) == {"b"})
        await eventually(lambda: cluster.away == set())


async def test_an_address_inside_a_nodes_own_network_is_news_for_the_fabric_as_it_comes_and_goes(
    store: Store,
) -> None:
    lan = Node(name="c", version="1", surroundings=["connected 10.64.0.16/30 eth0"])
    await put(store, keys.NODES + "c", lan.encode())
    inside, outside = IPS[1], ip_address("10.64.0.25")
    closed = Ranges([range_of(ip_network("10.64.0.16/30"))])
    async with following(store) as (cluster, told):
        await put(store, keys.block_key(BLOCKS[1]), block("b", 28))
        await put(store, keys.address_key(outside), address("b"))
        await until_seen(cluster, store)
        for value, found in ((address("b"), [inside]), (address("b", AddressState.COOLING), [])):
            told.nodes.clear()
            await put(store, keys.address_key(inside), value)
            await eventually(lambda: told.nodes == {"b"})
            await until_seen(cluster, store)
            assert cluster.assigned_in(BLOCKS[1], closed) == found


async def test_an_address_of_the_node_itself_is_told_from_those_of_containers(store: Store) -> None:
    async with following(store) as (cluster, told):
        await put(store, keys.address_key(IPS[0]), address("a", engine=NODE_ENGINE))
        await until_seen(cluster, store)
        assert told.members[IPS[0]].own


async def test_a_pool_added_later_gives_addresses_their_blocks(store: Store) -> None:
    late = ip_address("10.99.0.33")
    async with following(store) as (cluster, _):
        await put(store, keys.block_key(ip_network("10.99.0.32/28")), block("a", 28))
        await put(store, keys.address_key(late), address("a"))
        await eventually(lambda: late in dict(cluster.members()))
        await set_network(store, "web", NetworkChange(add=(PoolSpec("10.99.0.0/24", 28),)))
        await eventually(lambda: [str(b.cidr) for b in cluster.blocks_of("a")] == ["10.99.0.32/28"])
        assert cluster.strays_of("a") == []


async def test_a_record_that_cannot_be_read_hides_no_other(store: Store) -> None:
    await put(store, keys.address_key(IPS[0]), b"{")
    await put(store, "addresses/4/zz", b"{}")
    await put(store, keys.NODES + "x", b"[]")
    await put(store, keys.NODES + "a", Node(name="a", version="1").encode())
    await put(store, keys.address_key(IPS[1]), address("b"))
    async with following(store) as (cluster, told):
        assert set(told.members) == {IPS[1]}
        assert set(cluster.nodes()) == {"a"}


async def test_holdings_that_no_address_has_any_more_are_forgotten(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "INTERN_AT_LEAST", 4)
    async with following(store) as (cluster, told):
        for number in range(20):
            await put(store, keys.address_key(IPS[0]), address("a", netgroups=[f"g{number}"]))
        await eventually(lambda: told.members.get(IPS[0]) == Member("a", "web", ("g19",)))
        assert len(cluster._interned) <= 8


@pytest.mark.parametrize("is_known", [True, False], ids=["known to be restored", "cut off meanwhile"])
async def test_what_a_restored_store_does_not_know_is_believed_for_a_while(
    store: Store, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(grace, "SECONDS", 1.0)
    await put(store, keys.NODES + "a", Node(name="a", version="1").encode())
    async with following(store) as (cluster, told):
        for ip in IPS[:2]:
            await put(store, keys.address_key(ip), address("a"))
        await until_seen(cluster, store)
    await put(store, keys.address_key(IPS[0]), None)
    await put(store, keys.address_key(IPS[1]), address("a", AddressState.WARM))
    if is_known:
        cluster.start_over()
    else:
        cluster.listed.clear()
    task = asyncio.create_task(cluster.follow())
    await asyncio.wait_for(cluster.listed.wait(), PATIENCE)
    assert set(told.members) == set(IPS[:2])
    await eventually(lambda: told.members == {})
    task.cancel()
    await asyncio.wait([task])


async def test_a_listing_that_began_before_the_store_went_back_in_time_is_none_of_after(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with following(store) as (cluster, _):
        real = store.page
        begun: asyncio.Queue[asyncio.Event] = asyncio.Queue()

        async def page(start: str, end: str, **options: Any) -> Page:
            read = await real(start, end, **options)
            if start == keys.ADDRESSES:
                begun.put_nowait(go_on := asyncio.Event())
                await go_on.wait()
            return read

        monkeypatch.setattr(store, "page", page)
        cluster.start_over()
        first = await begun.get()
        # Once more, while that is listed.
        cluster.start_over()
        first.set()
        second = await begun.get()
        assert not cluster.listed.is_set(), "only the second listing is of after"
        second.set()
        await asyncio.wait_for(cluster.listed.wait(), PATIENCE)
