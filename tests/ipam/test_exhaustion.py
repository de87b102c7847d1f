"""A pool is exhausted only when no free address exists that its rules allow.

The oracle reads all that stands in the store while nothing happens and asks of every address of the pool whether the
node that wants one may have it. It knows nothing of what the nodes remember.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from ipaddress import ip_network

import pytest

from ipam import borrowing, keys, pressure, refill
from ipam.errors import Exhausted, MoorageError
from ipam.keys import IPAddress
from ipam.networks import PoolSpec, create_network
from ipam.pools import Geometry
from ipam.records import AddressState, Block, Network
from ipam.store import Store, read_prefix
from tests.ipam.faulty import eventually
from tests.ipam.nodes import Node, Nodes, network, stored, stored_when

SEEDS = [int(text) for text in os.environ.get("MOORAGE_EXHAUSTION_SEEDS", "1 2 3 4 5 6").split()]
STEPS = 25
NODES = 3

BELIEVED = 0.02
"""Seconds for which a node believes here what it read of a pool."""


async def settled(store: Store, *running: Node) -> None:
    """Everything is written, and whatever was released has cooled down."""
    await eventually(lambda: all(each.is_quiet() for each in running))
    await stored_when(store, lambda found: not any(r.state is AddressState.COOLING for r in found.values()))
    await eventually(lambda: all(each.is_quiet() for each in running))


async def test_a_block_where_others_once_had_an_address_goes_to_the_node_that_needs_it(
    store: Store, nodes: Nodes
) -> None:
    net = await network(store, "10.64.0.0/29", warm=0, strict=True)
    one, two = await nodes(2, cooldown=0.01)
    first = await one.add(net, "c1")
    theirs = await two.add(net, "c2", "10.64.0.4")
    mine = first + [(await one.add(net, f"d{n}"))[0] for n in range(4)]
    two.delete(*theirs)
    one.delete(*mine)
    await settled(store, one, two)
    assert await two.add(net, "c3")


def allowed(
    node: str,
    pool: Geometry,
    found: dict[IPAddress, AddressState],
    blocks: dict[object, str],
    *,
    strict: bool,
) -> set[IPAddress]:
    """The addresses that a container on ``node`` may be given. Warm ones are given back by whoever has them."""
    taken = {ip for ip, state in found.items() if state.is_taken}
    free = {ip for ip in pool.cidr if pool.dynamic(ip) and ip not in taken}
    if not strict:
        return free
    may_be_had = set()
    for ip in free:
        block = pool.block_of(ip)
        if blocks.get(block, node) == node or not any(other in block for other in taken):
            may_be_had.add(ip)
    return may_be_had


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read a moment ago is not believed for long, so that each question is about what stands there now."""
    monkeypatch.setattr(borrowing, "NOTHING_FOR", BELIEVED)
    monkeypatch.setattr(refill, "FULL_FOR", BELIEVED)
    monkeypatch.setattr(pressure, "ASK_EVERY", BELIEVED)
    monkeypatch.setattr(pressure, "SCARCE_EVERY", BELIEVED)


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("seed", SEEDS)
async def test_nobody_is_refused_an_address_that_the_rules_allow(
    store: Store, nodes: Nodes, seed: int
) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    strict = seed % 2 == 1
    static = tuple(chance.choice(((), ("10.64.0.8/30",), ("10.64.0.3", "10.64.0.13"))))
    net = await create_network(
        store,
        Network(name="prod", pools=[], warm=chance.choice((0, 0, 2)), strict=strict),
        [PoolSpec("10.64.0.0/28", block_size=chance.choice((29, 30)), static=static)],
    )
    running = await nodes(NODES, cooldown=0.01)
    owned: list[tuple[Node, list[IPAddress]]] = []
    pool = next(iter(running[0].catalogue.pools()))
    for step in range(STEPS):
        node, what = chance.choice(running), chance.random()
        if what < 0.35 and owned:
            holder, ips = owned.pop(chance.randrange(len(owned)))
            holder.delete(*ips)
        elif what < 0.55:
            name = str(chance.choice([ip for ip in pool.cidr if pool.usable(ip)]))
            with contextlib.suppress(MoorageError):
                owned.append((node, await node.add(net, f"c{step}", name)))
        else:
            with contextlib.suppress(Exhausted):
                owned.append((node, await node.add(net, f"c{step}")))
        if chance.random() < 0.2:
            for holder, ips in owned:
                holder.delete(*ips)
            owned.clear()
        if chance.random() < 0.5:
            await check(store, net, chance.choice(running), running, strict=strict, owned=owned, step=step)


async def check(
    store: Store,
    net: Network,
    node: Node,
    running: list[Node],
    *,
    strict: bool,
    owned: list[tuple[Node, list[IPAddress]]],
    step: int,
) -> None:
    await settled(store, *running)
    pool = next(iter(node.catalogue.pools()))
    found = {ip: record.state for ip, record in (await stored(store)).items()}
    items, _ = await read_prefix(store, keys.BLOCKS)
    blocks: dict[object, str] = {}
    for kv in items:
        record = Block.decode(kv.key, kv.value)
        blocks[ip_network((keys.ip_of(kv.key), record.size))] = record.node
    may = allowed(node.name, pool, found, blocks, strict=strict)
    about = f"step {step}, {node.name}: allowed {sorted(map(str, may))}, blocks {blocks}, stored {found}"
    await asyncio.sleep(2 * BELIEVED)
    given = await asyncio.gather(node.add(net, f"asked{step}"), return_exceptions=True)
    if isinstance(given[0], BaseException):
        assert isinstance(given[0], Exhausted), f"{about}: {given[0]!r}"
        assert not may, f"{about}: {given[0]}"
    else:
        assert set(given[0]) <= may, about
        owned.append((node, given[0]))
