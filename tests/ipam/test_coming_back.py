"""A container that starts again has its address back at once, and nobody else has it before its cooldown is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from ipam import coming_back, keys
from ipam.coming_back import Asker
from ipam.errors import TryAgain
from ipam.keys import IPAddress
from ipam.records import Address, AddressState, Network
from ipam.store import KeyValue, Put, Store, Txn, TxnResult
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when

NewNode = Callable[..., Node]

IP = ip_address("10.64.0.9")


@pytest.fixture
def slow_cooldown(new_node: NewNode) -> Node:
    return new_node(cooldown=60)


def assigned_to(container: str) -> Callable[[dict[IPAddress, Address]], bool]:
    return lambda found: (
        IP in found and (found[IP].state, found[IP].container_id) == (AddressState.ASSIGNED, container)
    )


def cooling_there(found: dict[IPAddress, Address]) -> bool:
    return IP in found and found[IP].state is AddressState.COOLING


async def with_container(store: Store, node: Node) -> Network:
    """The network on which a container of the node has the address, which the store knows."""
    net = await network(store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c", str(IP))
    await stored_when(store, assigned_to("c"))
    return net


async def test_a_container_has_the_address_that_it_names_back_after_its_release_was_confirmed(
    store: Store, slow_cooldown: Node
) -> None:
    net = await with_container(store, slow_cooldown)
    slow_cooldown.delete(IP)
    before = (await stored_when(store, cooling_there))[IP]
    assert await slow_cooldown.add(net, "c", str(IP)) == [IP]
    after = (await stored_when(store, assigned_to("c")))[IP]
    assert after.id != before.id


async def test_nobody_else_has_it_before_its_cooldown_is_over(store: Store, slow_cooldown: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    await slow_cooldown.add(net, "c", str(IP))
    slow_cooldown.delete(IP)
    for container in ("another", ""):
        with pytest.raises(TryAgain, match="cools down"):
            await slow_cooldown.add(net, container, str(IP))


async def test_another_interface_of_the_container_does_not_have_it_back(
    store: Store, slow_cooldown: Node
) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    await slow_cooldown.add(net, "c", str(IP))
    slow_cooldown.delete(IP)
    with pytest.raises(TryAgain, match="cools down"):
        await slow_cooldown.take(net, str(IP), asker=Asker("c", "eth1"))


async def test_a_container_has_its_address_back_while_the_store_is_away(
    store: Store, faulty: FaultyStore, slow_cooldown: Node
) -> None:
    net = await with_container(store, slow_cooldown)
    faulty.down = True
    for _ in range(3):
        slow_cooldown.delete(IP)
        async with asyncio.timeout(coming_back.IN_FLIGHT + 2):
            assert await slow_cooldown.add(net, "c", str(IP)) == [IP]
    faulty.down = False
    await eventually(slow_cooldown.is_quiet)
    assert assigned_to("c")(await stored(store))


async def test_a_release_that_was_not_sent_yet_is_undone_and_others_never_hear_of_it(
    store: Store, slow_cooldown: Node
) -> None:
    net = await with_container(store, slow_cooldown)
    begun = revision(await store.get(keys.address_key(IP)))
    slow_cooldown.delete(IP)
    await slow_cooldown.add(net, "c", str(IP))
    # Others know it by its netgroups all the time.
    assert not slow_cooldown.holder.is_unknown_to_others(IP)
    states = []
    async for batch in store.watch(keys.address_key(IP), begun + 1):
        states += [Address.decode(event.key, event.kv.value).state for event in batch.events if event.kv]
        break
    assert states == [AddressState.ASSIGNED]


def revision(kv: KeyValue | None) -> int:
    return 0 if kv is None else kv.mod_revision


class Slow:
    """A store that answers a write only when it may. asked: that one came."""

    def __init__(self, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = asyncio.Event()
        self.may = asyncio.Event()
        self._txn = faulty.txn
        monkeypatch.setattr(faulty, "txn", self.txn)

    async def txn(self, txn: Txn) -> TxnResult:
        result = await self._txn(txn)
        self.asked.set()
        await self.may.wait()
        return result


async def test_a_release_in_flight_is_waited_for(
    store: Store, faulty: FaultyStore, slow_cooldown: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await with_container(store, slow_cooldown)
    await eventually(slow_cooldown.is_quiet)
    slow = Slow(faulty, monkeypatch)
    slow_cooldown.delete(IP)
    await slow.asked.wait()
    again = asyncio.create_task(slow_cooldown.add(net, "c", str(IP)))
    await asyncio.sleep(0.1)
    assert not again.done()
    slow.may.set()
    assert await again == [IP]
    assert slow_cooldown.holder.is_unknown_to_others(IP)


async def test_a_release_in_flight_is_not_waited_for_for_ever(
    store: Store, faulty: FaultyStore, slow_cooldown: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coming_back, "IN_FLIGHT", 0.1)
    net = await with_container(store, slow_cooldown)
    await eventually(slow_cooldown.is_quiet)
    slow = Slow(faulty, monkeypatch)
    slow_cooldown.delete(IP)
    await slow.asked.wait()
    assert await slow_cooldown.add(net, "c", str(IP)) == [IP]
    # Nobody can say whether others have heard of its release.
    assert slow_cooldown.holder.is_unknown_to_others(IP)
    slow.may.set()
    await stored_when(store, assigned_to("c"))


async def test_an_add_that_fails_leaves_the_address_cooling(store: Store, slow_cooldown: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    await slow_cooldown.add(net, "c", str(IP))
    slow_cooldown.delete(IP)
    slow_cooldown.holder.put_back(await slow_cooldown.take(net, str(IP), asker=Asker("c", "eth0")))
    await stored_when(store, cooling_there)
    with pytest.raises(TryAgain, match="cools down"):
        await slow_cooldown.add(net, "another", str(IP))
    assert await slow_cooldown.add(net, "c", str(IP)) == [IP]


async def test_who_had_it_is_known_after_a_restart(store: Store, slow_cooldown: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    await slow_cooldown.add(net, "c", str(IP))
    slow_cooldown.delete(IP)
    await slow_cooldown.restart()
    assert await slow_cooldown.add(net, "c", str(IP)) == [IP]
    await stored_when(store, assigned_to("c"))


async def test_a_uid_that_allocates_again_has_the_address_that_it_names_back(
    store: Store, slow_cooldown: Node
) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    await slow_cooldown.allocate(net, "u", str(IP))
    slow_cooldown.release("u")
    with pytest.raises(TryAgain, match="cools down"):
        await slow_cooldown.allocate(net, "another", str(IP))
    assert await slow_cooldown.allocate(net, "u", str(IP)) == [IP]


@pytest.mark.parametrize("released_first", [True, False])
async def test_a_uid_has_the_address_of_its_container_back(
    store: Store, slow_cooldown: Node, released_first: bool
) -> None:
    net = await network(store, "10.64.0.0/24")
    await slow_cooldown.start()
    slow_cooldown.isolate(await slow_cooldown.allocate(net, "u", str(IP)), "c")
    if released_first:
        slow_cooldown.release("u")
    slow_cooldown.delete(IP)
    if not released_first:
        slow_cooldown.release("u")
    assert await slow_cooldown.allocate(net, "u", str(IP)) == [IP]
    record = (await stored_when(store, lambda found: found[IP].state is AddressState.ALLOCATED))[IP]
    assert (record.uid, record.former) == ("u", "")


async def test_an_add_that_names_no_address_has_a_warm_one_while_there_is_one(
    store: Store, slow_cooldown: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await slow_cooldown.start()
    (ip,) = await slow_cooldown.add(net, "c")
    await eventually(lambda: slow_cooldown.states().get("warm", 0) >= 2)
    slow_cooldown.delete(ip)
    assert await slow_cooldown.add(net, "c") != [ip]


async def test_an_add_that_names_no_address_has_its_own_back_sooner_than_none(
    store: Store, faulty: FaultyStore, slow_cooldown: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await slow_cooldown.start()
    (ip,) = await slow_cooldown.add(net, "c")
    await eventually(slow_cooldown.is_quiet)
    faulty.down = True
    slow_cooldown.delete(ip)
    with pytest.raises(TryAgain):
        await slow_cooldown.add(net, "another")
    assert await slow_cooldown.add(net, "c") == [ip]


async def test_a_reserved_address_does_not_come_back_to_who_has_no_key(
    store: Store, slow_cooldown: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await slow_cooldown.start()
    (ip,) = await slow_cooldown.add(net, "c")
    slow_cooldown.delete(ip)
    reservation = b'{"key":"k","network":"prod"}'
    await store.txn(Txn(then=(Put(keys.reservation_key(ip), reservation),)))
    await eventually(lambda: slow_cooldown.catalogue.reserved(ip))
    assert await slow_cooldown.add(net, "c") != [ip]
