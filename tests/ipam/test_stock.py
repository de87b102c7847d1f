"""For whom warm addresses lie ready: what other nodes know of them, who may have them, how many there are of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam import holdings
from ipam.errors import TryAgain
from ipam.holdings import warm
from ipam.records import AddressState
from ipam.shelf import Held, Shelf, Waiter
from ipam.stock import HEARD_WITHIN, HIGH_WATER, Stock
from ipam.store import Store
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when, warm_now

NewNode = Callable[..., Node]

OTHERS = ("front",)


def entry(shelf: Shelf, n: int, *netgroups: str) -> Held:
    held = Held(ip_address("10.64.0.0") + n, warm("n1", "web", "p", netgroups), revision=5)
    shelf.add(held)
    shelf.offer(held)
    return held


def the(shelf: Shelf) -> Stock:
    return Stock(shelf, lambda: 0.0)


def test_members_of_the_netgroup_get_what_is_announced_first_and_what_was_confirmed_first_of_that() -> None:
    shelf = Shelf()
    plain, first, second = entry(shelf, 1), entry(shelf, 2, "web"), entry(shelf, 3, "web")
    assert [shelf.lend("web", 4, None, ("web", "red")) for _ in range(4)] == [first, second, plain, None]


def test_members_of_other_netgroups_never_get_what_is_announced() -> None:
    shelf = Shelf()
    entry(shelf, 1, "web")
    plain = entry(shelf, 2)
    assert shelf.lend("web", 4, None, OTHERS) is plain
    assert shelf.lend("web", 4, None, OTHERS) is None
    assert shelf.lend("web", 4, None, ()) is None, "a node's own address is in no netgroup"


async def test_who_waits_and_is_in_other_netgroups_is_passed_over_by_what_is_announced() -> None:
    shelf = Shelf()
    other, member = Waiter("web", 4, None, OTHERS), Waiter("web", 4, None, ("web",))
    for waiter in (other, member):
        shelf.wait(waiter)
    announced = entry(shelf, 1, "web")
    assert (other.granted.done(), member.granted.result()) == (False, announced)


def test_what_is_announced_goes_back_by_way_of_being_a_member_of_nothing() -> None:
    shelf = Shelf()
    announced, plain = entry(shelf, 1, "web"), entry(shelf, 2)
    for held in (announced, plain):
        shelf.withdraw(held)
    assert announced.state is AddressState.COOLING
    assert announced.record is not None
    assert announced.record.netgroups == []
    assert plain.record is None


@pytest.mark.parametrize(
    ("came", "plain"),
    [("", 1), ("m", 1), ("m" * 16, 1), ("o", 8), ("mo" * 8, 4), ("m" + "o" * 16, 8), ("o" * 4 + "m" * 16, 1)],
)
def test_what_is_kept_ready_is_divided_by_who_came_of_late(came: str, plain: int) -> None:
    stock = the(Shelf())
    for who in came:
        stock.note("web", ("web", "red") if who == "m" else OTHERS)
    assert (stock.share("web", 8, announced=False), stock.share("web", 8, announced=True)) == (
        plain,
        8 - plain,
    )


@given(came=st.lists(st.booleans(), max_size=20), target=st.integers(0, 40), more=st.floats(1, HIGH_WATER))
def test_never_more_are_asked_for_than_may_lie_ready(came: list[bool], target: int, more: float) -> None:
    stock = the(Shelf())
    for is_member in came:
        stock.note("web", () if is_member else OTHERS)
    shares = [stock.share("web", int(target * more), announced=announced) for announced in (True, False)]
    assert min(shares) >= 0
    assert sum(shares) <= HIGH_WATER * target


@pytest.mark.parametrize("warm_target", [0, 1, 2, 3, 7])
def test_a_small_stock_is_announced_until_somebody_comes_who_cannot_have_that(warm_target: int) -> None:
    stock = the(Shelf())
    assert stock.share("web", warm_target, announced=True) == warm_target
    stock.note("web", OTHERS)
    assert stock.share("web", warm_target, announced=False) == warm_target


def test_while_many_come_as_many_lie_ready_up_to_the_high_water_mark() -> None:
    now = 0.0
    stock = Stock(Shelf(), lambda: now)
    for _ in range(5):
        stock.note_add("web", ())
    assert [stock.wanted("web", target) for target in (0, 1, 4, 8)] == [0, HIGH_WATER, 5, 8]
    now = 2 * HEARD_WITHIN
    assert stock.wanted("web", 4) == 4


async def test_the_store_has_warm_addresses_announced_before_they_are_lent(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", "fd64::/64", warm=8)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 16)
    records = [r for r in (await stored(store)).values() if r.state is AddressState.WARM]
    assert sorted(r.netgroups for r in records) == [[], [], *([["prod"]] * 14)]


async def test_what_others_know_of_an_endpoint_while_the_store_is_away(
    faulty: FaultyStore, new_node: NewNode
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=8)
    node = new_node()
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 8)
    faulty.down = True
    (known,) = await node.add(net, "c2")
    (wider,) = await node.add(net, "c3", netgroups=("prod", "front"))
    (other,) = await node.add(net, "c4", netgroups=OTHERS)
    assert [held.ip for held in node.holder.unknown_to_others()] == [wider, other]
    with pytest.raises(TryAgain, match="no address is warm"):
        await node.add(net, "c5", netgroups=OTHERS)
    faulty.down = False
    await eventually(lambda: node.holder.unknown_to_others() == [])
    await eventually(node.is_quiet)
    assert (await stored(faulty.store))[known].state is AddressState.ASSIGNED


async def test_after_a_start_without_the_store_all_that_it_has_not_confirmed_counts_as_unknown(
    faulty: FaultyStore, new_node: NewNode
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=4)
    node = new_node()
    await node.start()
    before = await node.add(net, "c1")
    await warm_now(node, 4)
    faulty.down = True
    after = await node.add(net, "c2")
    assert node.holder.unknown_to_others() == []
    await node.crash()
    node.load()
    assert [held.ip for held in node.holder.unknown_to_others()] == after != before
    faulty.down = False
    node.serve()
    await eventually(lambda: node.holder.unknown_to_others() == [])


async def test_in_a_full_pool_members_of_other_netgroups_get_what_was_announced_once_others_have_heard(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "HEARD_WITHIN", 0.2)
    net = await network(store, "10.64.0.0/29", warm=4)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 4)
    taken = [await node.add(net, f"d{n}", netgroups=OTHERS) for n in range(5)]
    await eventually(node.is_quiet)
    found = await stored(store)
    assert all(found[ip].netgroups == ["front"] for (ip,) in taken)


async def test_an_announced_address_that_is_asked_for_by_name_is_a_member_of_nothing_before_it_is_lent(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "HEARD_WITHIN", 0.3)
    net = await network(store, "10.64.0.0/29", warm=2)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 2)
    ip = next(ip for ip, r in (await stored(store)).items() if r.netgroups == ["prod"])
    asking = asyncio.create_task(node.take(net, str(ip), netgroups=OTHERS))
    await stored_when(store, lambda found: found[ip].netgroups == [])
    assert not asking.done()
    assert [held.ip for held in await asking] == [ip]
    assert [held.ip for held in await node.take(net, netgroups=("prod",))] != [ip]


async def test_a_nodes_own_address_is_never_one_that_was_announced(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/29", warm=4)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 4)
    (own,) = await node.take(net, netgroups=())
    assert own.record is not None
    assert own.record.netgroups == []


async def test_what_is_given_back_is_a_member_of_nothing_before_it_is_free(
    store: Store, new_node: NewNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "HEARD_WITHIN", 0.4)
    net = await network(store, "10.64.0.0/29", warm=3)
    node = new_node(cooldown=60)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 3)
    giving = asyncio.create_task(node.holder._generosity.give_back_pool("10.64.0.0-29"))
    found = await stored_when(
        store, lambda found: sum(r.state is AddressState.COOLING for r in found.values()) == 3
    )
    assert all(r.netgroups == [] for r in found.values() if r.state is AddressState.COOLING)
    assert (await giving)["done"]
    assert len(await stored(store)) == 1


async def test_while_another_node_is_away_a_released_address_is_reused_last(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/29", warm=1)
    node = new_node(cooldown=0.02)
    node.others_away = True
    await node.start()
    first = await node.add(net, "c0")
    order = list(first)
    for n in range(1, 13):
        node.delete(order[-1])
        await eventually(lambda: node.states().get("cooling", 0) == 0 and node.is_quiet())
        order += await node.add(net, f"c{n}")
        await warm_now(node, 1)
    assert len(set(order[:6])) == 6, "each of the six once before the first comes again"
    assert order[6:12] == order[:6]


async def test_nobody_is_refused_because_another_node_is_away(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/30", warm=0)
    node = new_node(cooldown=0.02)
    node.others_away = True
    await node.start()
    taken = [await node.add(net, f"c{n}") for n in range(2)]
    for (ip,) in taken:
        node.delete(ip)
    assert sorted([await node.add(net, f"d{n}") for n in range(2)]) == sorted(taken)


async def test_while_all_are_there_a_cooled_address_lies_ready_again_with_one_write(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/29", warm=2)
    node = new_node(cooldown=0.02)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await warm_now(node, 2)
    node.delete(ip)
    found = await stored_when(store, lambda found: found[ip].state is AddressState.WARM)
    assert found[ip].netgroups == ["prod"]
