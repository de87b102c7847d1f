"""Whether a node says beforehand that an ADD would get no address."""

from __future__ import annotations

import asyncio

import pytest

from ipam import holdings, outage
from ipam.errors import Exhausted, TryAgain
from ipam.networks import NetworkChange, PoolSpec, set_network
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, warm_now


async def test_a_node_is_ready_with_warm_addresses_of_every_family_even_if_the_store_is_away(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", "fd64::/64", warm=1)
    await node.start()
    await node.add(net, "c1")
    await warm_now(node, 2)
    faulty.down = True
    node.holder.check_ready("prod")
    await node.add(net, "c2")
    await eventually(lambda: node.holder.problem)
    await asyncio.sleep(outage.GRACE * 2)
    with pytest.raises(TryAgain, match="no address is warm"):
        node.holder.check_ready("prod")


async def test_a_drained_node_is_not_ready(faulty: FaultyStore, node: Node) -> None:
    await network(faulty.store, "10.64.0.0/24")
    await node.start()
    node.holder.check_ready(None)
    node.holder.drain.begin()
    with pytest.raises(TryAgain, match="is drained"):
        node.holder.check_ready(None)


async def test_a_node_is_not_ready_after_its_network_was_exhausted_until_there_is_an_address(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/29", warm=1)
    await node.start()
    taken = [ip for i in range(6) for ip in await node.add(net, f"c{i}")]
    with pytest.raises(Exhausted):
        await node.take(net)
    with pytest.raises(Exhausted, match="6 assigned"):
        node.holder.check_ready("prod")
    node.holder.check_ready("other")
    ((row,),) = [node.status()["exhausted"]]
    assert (row["network"], row["family"]) == ("prod", 4)
    node.delete(taken[0])
    await warm_now(node, 1)
    node.holder.check_ready("prod")
    assert node.status()["exhausted"] == []


async def test_a_network_stops_counting_as_exhausted_in_time_or_when_it_changes(
    faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(faulty.store, "10.64.0.0/30", warm=0)
    await node.start()
    for i in range(2):
        await node.add(net, f"c{i}")
    for seconds in (0.0, 60.0):
        monkeypatch.setattr(holdings, "EXHAUSTED_FOR", seconds)
        with pytest.raises(Exhausted):
            await node.take(net)
        assert bool(node.status()["exhausted"]) is bool(seconds)
    await set_network(faulty.store, "prod", NetworkChange(add=(PoolSpec("10.65.0.0/29"),)))
    await eventually(lambda: not node.status()["exhausted"])
