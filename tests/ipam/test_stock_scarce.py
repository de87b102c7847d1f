"""When what lies ready is for others than those who come: who gets it, when, and who is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from ipam import holdings
from ipam.errors import AddressTaken, Exhausted, MoorageError, TryAgain
from ipam.holdings import warm
from ipam.keys import IPAddress
from ipam.networks import delete_network, set_pools_disabled
from ipam.records import AddressState
from ipam.shelf import Held, Shelf, doubtful
from ipam.stock import Stock
from ipam.store import Store, Txn
from ipam.store.base import TxnResult
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when, warm_now

NewNode = Callable[..., Node]

OTHERS = ("front",)
NEVER = 3600.0


@pytest.fixture
def heard_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "HEARD_WITHIN", 0.2)


@pytest.fixture
def never_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes have heard of nothing yet: what is announced no more is nobody's."""
    monkeypatch.setattr(holdings, "HEARD_WITHIN", NEVER)


class SlowStore(FaultyStore):
    """delay: seconds that every transaction takes."""

    delay = 0.0

    async def txn(self, txn: Txn) -> TxnResult:
        await asyncio.sleep(self.delay)
        return await super().txn(txn)


async def full(store: Store, node: Node, members: int) -> object:
    """A network with six addresses of which members have some, and all others lie ready announced."""
    net = await network(store, "10.64.0.0/29", warm=8)
    await node.start()
    for n in range(members):
        await node.add(net, f"m{n}")
    await warm_now(node, 6 - members)
    return net


async def announced(store: Store) -> list[IPAddress]:
    found = await stored(store)
    return [ip for ip, r in found.items() if r.state is AddressState.WARM and r.netgroups == ["prod"]]


@pytest.mark.usefixtures("heard_soon")
@pytest.mark.parametrize(("members", "others"), [(5, 2), (3, 4)])
async def test_of_more_than_there_are_addresses_the_last_ones_are_refused_and_the_others_get_theirs(
    store: Store, new_node: NewNode, members: int, others: int
) -> None:
    node = new_node(cooldown=30)
    net = await full(store, node, members)
    got = await asyncio.gather(
        *(node.add(net, f"f{n}", netgroups=OTHERS) for n in range(others)), return_exceptions=True
    )
    assert [isinstance(result, list) for result in got] == [True] * (6 - members) + [False] * (
        members + others - 6
    )
    assert all(isinstance(result, list | Exhausted) for result in got)


@pytest.mark.usefixtures("never_heard")
async def test_who_comes_while_the_last_address_is_on_its_way_to_somebody_is_refused_alone(
    store: Store, new_node: NewNode
) -> None:
    node = new_node(cooldown=30)
    net = await full(store, node, 5)
    first = asyncio.create_task(node.add(net, "f", netgroups=OTHERS))
    await stored_when(store, lambda found: all(not r.netgroups for r in found.values()))
    with pytest.raises(Exhausted):
        await node.add(net, "m")
    assert not first.done()
    first.cancel()


async def test_what_is_on_its_way_back_to_its_pool_is_for_who_comes_meanwhile(
    store: Store, new_node: NewNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "HEARD_WITHIN", 0.4)
    node = new_node(cooldown=30)
    net = await full(store, node, 5)
    giving = asyncio.create_task(node.holder._generosity.give_back_pool("10.64.0.0-29"))
    await stored_when(store, lambda found: any(r.is_withdrawn for r in found.values()))
    (ip,) = await node.add(net, "f", netgroups=OTHERS)
    await eventually(node.is_quiet)
    assert (await stored(store))[ip].netgroups == ["front"]
    await giving


@pytest.mark.usefixtures("heard_soon")
async def test_an_address_named_while_it_comes_as_an_announced_one_is_plain_before_it_is_lent(
    store: Store, new_node: NewNode
) -> None:
    slow = SlowStore(store)
    net = await network(store, "10.64.0.0/24", warm=4)
    node = new_node(store=slow, cooldown=30)
    await node.start()
    slow.delay = 0.1
    first = asyncio.create_task(node.add(net, "c1"))

    def asked_for() -> list[Held]:
        return [h for h in node.holder._shelf.held.values() if h.is_asked_for and h.is_announced]

    ip = (await eventually(asked_for))[-1].ip
    (held,) = await node.take(net, str(ip), netgroups=OTHERS)
    assert held.record is not None
    assert (held.ip, held.record.netgroups, held.told, held.is_silent) == (ip, [], (), False)
    await first


async def test_while_a_node_is_away_nobody_of_other_netgroups_names_an_announced_address(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 4)
    ip = (await announced(store))[0]
    node.others_away = True
    with pytest.raises(TryAgain, match=r"a node is away .*ask for another address"):
        await node.take(net, str(ip), netgroups=OTHERS)
    assert [held.ip for held in await node.take(net, str(ip))] == [ip]
    free = ip_address("10.64.0.200")
    assert [held.ip for held in await node.take(net, str(free), netgroups=OTHERS)] == [free]


async def test_while_a_node_is_away_no_other_node_talks_an_announced_address_out_of_its_holder(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    holder, asker = new_node("n1", cooldown=30), new_node("n2", cooldown=30)
    for node in (holder, asker):
        await node.start()
        await node.join()
    await holder.add(net, "c1")
    await warm_now(holder, 4)
    ip = (await announced(store))[0]
    holder.others_away = asker.others_away = True
    with pytest.raises(AddressTaken, match=r"a node is away .*ask for another address"):
        await asker.take(net, str(ip), netgroups=OTHERS)
    holder.others_away = asker.others_away = False
    assert [held.ip for held in await asker.take(net, str(ip), netgroups=OTHERS)] == [ip]


@pytest.mark.usefixtures("never_heard")
async def test_two_announced_addresses_that_are_named_become_plain_in_the_same_moment(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", "fd64::/64", warm=2)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 4)
    named = {ip.version: ip for ip in await announced(store)}
    four, six = named[4], named[6]
    asking = asyncio.create_task(node.take(net, str(four), str(six), netgroups=OTHERS))
    await stored_when(store, lambda found: found[four].netgroups == found[six].netgroups == [])
    assert not asking.done()
    asking.cancel()


async def named_and_given_up(store: Store, node: Node) -> tuple[object, IPAddress]:
    """A full network, and of it an announced address that somebody asked for by name, and then did not wait for."""
    net = await full(store, node, 5)
    (ip,) = await announced(store)
    asking = asyncio.create_task(node.take(net, str(ip), netgroups=OTHERS))
    await stored_when(store, lambda found: found[ip].netgroups == [])
    await eventually(node.is_quiet)
    asking.cancel()
    return net, ip


@pytest.mark.usefixtures("never_heard")
async def test_an_address_whose_asker_is_gone_is_nobodys_before_others_have_heard(
    store: Store, new_node: NewNode
) -> None:
    node = new_node(cooldown=30)
    net, _ = await named_and_given_up(store, node)
    third = asyncio.create_task(node.take(net, netgroups=("thirds",)))
    await asyncio.sleep(0.2)
    assert not third.done()
    third.cancel()


@pytest.mark.usefixtures("heard_soon")
async def test_an_address_whose_asker_is_gone_is_for_the_next_one_once_others_have_heard(
    store: Store, new_node: NewNode
) -> None:
    node = new_node(cooldown=30)
    net, ip = await named_and_given_up(store, node)
    assert [held.ip for held in await node.take(net, netgroups=("thirds",))] == [ip]


@pytest.mark.usefixtures("never_heard")
async def test_a_start_offers_nothing_of_which_others_may_not_have_heard(
    store: Store, new_node: NewNode
) -> None:
    node = new_node(cooldown=30)
    net = await full(store, node, 5)
    (ip,) = await announced(store)
    asking = asyncio.create_task(node.add(net, "f", netgroups=OTHERS))
    await stored_when(store, lambda found: found[ip].netgroups == [])
    await eventually(node.is_quiet)
    await node.crash()
    asking.cancel()
    node.load()
    assert node.holder._shelf.warm_count("prod", 4) == 0
    await node.holder.sync()
    assert node.holder._shelf.warm_count("prod", 4) == 0
    assert [held.ip for held in node.holder._shelf.coming()] == [ip]


@pytest.mark.usefixtures("heard_soon")
async def test_of_a_pool_that_is_named_its_own_addresses_count(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/29", "10.65.0.0/24", warm=8)
    node = new_node(cooldown=30)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 8)
    (held,) = await node.take(net, pool="10.64.0.0/29", netgroups=OTHERS)
    assert held.is_of("10.64.0.0-29")


async def test_who_asks_a_node_while_its_addresses_are_on_their_way_back_waits_for_them(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/28", warm=13, block_size=28)
    nodes = [new_node(f"n{n}", cooldown=30) for n in range(4)]
    for node in nodes:
        await node.start()
        await node.join()
    await nodes[0].add(net, "c1")
    await warm_now(nodes[0], 13)

    async def add(node: Node, after: float) -> None:
        await asyncio.sleep(after)
        await node.add(net, "d", netgroups=OTHERS)

    await asyncio.gather(*(add(node, 0.1 * n) for n, node in enumerate(nodes[1:])))


@pytest.mark.usefixtures("never_heard")
async def test_what_comes_plain_for_others_is_not_taken_by_a_member_for_whom_something_announced_comes(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/29", warm=0)
    node = new_node(cooldown=30)
    await node.start()
    got = await asyncio.gather(
        *(node.add(net, f"c{n}", netgroups=OTHERS if n else None) for n in range(6)), return_exceptions=True
    )
    assert [error for error in got if isinstance(error, MoorageError)] == []


def test_both_kinds_together_stay_below_the_high_water_mark_and_the_one_with_too_many_gives_way() -> None:
    shelf = Shelf()
    stock = Stock(shelf, lambda: 0.0)
    entries = []
    for n in range(16 + 7):
        held = Held(ip_address("10.64.0.0") + n, warm("n1", "web", "p", ("web",) * (n >= 16)), revision=5)
        shelf.add(held)
        shelf.offer(held)
        entries.append(held)
    assert stock.surplus("web", 4, 8) == entries[15:8:-1]
    assert stock.surplus("web", 4, 12) == []


async def test_a_network_is_deleted_while_what_was_warm_of_its_disabled_pools_goes_back(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await warm_now(node, 4)
    node.holder.give_up(ip)
    await eventually(node.is_quiet)
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await stored_when(store, lambda found: any(r.is_withdrawn for r in found.values()))
    await delete_network(store, "prod")


@pytest.mark.usefixtures("heard_soon")
async def test_after_a_start_what_was_on_its_way_back_is_free_as_soon_as_before(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    node = new_node(cooldown=NEVER)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 4)
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await stored_when(store, lambda found: any(r.is_withdrawn for r in found.values()))
    await node.restart()
    await stored_when(store, lambda found: len(found) == 1)


def test_what_somebody_may_have_had_cools_as_if_somebody_had() -> None:
    assert not doubtful(warm("n1", "web", "p", ("web",))).is_withdrawn


async def test_the_outbox_is_counted_once_for_a_group_of_writes_however_many_networks_there_are(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = [await network(store, f"10.{n}.0.0/16", f"fd{n}::/64", name=f"net{n}") for n in range(10, 15)]
    await node.start()
    for net in nets:
        await node.add(net, f"c-{net.name}")
    await eventually(node.is_quiet)
    shelf, counted = node.holder._shelf, 0
    coming = shelf.coming

    def count() -> list[Held]:
        nonlocal counted
        counted += 1
        return coming()

    monkeypatch.setattr(shelf, "coming", count)
    assert await node.holder._upkeep._gather() == []
    assert counted == 1
