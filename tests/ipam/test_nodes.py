"""Operators and nodes: drained, removed, adopted, on a real store and real journals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import pytest

from ipam import keys, nodes
from ipam.errors import Fenced, NotFound, TryAgain
from ipam.intents import IntentServer
from ipam.membership import Membership
from ipam.nodes import adopt_node, drain_node, get_node, remove_node
from ipam.records import Address, AddressState, Alive, Fence, Intent
from ipam.records import Node as Facts
from ipam.store import Put, Store, Txn, read_prefix
from ipam.writer import Writer
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when


class Agent:
    """A node with its membership and its answers to drains, as the isolator composes them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.node.start()
        holder = self.node.holder
        instance = holder._writer._instance
        self.membership = Membership(
            self.node.store,
            Facts(name=self.node.name, version="1"),
            instance,
            "boot-1",
            holder.fenced,
            holder.drain,
        )
        await self.membership.register()
        server = IntentServer(self.node.store, self.node.name, self._answer)
        for work in (self.membership.keep, self.membership.follow, server.run):
            self._tasks.append(asyncio.create_task(work()))

    async def _answer(self, intent: Intent) -> dict[str, Any]:
        drain = self.node.holder.drain
        if intent.evidence["undo"]:
            drain.withdraw()
            await self.membership.tell()
            drain.end()
        else:
            drain.begin()
            await drain.settle(0.5)
            await self.membership.tell()
        return drain.report()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        await self.membership.leave()
        await self.node.crash()


@pytest.fixture
async def agent(new_node: Callable[..., Node]) -> AsyncIterator[Agent]:
    """An agent that is not started."""
    agent = Agent(new_node())
    yield agent
    if agent._tasks:
        await agent.stop()


async def is_drained(store: Store) -> bool:
    kv = await store.get(keys.NODES + "n1")
    return kv is not None and Facts.decode(kv.key, kv.value).drained


# -- drain


async def test_a_drained_node_keeps_what_is_assigned_and_nothing_else(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await agent.start()
    ips = await agent.node.add(net, "c1")
    answer = await drain_node(store, "n1")
    assert [(row["state"], row["family"], row["count"]) for row in answer["left"]] == [
        ("assigned", 4, 1),
        ("assigned", 6, 1),
    ]
    assert set(await stored(store)) == set(ips)
    assert await is_drained(store)


async def test_a_drained_node_refuses_an_add_and_says_what_to_do(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    await drain_node(store, "n1")
    with pytest.raises(TryAgain, match=r"node n1 is drained.*--undo"):
        await agent.node.take(net)
    with pytest.raises(TryAgain, match="node n1 is drained"):
        await agent.node.take(net, "10.64.0.9")


async def test_the_last_release_on_a_drained_node_returns_its_block(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    ips = await agent.node.add(net, "c1")
    assert (await drain_node(store, "n1"))["blocks"] == 1
    agent.node.delete(*ips)
    await stored_when(store, lambda found: not found)
    await eventually(lambda: agent.node.holder.status()["blocks"] == [])
    assert (await read_prefix(store, keys.BLOCKS))[0] == []


async def test_a_drain_survives_a_restart_and_ends_with_undo(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    await agent.node.add(net, "c1")
    await drain_node(store, "n1")
    await agent.stop()
    await agent.start()
    with pytest.raises(TryAgain, match="is drained"):
        await agent.node.take(net)
    assert (await drain_node(store, "n1", undo=True))["drained"] is False
    assert not await is_drained(store)
    await agent.node.add(net, "c2")
    await agent.stop()
    await agent.start()
    await agent.node.add(net, "c3")


async def test_a_drain_that_the_journal_forgot_is_learnt_from_the_store(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    await drain_node(store, "n1")
    await agent.stop()
    agent.node.path.unlink()
    await agent.start()
    with pytest.raises(TryAgain, match="is drained"):
        await agent.node.take(net)


async def test_a_node_that_registers_while_its_drain_is_undone_is_not_drained_afterwards(
    store: Store, agent: Agent
) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    await drain_node(store, "n1")
    drain = agent.node.holder.drain
    drain.withdraw()
    # Its lease was lost just now, and the store says yet that it is drained.
    await agent.membership.register()
    await agent.membership.tell()
    drain.end()
    assert not drain.is_on
    await agent.node.add(net, "c1")
    await agent.membership.tell()
    assert not await is_drained(store)


async def test_a_drain_that_was_undone_can_be_begun_and_confirmed_again(store: Store, agent: Agent) -> None:
    await network(store, "10.64.0.0/24")
    await agent.start()
    for _ in range(2):
        await drain_node(store, "n1")
        assert await is_drained(store)
        await drain_node(store, "n1", undo=True)
        assert not await is_drained(store)


async def test_an_add_under_way_keeps_a_drain_from_being_confirmed(
    store: Store, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "DRAIN_PATIENCE", 0.1)
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    lent = await agent.node.take(net)
    with pytest.raises(TryAgain, match="1 warm of prod"):
        await drain_node(store, "n1")
    assert not await is_drained(store)
    agent.node.assign(lent, "c1")
    assert (await drain_node(store, "n1"))["done"]
    assert await is_drained(store)


async def test_a_drain_ends_the_wait_of_an_add(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await agent.start()
    waiting = asyncio.create_task(agent.node.take(net))
    while not agent.node.holder._shelf.waiters("prod", 4):
        await asyncio.sleep(0)
    agent.node.holder.drain.begin()
    with pytest.raises(TryAgain, match="is drained"):
        await waiting


async def test_draining_an_agent_that_does_not_run_says_so(store: Store, agent: Agent) -> None:
    await agent.start()
    await agent.stop()
    with pytest.raises(TryAgain, match="is not running"):
        await drain_node(store, "n1")
    with pytest.raises(NotFound, match=r"there is no node 'n2' \(known: n1\)"):
        await drain_node(store, "n2")


# -- show


async def test_a_node_is_shown_with_all_that_is_its_own(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await agent.start()
    await agent.node.add(net, "c1")
    await eventually(agent.node.is_quiet)
    shown = await get_node(store, "n1")
    assert (shown.alive, shown.drained, shown.version) == (True, False, "1")
    assert len(shown.blocks) == 2
    assert shown.fence == agent.node.holder.status()["fence_seq"]
    assert shown.states() == {"assigned": 2, "warm": 8}
    assert [(row.network, row.family, row.state, row.count) for row in shown.addresses] == [
        ("prod", 4, "assigned", 1),
        ("prod", 4, "warm", 4),
        ("prod", 6, "assigned", 1),
        ("prod", 6, "warm", 4),
    ]


# -- remove


async def test_a_living_node_is_not_removed_even_by_force(store: Store, agent: Agent) -> None:
    await network(store, "10.64.0.0/24")
    await agent.start()
    for force in (False, True):
        with pytest.raises(TryAgain, match="is running"):
            await remove_node(store, "n1", force=force)


async def test_a_node_with_addresses_is_only_removed_by_force(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await agent.start()
    await agent.node.add(net, "c1")
    await eventually(agent.node.is_quiet)
    await agent.stop()
    with pytest.raises(TryAgain, match=r"2 assigned, 8 warm; the node was not drained.*--force"):
        await remove_node(store, "n1")
    freed = await remove_node(store, "n1", force=True)
    assert (freed.addresses, freed.blocks) == ({"assigned": 2, "warm": 8}, 2)
    for prefix in (keys.ADDRESSES, keys.BLOCKS, keys.NODES, keys.WRITERS):
        assert (await read_prefix(store, prefix))[0] == []
    with pytest.raises(NotFound):
        await remove_node(store, "n1")


async def test_a_drained_node_without_containers_is_removed(store: Store, agent: Agent) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    ips = await agent.node.add(net, "c1")
    await drain_node(store, "n1")
    agent.node.delete(*ips)
    await stored_when(store, lambda found: {a.state for a in found.values()} <= {AddressState.COOLING})
    await agent.stop()
    await remove_node(store, "n1")
    assert await stored(store) == {}


async def plant(store: Store, ip: str, **fields: Any) -> None:
    record = Address(pool="10.64.0.0-24", state=AddressState.WARM, node="n1", network="prod").with_(**fields)
    await store.txn(Txn(then=(Put(keys.address_key(ip_address(ip)), record.encode()),)))


@pytest.mark.parametrize(
    ("fields", "drained", "refused"),
    [
        ({"state": AddressState.WARM}, False, True),
        ({"state": AddressState.WARM}, True, False),
        ({"state": AddressState.COOLING}, False, False),
        # A container with the same key may have it already, and the store not know.
        ({"state": AddressState.COOLING, "reservation": "k"}, False, True),
        ({"state": AddressState.COOLING, "reservation": "k"}, True, False),
        # So may the one that had it, with whatever engine.
        ({"state": AddressState.COOLING, "container_id": "c", "ifname": "eth0"}, False, True),
        ({"state": AddressState.COOLING, "container_id": "c", "ifname": "eth0"}, True, False),
        ({"state": AddressState.COOLING, "former": "uid"}, False, True),
        ({"state": AddressState.ASSIGNED}, True, True),
        ({"state": AddressState.WARM, "node": "n2"}, False, False),
    ],
)
async def test_what_a_container_may_be_using_is_not_freed_unasked(
    store: Store, fields: dict[str, Any], drained: bool, refused: bool
) -> None:
    await network(store, "10.64.0.0/24")
    facts = Facts(name="n1", version="1", drained=drained)
    await store.txn(Txn(then=(Put(keys.NODES + "n1", facts.encode()),)))
    await plant(store, "10.64.0.9", **fields)
    with pytest.raises(TryAgain) if refused else contextlib.nullcontext():
        await remove_node(store, "n1")
    assert len(await stored(store)) == int(refused or fields.get("node") == "n2")


async def test_a_removal_takes_any_number_of_pages_and_leaves_others_alone(store: Store) -> None:
    await network(store, "10.64.0.0/22")
    await plant(store, "10.64.3.1", node="n2")
    for number in range(3 * nodes.PAGE + 1):
        await plant(store, str(ip_address("10.64.0.1") + number))
    await store.txn(Txn(then=(Put(keys.NODES + "n1", Facts(name="n1", version="1").encode()),)))
    freed = await remove_node(store, "n1", force=True)
    assert freed.addresses == {"warm": 3 * nodes.PAGE + 1}
    assert [str(ip) for ip in await stored(store)] == ["10.64.3.1"]


class Interrupting(FaultyStore):
    """Does something before the n-th transaction."""

    def __init__(self, store: Store, number: int, action: Callable[[], Any]) -> None:
        super().__init__(store)
        self._left, self._action = number, action

    async def txn(self, txn: Txn) -> Any:
        self._left -= 1
        if self._left == 0:
            await self._action()
        return await super().txn(txn)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_an_agent_that_comes_back_while_it_is_removed_loses_nothing(
    store: Store, agent: Agent, number: int
) -> None:
    net = await network(store, "10.64.0.0/24")
    await agent.start()
    ips = await agent.node.add(net, "c1")
    await eventually(agent.node.is_quiet)
    await agent.stop()
    with pytest.raises(TryAgain, match="came back"):
        await remove_node(Interrupting(store, number, agent.start), "n1", force=True)
    await stored_when(store, lambda found: ips[0] in found and found[ips[0]].state is AddressState.ASSIGNED)
    await eventually(agent.node.is_quiet)


@pytest.mark.parametrize("number", [2, 3, 4])
async def test_a_removal_that_was_interrupted_goes_on(store: Store, agent: Agent, number: int) -> None:
    async def interrupt() -> None:
        raise EOFError

    net = await network(store, "10.64.0.0/24")
    await agent.start()
    await agent.node.add(net, "c1")
    await eventually(agent.node.is_quiet)
    await agent.stop()
    with pytest.raises(EOFError):
        await remove_node(Interrupting(store, number, interrupt), "n1", force=True)
    await remove_node(store, "n1", force=True)
    for prefix in (keys.ADDRESSES, keys.BLOCKS, keys.NODES, keys.WRITERS):
        assert (await read_prefix(store, prefix))[0] == []


async def test_an_agent_that_was_cut_off_and_removed_asserts_what_its_containers_use(
    store: Store, new_node: Callable[..., Node]
) -> None:
    """Its lease had expired: there is no alive key, and it does not know yet."""
    net = await network(store, "10.64.0.0/24")
    one, two = new_node("n1"), new_node("n2")
    await one.start()
    kept, lost = await one.add(net, "c1"), await one.add(net, "c2")
    await eventually(one.is_quiet)
    await remove_node(store, "n1", force=True)
    await two.start()
    await two.add(net, "d1", str(lost[0]))
    one.delete()
    await one.holder.sync()
    await eventually(lambda: [c.ip for c in one.conflicts] == lost)
    found = await stored_when(store, lambda found: kept[0] in found)
    assert found[kept[0]].node == "n1"
    assert found[lost[0]].node == "n2"


# -- adopt


async def fence(store: Store) -> Fence:
    kv = await store.get(keys.WRITERS + "n1")
    assert kv is not None
    return Fence.decode(kv.key, kv.value)


async def test_an_adopted_name_is_not_taken_back_by_the_agent_that_runs(store: Store) -> None:
    old = Writer(store, "n1", "old", "boot-1")
    await old.claim(0)
    await adopt_node(store, "n1")
    with pytest.raises(Fenced, match="by an operator"):
        await old.commit([])
    with pytest.raises(Fenced, match="moorage node adopt"):
        await old.claim(1)
    assert await Writer(store, "n1", "new", "boot-2").claim(0)
    assert (await fence(store)).vacant is False


async def test_an_adopted_name_may_be_had_back_by_a_restart_with_nothing_lost(store: Store) -> None:
    old = Writer(store, "n1", "old", "boot-1")
    await old.claim(0)
    await old.commit([])
    await adopt_node(store, "n1")
    assert await Writer(store, "n1", "restarted", "boot-1").claim(old.seq)


async def test_adopting_the_name_of_a_living_node_has_to_be_confirmed(store: Store, agent: Agent) -> None:
    await network(store, "10.64.0.0/24")
    await agent.start()
    with pytest.raises(TryAgain, match="is running"):
        await adopt_node(store, "n1")
    await adopt_node(store, "n1", force=True)
    assert await store.get(keys.ALIVE + "n1") is None
    assert (await fence(store)).vacant
    await eventually(lambda: "node n1" in agent.node.holder.problem)
    await asyncio.sleep(1.2)  # past a round of keeping the lease
    assert await store.get(keys.ALIVE + "n1") is None


async def test_whoever_starts_next_takes_over_what_the_adopted_node_had(
    store: Store, new_node: Callable[..., Node]
) -> None:
    net = await network(store, "10.64.0.0/24")
    old, new = new_node("n1"), new_node("n1", boot_id="boot-2")
    await old.start()
    (ip,) = await old.add(net, "c1")
    await eventually(old.is_quiet)
    lease = await store.lease(60)
    alive = Alive(instance=old.holder._writer._instance, boot_id="boot-1")
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", alive.encode(), lease.id),)))
    await adopt_node(store, "n1", force=True)
    new.path = new.path.with_suffix(".new")
    report = await new.start()
    assert ip in report.released
    old.holder.fenced(Fenced("as its membership tells it"))
    with pytest.raises(TryAgain):
        await old.take(net)
