"""Several nodes and one store: borrowing, giving back, and addresses asked for by name on another node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import handover, keys, named, pressure, upkeep
from ipam.errors import AddressTaken, Exhausted, InvalidInput, TryAgain
from ipam.keys import IPAddress
from ipam.networks import PoolSpec, create_network, set_pools_disabled
from ipam.records import AddressState, Intent, IntentKind, Network
from ipam.reservations import reserve
from ipam.store import Store, open_store, read_prefix
from moorage.lab.simulated import burst
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, Nodes, network, stored, stored_when
from tests.patience import PATIENCE


@pytest.fixture
async def store(store_url: Callable[[Path], str], tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_url(tmp_path))
    yield opened
    await opened.close()


async def quiet(*nodes: Node) -> None:
    await eventually(lambda: all(node.is_quiet() for node in nodes))


async def warm_on(node: Node, count: int) -> None:
    await eventually(lambda: node.states().get("warm", 0) == count and node.is_quiet())


def strays(node: Node) -> list[IPAddress]:
    return [ip for ip in node.holder._shelf.held if node.holder._holdings.is_stray(ip)]


async def blocks(store: Store) -> int:
    return len((await read_prefix(store, keys.BLOCKS))[0])


# -- every usable address


@pytest.mark.parametrize("block_size", [26, 28])
async def test_ten_nodes_hand_out_every_usable_address_of_a_26_and_again_after_release(
    store: Store, nodes: Nodes, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "ASK_EVERY", 0.1)
    net = await network(store, "10.64.0.0/26", warm=8, block_size=block_size)
    ten = await nodes(10)
    for _ in range(2):
        taken = await asyncio.gather(*(ten[i % 10].add(net, f"c{i}") for i in range(62)))
        assert len({ips[0] for ips in taken}) == 62
        await quiet(*ten)
        found = await stored(store)
        assert len(found) == 62
        assert all(record.state is AddressState.ASSIGNED for record in found.values())
        for i, ips in enumerate(taken):
            ten[i % 10].delete(*ips)
        await stored_when(store, lambda left: all(r.state is AddressState.WARM for r in left.values()))


async def test_one_node_gets_every_address_that_idle_nodes_keep_warm(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26", warm=8, block_size=28)
    four = await nodes(4)
    for i, node in enumerate(four):
        await node.add(net, f"first{i}")
    await quiet(*four)
    taken = await asyncio.gather(*(four[0].add(net, f"c{i}") for i in range(58)))
    assert len({ips[0] for ips in taken}) == 58
    with pytest.raises(Exhausted, match=r"62 assigned, 0 warm, 0 cooling, 0 free \(n1: 59 assigned; n2: 1"):
        await four[0].take(net)


@pytest.mark.slow
async def test_a_hundred_nodes_ask_for_five_addresses_each_at_the_same_moment(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = await network(store, "10.64.0.0/16", warm=0)
    hundred = [Node(tmp_path, store, f"n{i}") for i in range(100)]
    try:
        for node in hundred:
            await node.start()
        came = await burst(hundred, net, each=5)
        with capsys.disabled():
            print(f"\n100 nodes x 5 addresses: {came.seconds:.2f} s, {came.transactions} transactions")
        assert len(set(came.ips)) == 500
        await quiet(*hundred)
        assert len(await stored(store)) == 500
    finally:
        for node in hundred:
            await node.crash()


# -- borrowing


async def test_without_an_unclaimed_block_addresses_are_borrowed_and_freed_after_their_cooldown(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26", warm=2)
    one, two = await nodes(2)
    await one.add(net, "c1")
    await warm_on(one, 2)
    taken = [(await two.add(net, f"b{i}"))[0] for i in range(3)]
    await quiet(two)
    assert strays(two) == taken
    assert two.states() == {"assigned": 3}
    two.delete(*taken)
    await eventually(lambda: not two.states())


async def test_the_last_addresses_of_a_block_of_many_pages_are_found(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/23", warm=0, block_size=23)
    one, two = await nodes(2)
    await asyncio.gather(*(one.add(net, f"c{i}") for i in range(507)))
    await quiet(one)
    taken = await asyncio.gather(*(two.add(net, f"b{i}") for i in range(3)))
    assert len({ips[0] for ips in taken}) == 3
    with pytest.raises(Exhausted):
        await two.take(net)


async def test_reserved_and_static_addresses_are_not_borrowed(store: Store, nodes: Nodes) -> None:
    specs = [PoolSpec("10.64.0.0/28", static=("10.64.0.4-10.64.0.14",))]
    net = await create_network(store, Network(name="prod", pools=[], warm=0), specs)
    await reserve(store, ip_address("10.64.0.2"), "db")
    one, two = await nodes(2)
    first = (await one.add(net, "c1"))[0]
    second = (await two.add(net, "c2"))[0]
    assert {str(first), str(second)} == {"10.64.0.1", "10.64.0.3"}
    with pytest.raises(Exhausted):
        await two.take(net)


async def test_a_borrower_that_crashes_knows_its_addresses_again(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26", warm=0)
    one, two = await nodes(2)
    await one.add(net, "c1")
    (ip,) = await two.add(net, "b1")
    await quiet(two)
    report = await two.restart()
    assert not report.lost
    held = two.holder.held(ip)
    assert held is not None
    assert held.state is AddressState.ASSIGNED


async def test_a_strict_network_does_not_borrow(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26", warm=2, strict=True)
    one, two = await nodes(2)
    await one.add(net, "c1")
    with pytest.raises(Exhausted, match="1 assigned"):
        await two.take(net)
    assert not two.holder._shelf.held


async def test_an_empty_block_of_a_strict_network_is_returned_for_who_needs_it(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26", warm=2, strict=True)
    one, two = await nodes(2)
    one.delete(*await one.add(net, "c1"))
    await eventually(lambda: set(one.states()) == {"warm"} and one.is_quiet())
    assert await two.add(net, "c2")
    assert one.holder.status()["blocks"] == []


async def test_a_full_pool_is_not_read_again_for_every_asker(
    store: Store, nodes: Nodes, tmp_path: Path
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0, block_size=28)
    (one,) = await nodes(1)
    for _ in range(2):
        await asyncio.gather(*(one.add(net, f"c{i}") for i in range(127)))
    counting = CountingStore(store)
    two = Node(tmp_path, counting, "other")
    await two.start()
    try:
        for _ in range(10):
            with pytest.raises(Exhausted):
                await two.take(net)
        assert counting.pages < 120  # 16 blocks, twice round; the rest counts what stands in Exhausted
    finally:
        await two.crash()


class CountingStore(FaultyStore):
    pages = 0

    async def page(self, start: str, end: str, **options: object) -> object:
        self.pages += 1
        return await super().page(start, end, **options)


# -- pressure


async def test_who_gave_back_keeps_nothing_warm_for_a_while_and_then_does_again(
    store: Store, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipam.holdings.GIVE_BACK_HOLD", 0.6)
    net = await network(store, "10.64.0.0/28", warm=8)
    one, two = await nodes(2)
    await one.add(net, "c1")
    await warm_on(one, 8)
    taken = await asyncio.gather(*(two.add(net, f"b{i}") for i in range(13)))
    assert len({ips[0] for ips in taken}) == 13
    assert [intent.evidence for intent in one.asked][:1] == [{"pool": "10.64.0.0-28"}]
    two.delete(*(ip for ips in taken for ip in ips))
    await eventually(lambda: not two.states())
    assert one.states() == {"assigned": 1}
    await warm_on(one, 8)


async def test_exhausted_names_the_node_that_is_away_with_its_warm_addresses(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/29", warm=3)
    one, two = await nodes(2)
    await one.add(net, "c1")
    await warm_on(one, 3)
    await one.leave()
    await two.add(net, "c2")
    await two.add(net, "c3")
    with pytest.raises(Exhausted, match=r"3 warm.*not running, so they give nothing back: n1 \(3 warm\)"):
        await two.take(net)
    assert len(await stored(store)) == 6


async def test_an_exhausted_pool_is_asked_about_once_in_a_while_only(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/29", warm=0)
    one, two = await nodes(2)
    for i in range(6):
        await one.add(net, f"c{i}")
    await reserve(store, ip_address("10.64.0.1"), "other")
    for _ in range(5):
        with pytest.raises(Exhausted):
            await two.take(net)
    assert len(one.asked) <= 1


async def test_who_is_asked_keeps_what_its_own_containers_wait_for(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/28", warm=8)
    one, two = await nodes(2)
    taken = await asyncio.gather(*((one, two)[i % 2].add(net, f"c{i}") for i in range(14)))
    assert len({ips[0] for ips in taken}) == 14


async def test_an_empty_block_goes_back_once_it_was_long_not_needed(
    store: Store, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "SURPLUS_AFTER", 0.4)
    net = await network(store, "10.64.0.0/26", warm=1, block_size=29)
    (one,) = await nodes(1)
    taken = await asyncio.gather(*(one.add(net, f"c{i}") for i in range(40)))
    assert await blocks(store) > 5
    one.delete(*(ip for ips in taken for ip in ips))
    await eventually(lambda: "assigned" not in one.states() and "cooling" not in one.states())
    before = len(one.holder._holdings.blocks)
    assert before > 5
    await eventually(lambda: len(one.holder._holdings.blocks) <= 2)
    transactions = one.holder.status()["transactions"]
    await asyncio.sleep(0.5)
    assert len(one.holder._holdings.blocks) >= 1
    assert one.holder.status()["transactions"] == transactions


async def test_a_disabled_pool_is_drained_on_every_node(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26", "10.65.0.0/26", warm=4, block_size=28)
    one, two = await nodes(2)
    (kept,) = await one.add(net, "c1")
    (borrowed,) = await two.add(net, "c2")
    await quiet(one, two)
    await set_pools_disabled(store, ["10.64.0.0-26"], True)
    await stored_when(
        store, lambda found: {ip for ip, r in found.items() if r.pool == "10.64.0.0-26"} == {kept, borrowed}
    )
    assert str((await two.add(net, "c3"))[0]).startswith("10.65.")
    one.delete(kept)
    two.delete(borrowed)
    await stored_when(store, lambda found: all(r.pool != "10.64.0.0-26" for r in found.values()))
    shape = next(p for p in one.catalogue.pools() if p.name == "10.64.0.0-26")
    async with asyncio.timeout(PATIENCE):
        while (await store.page(*keys.block_range(shape.cidr))).items:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("asked", [{"evidence": {"pool": "10.64.0.0-26"}}, {"ip": "10.64.0.1"}])
async def test_a_node_out_of_sync_gives_nothing_back(
    store: Store, nodes: Nodes, asked: dict[str, object]
) -> None:
    net = await network(store, "10.64.0.0/26")
    (one,) = await nodes(1)
    await one.add(net, "c1")
    one.holder._holdings.problem = "test"
    answer = await one.holder.give_back(Intent(kind=IntentKind.GIVE_BACK, **asked))
    assert answer == {"done": False, "why": "node n1 is out of sync: test"}


async def test_what_is_no_address_cannot_be_given_back(store: Store, nodes: Nodes) -> None:
    (one,) = await nodes(1)
    with pytest.raises(InvalidInput, match="'x' is no IP address"):
        await one.holder.give_back(Intent(kind=IntentKind.GIVE_BACK, ip="x"))


# -- addresses asked for by name


async def warm_at(store: Store, node: Node) -> str:
    """An address that ``node`` keeps warm."""
    await eventually(lambda: node.states().get("warm", 0) and node.is_quiet())
    found = await stored(store)
    return next(str(ip) for ip, r in found.items() if (r.node, r.state) == (node.name, "warm"))


async def test_a_static_address_that_is_warm_elsewhere_is_given_up(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26")
    one, two = await nodes(2)
    await one.add(net, "c1")
    ip = await warm_at(store, one)
    assert [str(got) for got in await two.add(net, "c2", ip)] == [ip]
    await quiet(one, two)
    assert (await stored(store))[ip_address(ip)].node == "n2"
    assert one.holder.held(ip_address(ip)) is None


async def test_a_static_address_that_is_assigned_elsewhere_is_never_robbed(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26")
    one, two = await nodes(2)
    (ip,) = await one.add(net, "c1")
    await quiet(one)
    with pytest.raises(AddressTaken, match=r"container c1 \(eth0\) on node n1"):
        await two.take(net, str(ip))
    assert not one.asked


async def test_a_static_address_that_is_lent_elsewhere_is_never_robbed(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26")
    one, two = await nodes(2)
    await one.add(net, "c1")
    ip = await warm_at(store, one)
    lent = await one.take(net, ip)
    with pytest.raises(AddressTaken, match="is changing hands on node n1"):
        await two.take(net, ip)
    one.assign(lent, "c2")


async def test_a_static_address_that_is_warm_on_a_dead_node_stays_there(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26")
    one, two = await nodes(2)
    await one.add(net, "c1")
    ip = await warm_at(store, one)
    await one.leave()
    with pytest.raises(AddressTaken, match="is warm on node n1, whose agent is not running"):
        await two.take(net, ip)
    assert (await stored(store))[ip_address(ip)].node == "n1"


async def test_a_static_address_of_a_node_that_does_not_answer_is_refused_in_time(
    store: Store, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "GIVE_UP_WITHIN", 0.2)
    net = await network(store, "10.64.0.0/26")
    one, two = await nodes(2)
    await one.add(net, "c1")
    ip = await warm_at(store, one)
    await one.crash()
    with pytest.raises(TryAgain, match="node n1 did not answer"):
        await two.take(net, ip)
    one.load()


async def test_a_static_address_that_cools_elsewhere_says_where(store: Store, nodes: Nodes) -> None:
    net = await network(store, "10.64.0.0/26", warm=0)
    one, two = await nodes(2, cooldown=30)
    (ip,) = await one.add(net, "c1")
    one.delete(ip)
    await quiet(one)
    with pytest.raises(TryAgain, match="was released on node n1 and cools down there"):
        await two.take(net, str(ip))


async def test_a_reservation_moves_to_another_node_at_once_after_its_last_holder_ended(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26")
    await reserve(store, ip_address("10.64.0.7"), "db")
    one, two = await nodes(2, cooldown=60)
    (ip,) = await one.add(net, "c1", reservation="db")
    await quiet(one)
    one.delete(ip)
    assert await two.add(net, "c2", reservation="db") == [ip]
    await quiet(one, two)
    assert (await stored(store))[ip].node == "n2"


async def test_an_add_with_a_reservation_waits_for_the_last_holder_on_another_node(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26")
    await reserve(store, ip_address("10.64.0.7"), "db")
    one, two = await nodes(2, cooldown=60)
    (ip,) = await one.add(net, "c1", reservation="db")
    await quiet(one)
    waiting = asyncio.create_task(two.add(net, "c2", reservation="db"))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    one.delete(ip)
    assert await waiting == [ip]


async def test_an_add_with_a_reservation_gives_up_when_its_holder_elsewhere_stays(
    store: Store, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "HANDOVER_PATIENCE", 0.3)
    net = await network(store, "10.64.0.0/26")
    await reserve(store, ip_address("10.64.0.7"), "db")
    one, two = await nodes(2)
    await one.add(net, "c1", reservation="db")
    await quiet(one)
    with pytest.raises(AddressTaken, match="container c1"):
        await two.take(net, reservation="db")


async def test_a_reservation_that_is_cooling_after_another_owner_is_not_given_early(
    store: Store, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "HANDOVER_PATIENCE", 0.3)
    net = await network(store, "10.64.0.0/26", warm=0)
    one, two = await nodes(2, cooldown=60)
    (ip,) = await one.add(net, "c1")
    one.delete(ip)
    await quiet(one)
    await reserve(store, ip, "db")
    with pytest.raises(TryAgain, match="cools down there"):
        await two.take(net, reservation="db")
    assert not one.asked


async def test_of_two_addresses_under_one_key_the_one_that_no_other_node_has_is_given(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/26")
    for ip in ("10.64.0.7", "10.64.0.8"):
        await reserve(store, ip_address(ip), "db")
    one, two = await nodes(2)
    taken = [await node.add(net, f"c{i}", reservation="db") for i, node in enumerate((one, two))]
    assert {str(ips[0]) for ips in taken} == {"10.64.0.7", "10.64.0.8"}


async def test_two_nodes_that_want_one_warm_address_at_once_get_it_once(store: Store, nodes: Nodes) -> None:
    net: Network = await network(store, "10.64.0.0/26")
    one, two, three = await nodes(3)
    await one.add(net, "c1")
    ip = await warm_at(store, one)
    answers = await asyncio.gather(two.add(net, "c2", ip), three.add(net, "c3", ip), return_exceptions=True)
    assert [type(answer) for answer in answers].count(list) == 1
    assert any(isinstance(answer, (AddressTaken, TryAgain)) for answer in answers)
