"""The shelf's bookkeeping, one rule at a time."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from ipam.allocator import BlockSpace
from ipam.holdings import warm
from ipam.pools import Geometry, geometry, parse_pool
from ipam.records import AddressState
from ipam.shelf import Held, Shelf, Waiter, cooling

BLOCK = ip_network("10.64.0.0/29")


def pool(**options: object) -> Geometry:
    return geometry(parse_pool("10.64.0.0/29", network="prod", **options))


def held(shelf: Shelf, n: int = 1) -> Held:
    entry = Held(ip_address("10.64.0.0") + n, warm("n1", "prod", "10.64.0.0-29"), revision=5)
    shelf.add(entry)
    return entry


def test_an_address_offered_twice_is_lent_once() -> None:
    shelf = Shelf()
    entry = held(shelf)
    shelf.offer(entry)
    shelf.offer(entry)
    assert shelf.lend("prod", 4, None) is entry
    assert shelf.lend("prod", 4, None) is None


def test_a_lent_address_is_not_offered() -> None:
    shelf = Shelf()
    entry = held(shelf)
    shelf.lend_this(entry)
    shelf.offer(entry)
    assert shelf.lend("prod", 4, None) is None


def test_an_address_that_is_written_once_more_is_not_lent_meanwhile() -> None:
    shelf = Shelf()
    entry = held(shelf)
    shelf.offer(entry)
    shelf.want(entry, entry.record)
    assert shelf.lend("prod", 4, None) is None


def test_putting_back_what_was_dropped_meanwhile_changes_nothing() -> None:
    shelf = Shelf()
    entry = shelf.lend_this(held(shelf))
    shelf.drop(entry, reusable=False)
    shelf.put_back(entry)
    assert shelf.lend("prod", 4, None) is None
    assert not shelf.held


def test_dropping_an_entry_leaves_its_successor_alone() -> None:
    shelf = Shelf()
    old = held(shelf)
    shelf.drop(old, reusable=True)
    new = held(shelf)
    shelf.drop(old, reusable=True)
    assert shelf.held == {new.ip: new}


def test_a_dropped_address_does_not_come_back_when_its_cooldown_ends() -> None:
    shelf = Shelf()
    entry = held(shelf)
    assert entry.record is not None
    entry.record = cooling(entry.record)
    shelf.cool(entry, 1.0)
    shelf.drop(entry, reusable=False)
    assert shelf.cooled(2.0) == []


def test_cooled_returns_each_once_and_not_those_released_anew() -> None:
    shelf = Shelf()
    first, second = held(shelf, 1), held(shelf, 2)
    for entry in (first, second):
        assert entry.record is not None
        entry.record = cooling(entry.record)
        shelf.cool(entry, 1.0)
    shelf.want(second, second.record)
    shelf.cool(second, 3.0)
    assert shelf.cooled(2.0) == [first]
    assert shelf.cooled(4.0) == [second]


def test_one_lent_while_it_cooled_cools_on_when_it_is_put_back_whether_or_not_its_time_had_come() -> None:
    for moment in (0.5, 1.5):
        shelf = Shelf()
        entry = held(shelf)
        assert entry.record is not None
        entry.record = cooling(entry.record)
        shelf.cool(entry, 1.0)
        shelf.lend_this(entry)
        assert shelf.cooled(moment) == []
        shelf.put_back(entry)
        assert shelf.cooled(2.0) == [entry]


def test_an_address_that_nobody_may_have_unasked_leaves_instead_of_being_offered() -> None:
    shelf = Shelf(may_be_warm=lambda _: False)
    entry = held(shelf)
    shelf.offer(entry)
    assert entry.record is None
    assert shelf.dirty() == [entry]
    assert entry.leaving is not None
    assert entry.leaving.state is AddressState.WARM


async def test_the_longest_waiter_is_served_first_and_only_with_what_it_accepts() -> None:
    shelf = Shelf()
    picky, first, second = Waiter("prod", 4, "other-pool"), Waiter("prod", 4, None), Waiter("prod", 4, None)
    for waiter in (picky, first, second):
        shelf.wait(waiter)
    shelf.offer(held(shelf))
    assert [w.granted.done() for w in (picky, first, second)] == [False, True, False]


async def test_a_waiter_that_gave_up_hands_its_address_to_the_next() -> None:
    shelf = Shelf()
    first, second = Waiter("prod", 4, None), Waiter("prod", 4, None)
    shelf.wait(first)
    shelf.wait(second)
    entry = held(shelf)
    shelf.offer(entry)
    shelf.forget_waiter(first)
    assert second.granted.result() is entry


def test_a_space_leaves_out_what_was_held_when_it_was_opened_and_takes_it_in_when_dropped() -> None:
    shelf = Shelf()
    entry = held(shelf, 3)
    space = shelf.spaces[BLOCK] = BlockSpace(pool(), BLOCK, shelf.held)
    assert entry.ip not in space.take(99, ())
    shelf.drop(entry, reusable=True)
    assert space.take(99, ()) == [entry.ip]


def test_a_space_keeps_reserved_addresses_in_their_place() -> None:
    space = BlockSpace(pool(), BLOCK, ())
    ips = [ip_address("10.64.0.0") + n for n in range(1, 7)]
    assert space.take(2, {ips[0], ips[2]}) == [ips[1], ips[3]]
    assert space.take(99, ()) == [ips[0], ips[2], ips[4], ips[5]]


def test_a_space_whose_pool_changed_keeps_the_order_of_release() -> None:
    space = BlockSpace(pool(), BLOCK, ())
    ips = space.take(6, ())
    for ip in reversed(ips):
        space.give_back(ip, 1)
    changed = space.reshaped(pool(static=["10.64.0.2"]), {ips[4]})
    assert changed.take(99, ()) == [ip for ip in reversed(ips) if ip not in (ips[1], ips[4])]


def test_a_space_never_has_an_address_that_is_not_for_everybody() -> None:
    space = BlockSpace(pool(static=["10.64.0.2"]), BLOCK, ())
    for n in range(8):
        space.give_back(ip_address("10.64.0.0") + n, 1)
    assert len(space.take(99, ())) == 5
