"""Taking and giving back: what an ADD and a DEL see."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from ipam import holder, keys, named, refill, stock, upkeep
from ipam.errors import AddressTaken, Exhausted, Fenced, InvalidInput, TryAgain
from ipam.networks import PoolSpec, create_network, set_pools_disabled
from ipam.records import AddressState, Network
from ipam.reservations import reserve
from ipam.shelf import Held, Shelf
from ipam.store import Delete, Store, Txn, TxnResult, read_prefix
from ipam.writer import StoreRewound
from isolator.errors import JournalUnwritable
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when, warm_now
from tests.patience import PATIENCE

NewNode = Callable[..., Node]


AT_ONCE = refill.REFILL_PATIENCE / 2
"""Seconds: whoever is not told waits for twice as long."""


def unwritable(*_: object) -> None:
    raise JournalUnwritable("the journal cannot be written (test)")


async def test_two_hundred_takes_at_once_with_eight_warm_get_distinct_addresses(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/22", warm=8)
    await node.start()
    node.assign(await node.take(net), "first")
    await warm_now(node, 8)
    taken = await asyncio.gather(*(node.add(net, f"c{i}") for i in range(200)))
    assert len({ips[0] for ips in taken}) == 200
    await eventually(node.is_quiet)
    assert sum(r.state is AddressState.ASSIGNED for r in (await stored(store)).values()) == 201


async def test_dual_stack_lends_one_address_of_each_family_ipv4_first(store: Store, node: Node) -> None:
    net = await network(store, "fd00:64::/64", "10.64.0.0/24")
    await node.start()
    assert [held.ip.version for held in await node.take(net)] == [4, 6]


async def test_dual_stack_is_all_or_nothing(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/127", warm=0)
    await node.start()
    for i in range(2):
        await node.add(net, f"c{i}")
    with pytest.raises(Exhausted, match="IPv6"):
        await node.take(net)
    await eventually(node.is_quiet)
    assert [ip for ip, held in node.holder._shelf.held.items() if held.lent] == []
    await stored_when(store, lambda found: all(r.state is AddressState.ASSIGNED for r in found.values()))


async def test_exhausted_lists_assigned_warm_and_cooling_by_node(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/29", warm=0)
    node = new_node(cooldown=60)
    await node.start()
    taken = [(await node.add(net, f"c{i}"))[0] for i in range(6)]
    await eventually(node.is_quiet)
    node.delete(taken[0])
    await eventually(node.is_quiet)
    with pytest.raises(Exhausted) as refused:
        await node.take(net)
    assert "10.64.0.0/29: 5 assigned, 0 warm, 1 cooling, 0 free (n1: 5 assigned, 1 cooling)" in str(
        refused.value
    )
    assert "add a pool" in str(refused.value)


async def test_exhausted_is_not_said_while_a_cooldown_ends_soon(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/30", warm=0)
    node = new_node(cooldown=0.3)
    await node.start()
    taken = [(await node.add(net, f"c{i}"))[0] for i in range(2)]
    node.delete(taken[0])
    await eventually(node.is_quiet)
    assert (await node.take(net))[0].ip == taken[0]


async def test_a_released_address_is_not_reused_before_the_cooldown_that_starts_when_the_store_has_confirmed(
    faulty: FaultyStore, new_node: NewNode
) -> None:
    net = await network(faulty.store, "10.64.0.1/32", warm=0)
    node = new_node(cooldown=0.3)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    faulty.down = True
    node.delete(ip)
    await asyncio.sleep(0.4)
    faulty.down = False
    up_at = time.monotonic()
    await eventually(node.is_quiet)
    assert (await node.take(net))[0].ip == ip
    assert time.monotonic() - up_at >= 0.3


async def test_the_address_released_longest_ago_is_taken_first(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/29", warm=0)
    node = new_node(cooldown=0.02)
    await node.start()
    taken = [(await node.add(net, f"c{i}"))[0] for i in range(6)]
    for ip in (taken[4], taken[1], taken[3]):
        node.delete(ip)
        await eventually(lambda ip=ip: node.holder.held(ip) is None)
    again = [(await node.add(net, "x"))[0] for _ in range(3)]
    assert again == [taken[4], taken[1], taken[3]]


async def test_a_static_address_that_is_held_names_its_holder(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c1", "10.64.0.9")
    with pytest.raises(AddressTaken, match=r"10\.64\.0\.9 belongs to container c1 \(eth0\) on node n1"):
        await node.take(net, "10.64.0.9")


async def test_a_static_address_of_another_node_names_its_holder(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    one, two = new_node("n1"), new_node("n2")
    await one.start()
    await two.start()
    await one.add(net, "c1", "10.64.0.9")
    await eventually(one.is_quiet)
    with pytest.raises(AddressTaken, match=r"container c1 \(eth0\) on node n1"):
        await two.take(net, "10.64.0.9")
    assert two.holder.held(ip_address("10.64.0.9")) is None


async def test_a_cooling_static_address_says_for_how_long(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    node = new_node(cooldown=30)
    await node.start()
    node.delete(*(await node.add(net, "c1", "10.64.0.9")))
    await eventually(node.is_quiet)
    with pytest.raises(TryAgain, match="cools down for another 30 s"):
        await node.take(net, "10.64.0.9")


async def test_a_static_address_that_is_being_taken_is_refused_to_a_second_asker(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    answers = await asyncio.gather(*(node.take(net, "10.64.0.9") for _ in range(5)), return_exceptions=True)
    assert [type(a) for a in answers].count(list) == 1
    assert all(isinstance(a, (list, AddressTaken)) for a in answers)


@pytest.mark.parametrize(
    ("ip", "message"),
    [
        ("10.99.0.1", "in no pool of network prod; its pools are 10.64.0.0/24"),
        ("10.64.0.0", "excluded from pool"),
        ("fd00::1", "in no pool"),
    ],
)
async def test_a_static_address_that_makes_no_sense_is_refused(
    store: Store, node: Node, ip: str, message: str
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    with pytest.raises(InvalidInput, match=message):
        await node.take(net, ip)


async def test_two_static_addresses_of_one_family_are_refused(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    with pytest.raises(InvalidInput, match="two addresses of one family"):
        await node.take(net, "10.64.0.8", "10.64.0.9")


async def test_an_address_of_a_static_range_is_only_given_by_name(store: Store, node: Node) -> None:
    net = await create_network(
        store,
        Network(name="prod", pools=[], warm=2),
        [PoolSpec("10.64.0.0/29", static=("10.64.0.1-10.64.0.4",))],
    )
    await node.start()
    lent = await node.take(net, "10.64.0.2")
    node.holder.put_back(lent)
    others = [(await node.add(net, f"c{i}"))[0] for i in range(2)]
    assert {str(ip) for ip in others} == {"10.64.0.5", "10.64.0.6"}
    with pytest.raises(Exhausted):
        await node.take(net)


async def test_a_static_address_whose_asker_gave_up_is_given_to_nobody_else(
    faulty: FaultyStore, node: Node
) -> None:
    net = await create_network(
        faulty.store,
        Network(name="prod", pools=[], warm=0),
        [PoolSpec("10.64.0.0/29", static=("10.64.0.0/29",))],
    )
    await node.start()
    faulty.fault = lambda _: "late"
    asking = asyncio.create_task(node.take(net, "10.64.0.2"))
    await eventually(lambda: faulty.late)
    asking.cancel()
    waiting = asyncio.create_task(node.take(net))
    await asyncio.sleep(0.02)
    faulty.fault = lambda _: ""
    with pytest.raises(TryAgain):
        await waiting
    await stored_when(faulty.store, lambda found: not found)
    await eventually(lambda: node.holder.held(ip_address("10.64.0.2")) is None)


async def test_a_pool_asked_for_by_name_is_the_one_used(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", "10.65.0.0/24")
    await node.start()
    await node.add(net, "warm-up")
    await warm_now(node, 4)
    (held,) = await node.take(net, pool="10.65.0.0/24")
    assert str(held.ip).startswith("10.65.")
    with pytest.raises(
        InvalidInput, match=r"no pool '10\.66\.0\.0/24'; it has 10\.64\.0\.0/24, 10\.65\.0\.0/24"
    ):
        await node.take(net, pool="10.66.0.0/24")


async def test_the_second_pool_is_used_when_the_first_is_full(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/30", "10.65.0.0/30", warm=0)
    await node.start()
    taken = [str((await node.add(net, f"c{i}"))[0]) for i in range(4)]
    assert [ip[:5] for ip in taken] == ["10.64", "10.64", "10.65", "10.65"]


# -- reservations


async def test_a_reserved_address_is_given_to_its_key_only(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/30", warm=0)
    await reserve(store, ip_address("10.64.0.1"), "db")
    await node.start()
    assert str((await node.add(net, "c1"))[0]) == "10.64.0.2"
    with pytest.raises(Exhausted):
        await node.take(net)
    with pytest.raises(AddressTaken, match="is reserved"):
        await node.take(net, "10.64.0.1")
    assert str((await node.add(net, "c2", reservation="db"))[0]) == "10.64.0.1"


async def test_a_refill_does_not_take_an_address_reserved_since_the_catalogue_was_read(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/30", warm=0)
    node.load()
    await node.holder.sync()
    await reserve(store, ip_address("10.64.0.1"), "db")
    serving = asyncio.create_task(node.holder.serve())  # and nobody follows the catalogue
    assert str((await node.take(net))[0].ip) == "10.64.0.2"
    assert node.holder.status()["transactions"] < 10
    serving.cancel()


async def test_a_reservation_made_a_moment_ago_is_found(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    await reserve(store, ip_address("10.64.0.7"), "db")
    assert str((await node.take(net, reservation="db"))[0].ip) == "10.64.0.7"


async def test_an_unknown_reservation_key_is_refused_with_the_command_that_makes_one(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    with pytest.raises(InvalidInput, match="moorage ip reserve IP --key KEY"):
        await node.take(net, reservation="nope")


async def test_of_a_reservation_that_is_not_known_here_nothing_is_said_while_the_store_is_away(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24")
    await node.start()
    await reserve(faulty.store, ip_address("10.64.0.7"), "db")
    faulty.down = True
    with pytest.raises(TryAgain, match="the reservation 'db' is not known here"):
        await node.take(net, reservation="db")


async def test_the_same_key_gets_its_address_again_without_cooldown(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/24")
    await reserve(store, ip_address("10.64.0.7"), "db")
    node = new_node(cooldown=60)
    await node.start()
    (ip,) = await node.add(net, "c1", reservation="db")
    await eventually(node.is_quiet)
    node.delete(ip)
    assert await node.add(net, "c2", reservation="db") == [ip]
    record = (await stored_when(store, lambda found: found[ip].container_id == "c2"))[ip]
    assert record.state is AddressState.ASSIGNED


async def test_an_add_with_a_reservation_waits_for_the_last_holder_to_be_gone(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/24")
    await reserve(store, ip_address("10.64.0.7"), "db")
    node = new_node(cooldown=60)
    await node.start()
    (ip,) = await node.add(net, "c1", reservation="db")
    waiting = asyncio.create_task(node.add(net, "c2", reservation="db"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    node.delete(ip)
    assert await waiting == [ip]


async def test_an_add_with_a_reservation_gives_up_when_the_last_holder_stays(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "HANDOVER_PATIENCE", 0.1)
    net = await network(store, "10.64.0.0/24")
    await reserve(store, ip_address("10.64.0.7"), "db")
    await node.start()
    await node.add(net, "c1", reservation="db")
    with pytest.raises(AddressTaken, match="container c1"):
        await node.take(net, reservation="db")


async def test_an_address_taken_early_by_its_reservation_and_put_back_cools_down_all_the_same(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await reserve(store, ip_address("10.64.0.7"), "db")
    node = new_node(cooldown=0.15)
    await node.start()
    (ip,) = await node.add(net, "c1", reservation="db")
    node.delete(ip)
    await eventually(node.is_quiet)
    lent = await node.take(net, reservation="db")
    await asyncio.sleep(0.25)
    node.holder.put_back(lent)
    await stored_when(store, lambda found: not found)


async def test_of_two_addresses_under_one_key_the_free_one_is_given(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    for ip in ("10.64.0.7", "10.64.0.8"):
        await reserve(store, ip_address(ip), "db")
    await node.start()
    taken = [(await node.add(net, f"c{i}", reservation="db"))[0] for i in range(2)]
    assert {str(ip) for ip in taken} == {"10.64.0.7", "10.64.0.8"}


async def test_an_address_reserved_while_it_is_warm_is_given_to_nobody_else(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/29", warm=6)
    await node.start()
    await node.add(net, "c1")
    await eventually(node.is_quiet)
    await reserve(store, ip_address("10.64.0.5"), "db")
    await eventually(lambda: node.holder.held(ip_address("10.64.0.5")) is None)
    taken = [str((await node.add(net, f"x{i}"))[0]) for i in range(4)]
    assert "10.64.0.5" not in taken


# -- the store is away


async def test_warm_addresses_are_given_out_while_the_store_is_away(faulty: FaultyStore, node: Node) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=4)
    await node.start()
    await node.add(net, "c0")
    await warm_now(node, 4)
    faulty.down = True
    for i in range(4):
        await node.add(net, f"c{i + 1}")
    with pytest.raises(TryAgain, match="does not answer"):
        await asyncio.wait_for(node.take(net), AT_ONCE)


async def test_who_waits_is_told_at_once_when_the_store_goes_away(faulty: FaultyStore, node: Node) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await eventually(node.is_quiet)
    faulty.down = True
    with pytest.raises(TryAgain, match="does not answer"):
        await asyncio.wait_for(node.take(net), AT_ONCE)


async def test_who_asks_by_name_is_told_at_once_when_the_store_goes_away(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await eventually(node.is_quiet)
    faulty.down = True
    with pytest.raises(TryAgain):
        await asyncio.wait_for(node.take(net, "10.64.0.9"), AT_ONCE)


async def test_an_assignment_and_a_release_are_confirmed_when_the_store_has_them(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=4)
    await node.start()
    ips = await node.add(net, "c1")
    await node.holder.confirmed(ips)
    assert (await stored(faulty.store))[ips[0]].container_id == "c1"
    faulty.faults("reply lost", "refused")
    node.delete(*ips)
    await node.holder.confirmed(ips)
    assert (await stored(faulty.store))[ips[0]].state is AddressState.COOLING


async def test_static_addresses_can_be_asked_for_again_after_the_store_was_broken(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    faulty.faults("refused", "broken")
    with pytest.raises(TryAgain):
        await asyncio.wait_for(node.take(net, "10.64.0.9"), AT_ONCE)
    await eventually(lambda: not node.holder.problem)
    assert await node.take(net, "10.64.0.9")


async def test_a_take_that_gets_nothing_in_time_says_where_to_look(
    faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "REFILL_PATIENCE", 0.05)
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    node.load()
    await node.holder.sync()
    with pytest.raises(TryAgain, match="moorage network show prod"):
        await node.take(net)


async def test_an_address_granted_in_the_moment_its_waiter_is_cancelled_is_not_lost(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.1/32", warm=1)
    node.load()
    await node.holder.sync()
    waiting = asyncio.create_task(node.take(net))
    await asyncio.sleep(0)
    shelf = node.holder._shelf
    (waiter,) = shelf.waiters("prod", 4)

    def offer(held: Held) -> None:
        Shelf.offer(shelf, held)
        waiting.cancel()

    monkeypatch.setattr(shelf, "offer", offer)
    node.serve()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    monkeypatch.undo()
    assert waiter.granted.done()
    assert not waiter.granted.cancelled()
    assert [str(held.ip) for held in await node.take(net)] == ["10.64.0.1"]


@pytest.mark.parametrize("seed", range(6))
async def test_takes_cancelled_at_any_moment_leave_nothing_behind(
    store: Store, node: Node, seed: int
) -> None:
    dice = random.Random(seed)
    net = await create_network(
        store,
        Network(name="prod", pools=[], warm=2),
        [PoolSpec("10.64.0.0/27", static=("10.64.0.24-10.64.0.30",)), PoolSpec("fd00::/122")],
    )
    await node.start()
    takes = [
        asyncio.create_task(node.take(net, *([f"10.64.0.{24 + i % 7}"] if i % 3 == 0 else [])))
        for i in range(20)
    ]
    for take in takes:
        await asyncio.sleep(dice.choice([0, 0, 0.001, 0.003]))
        if dice.random() < 0.7:
            take.cancel()
    for answer in await asyncio.gather(*takes, return_exceptions=True):
        if isinstance(answer, list):
            node.holder.put_back(answer)
    await eventually(node.is_quiet)
    assert [held.ip for held in node.holder._shelf.held.values() if held.lent] == []
    assert node.holder._shelf.waiters("prod", 4) == []
    found = await stored_when(store, lambda found: len(found) <= 8)
    assert all(r.state is AddressState.WARM for r in found.values())
    assert len(found) >= 4


# -- the journal


async def test_a_journal_that_cannot_be_written_keeps_nothing_from_being_released(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    monkeypatch.setattr(node.journal, "_run", unwritable)
    node.holder.accept(node.holder.plan_release([ip]))
    await stored_when(store, lambda found: ip not in found or found[ip].state is AddressState.COOLING)


async def test_an_address_is_not_given_away_before_the_journal_has_forgotten_it(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 2)
    monkeypatch.setattr(node.journal, "_run", unwritable)
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await asyncio.sleep(0.2)
    assert len(await stored(store)) == 3
    monkeypatch.undo()
    await stored_when(store, lambda found: len(found) == 1)


async def test_an_address_is_not_given_away_before_that_is_on_the_disk(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 2)

    async def broken() -> None:
        raise JournalUnwritable("Input/output error (test)")

    monkeypatch.setattr(upkeep, "JOURNAL_RETRY", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(node.journal, "make_durable", broken)
        await set_pools_disabled(store, ["10.64.0.0-24"], True)
        await asyncio.sleep(0.2)
        assert len(await stored(store)) == 3
    await stored_when(store, lambda found: len(found) == 1)


async def test_an_unwritable_journal_is_caught_up_with_when_its_disk_is_mended(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24", warm=3)
    await node.start()
    await eventually(node.is_quiet)
    with monkeypatch.context() as patch:
        # The block's claim is journalled first, so one is needed before.
        lent = await node.take(net)
        patch.setattr(node.journal, "_run", unwritable)
        more = [await node.take(net) for _ in range(4)]
    await eventually(lambda: not node.holder._holdings.has_unsaved)
    taken = {held.ip for held in [*lent, *(h for m in more for h in m)]}
    assert taken <= {row.ip for row in node.journal.load_addresses()}


# -- nothing leaks


async def test_after_everything_was_released_only_warm_addresses_and_blocks_remain(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/23", "fd00:64::/64", warm=3)
    await node.start()
    taken = await asyncio.gather(*(node.add(net, f"c{i}") for i in range(80)))
    await eventually(node.is_quiet)
    node.delete(*(ip for ips in taken for ip in ips))
    found = await stored_when(store, lambda found: all(r.state is AddressState.WARM for r in found.values()))
    await eventually(node.is_quiet)
    found = await stored(store)
    assert all(3 <= sum(ip.version == family for ip in found) <= 6 for family in (4, 6))
    assert {row.ip for row in node.journal.load_addresses()} == set(found)
    assert not node.holder._shelf._waiters


async def test_a_disabled_pool_gets_its_warm_addresses_and_blocks_back(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await warm_now(node, 4)
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await stored_when(store, lambda found: set(found) == {ip})
    node.delete(ip)
    await stored_when(store, lambda found: not found)

    async def no_blocks() -> bool:
        return not (await read_prefix(store, keys.BLOCKS))[0]

    async with asyncio.timeout(PATIENCE):
        while not await no_blocks():
            await asyncio.sleep(0.01)
    assert node.journal.load_blocks() == []
    with pytest.raises(Exhausted, match="disabled"):
        await node.take(net)


async def test_a_preloaded_network_is_warm_before_it_is_used_and_gives_back_when_disabled(
    store: Store, node: Node
) -> None:
    await network(store, "10.64.0.0/24", warm=4, preload=True)
    await node.start()
    await stored_when(store, lambda found: len(found) == 4)
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await stored_when(store, lambda found: not found)


async def test_more_blocks_than_fit_a_group_are_given_back(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=0, block_size=31)
    await node.start()
    taken = await asyncio.gather(*(node.add(net, f"c{i}") for i in range(200)))
    await eventually(node.is_quiet)
    node.delete(*(ip for ips in taken for ip in ips))
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await stored_when(store, lambda found: not found)
    await eventually(lambda: not node.holder.status()["blocks"])
    assert not (await read_prefix(store, keys.BLOCKS))[0]


async def test_an_address_that_another_node_had_in_our_block_is_ours_again_when_it_is_free(
    store: Store, new_node: NewNode
) -> None:
    net = await network(store, "10.64.0.0/30", warm=0)
    one, two = new_node("n1"), new_node("n2", cooldown=0.0)
    await one.start()
    await two.start()
    assert await two.add(net, "c", "10.64.0.2")
    assert str((await one.add(net, "c1"))[0]) == "10.64.0.1"
    with pytest.raises(Exhausted):
        await one.take(net)
    two.delete(ip_address("10.64.0.2"))
    await stored_when(store, lambda found: len(found) == 1)
    assert str((await one.add(net, "c2"))[0]) == "10.64.0.2"


async def test_an_exhausted_pool_with_a_warm_shortage_costs_nothing_while_idle(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/30", warm=8)
    await node.start()
    await node.add(net, "c1")
    await node.add(net, "c2")
    await eventually(node.is_quiet)
    before = node.holder.status()["transactions"]
    gathered = 0
    real = node.holder._upkeep._gather

    async def counting() -> object:
        nonlocal gathered
        gathered += 1
        return await real()

    node.holder._upkeep._gather = counting
    await asyncio.sleep(0.3)
    assert gathered <= 2
    assert node.holder.status()["transactions"] == before


async def test_a_block_that_cannot_be_returned_because_it_is_used_again_costs_nothing(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    await node.add(net, "c1")
    await set_pools_disabled(store, ["10.64.0.0-24"], True)
    await eventually(lambda: node.is_quiet() and node.catalogue.pools()[0].disabled)
    work = node.holder._upkeep
    (block,) = node.holder._holdings.blocks
    work._return_after[block] = asyncio.get_running_loop().time() - 1  # it was refused, a while ago
    rounds, real = 0, work._gather

    async def counting() -> object:
        nonlocal rounds
        rounds += 1
        return await real()

    work._gather = counting
    node.holder._holdings.wake.set()
    await asyncio.sleep(0.1)
    assert rounds <= 2


async def test_a_burst_that_is_put_back_is_trimmed_to_the_high_water_mark_and_stays(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    lent = [held for take in await asyncio.gather(*(node.take(net) for _ in range(50))) for held in take]
    node.holder.put_back(lent)
    # Each kind has its own mark, and what is rounded goes to the plain ones.
    await stored_when(store, lambda found: len(found) <= 4 * stock.HIGH_WATER + 1)
    await eventually(node.is_quiet)
    before = node.holder.status()["transactions"]
    await asyncio.sleep(0.1)
    assert node.holder.status()["transactions"] == before


async def test_an_address_that_vanished_from_the_store_while_assigned_is_asserted_when_released(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    await store.txn(Txn(then=(Delete(keys.address_key(ip)),)))
    node.delete(ip)
    await stored_when(store, lambda found: not found)
    await eventually(lambda: node.holder.held(ip) is None)


async def test_facts_of_the_last_owner_are_not_the_next_owners(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await reserve(store, ip_address("10.64.0.7"), "db")
    await node.start()
    lent = await node.take(net, reservation="db")
    held = lent[0]
    assert held.record is not None
    held.record = held.record.with_(app="/old", task="old.1", framework="f")
    (ip,) = node.assign(lent, "c1", "db")
    record = (await stored_when(store, lambda found: found[ip].container_id == "c1"))[ip]
    assert (record.app, record.task, record.framework) == ("", "", "")


async def test_who_is_told_of_another_agent_while_it_writes_syncs_again_although_nothing_is_left_to_write(
    store: Store, faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c")
    await eventually(node.is_quiet)
    sent = faulty.txn

    async def told_meanwhile(txn: Txn) -> TxnResult:
        result = await sent(txn)
        node.holder.fenced(Fenced("another agent took over node n1 (test)"))
        monkeypatch.setattr(faulty, "txn", sent)
        return result

    monkeypatch.setattr(faulty, "txn", told_meanwhile)
    await node.add(net, "c2")
    await eventually(lambda: faulty.txn == sent)
    await eventually(node.is_quiet)
    await node.add(net, "c3")


async def test_who_is_told_of_another_agent_while_it_syncs_syncs_again(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await network(store, "10.64.0.0/24")
    node.load()
    refresh = node.catalogue.refresh

    async def told_meanwhile() -> int:
        monkeypatch.setattr(node.catalogue, "refresh", refresh)
        node.holder.fenced(Fenced("another agent took over node n1 (test)"))
        return await refresh()

    monkeypatch.setattr(node.catalogue, "refresh", told_meanwhile)
    await node.holder.sync()
    assert "another agent" in node.holder.problem
    assert not node.holder.serves


async def test_a_store_that_comes_into_doubt_while_it_is_read_is_read_once_more(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await network(store, "10.64.0.0/24")
    node.load()
    await node.holder.continuity.verify()
    refresh = node.catalogue.refresh

    async def doubted_meanwhile() -> int:
        monkeypatch.setattr(node.catalogue, "refresh", refresh)
        await node.holder.continuity.move("a test doubts it")
        return await refresh()

    monkeypatch.setattr(node.catalogue, "refresh", doubted_meanwhile)
    with pytest.raises(StoreRewound, match="read once more"):
        await node.holder.sync()
    assert node.holder.problem
    await node.holder.sync()
    assert not node.holder.problem
