"""Routes of running containers follow their networks' pools: what is compared, in which order, and how much at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from structlog.testing import capture_logs

import isolator.pool_routes as pool_routes_module
from ipam import keys
from ipam.networks import NetworkChange, PoolSpec, set_network
from ipam.store import Delete, Txn
from isolator.errors import KernelRefused
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.pool_routes import PoolRoutes
from tests.isolator.test_endpoints import Node, node
from tests.patience import PATIENCE

__all__ = ["node"]

FIRST, SECOND, OTHER_FAMILY = map(ip_network, ("10.0.0.0/24", "10.7.0.0/24", "fd00::/64"))


async def attached(node: Node, *containers: str) -> list[Endpoint]:
    return [await node.endpoints.attach(node.spec(name, request=name)) for name in containers]


async def add_pools(node: Node) -> None:
    await set_network(
        node.store, "web", NetworkChange(add=(PoolSpec(str(SECOND)), PoolSpec(str(OTHER_FAMILY))))
    )
    await node.catalogue.refresh()


async def test_an_endpoint_remembers_its_next_hop_and_the_pools_of_its_families(node: Node) -> None:
    (endpoint,) = await attached(node, "c1")
    assert (endpoint.next_hop, endpoint.pools) == (1, (FIRST,))
    assert node.endpoints.misrouted() == []
    await add_pools(node)
    assert node.endpoints.misrouted() == [endpoint]
    assert await node.endpoints.reroute(endpoint)
    assert node.endpoints.misrouted() == []
    (journalled,) = node.journal.load_endpoints()
    assert journalled.pools == (FIRST, SECOND), "it has no address of the other family"


async def test_a_disabled_pool_keeps_its_routes(node: Node) -> None:
    await attached(node, "c1")
    await set_network(node.store, "web", NetworkChange(disable=(str(FIRST),)))
    await node.catalogue.refresh()
    assert node.endpoints.misrouted() == []


@pytest.mark.parametrize("gone", [keys.POOLS + "10.0.0.0-24", keys.NETWORKS + "web"])
async def test_nothing_is_taken_away_for_a_network_that_is_not_wholly_known(node: Node, gone: str) -> None:
    (endpoint,) = await attached(node, "c1")
    await node.store.txn(Txn(then=(Delete(gone),)))
    await node.catalogue.refresh()
    assert node.endpoints.misrouted() == []
    assert not await node.endpoints.reroute(endpoint)
    assert "reroute c1" not in node.kernel.calls


@pytest.mark.parametrize("change", [{"netns": ""}, {"state": EndpointState.CONFLICT}])
async def test_what_cannot_be_entered_or_is_cut_off_waits(node: Node, change: dict[str, Any]) -> None:
    (endpoint,) = await attached(node, "c1")
    node.endpoints.adopt(replace(endpoint, **change))
    await add_pools(node)
    assert node.endpoints.misrouted() == []


async def test_containers_with_several_interfaces_come_first(node: Node) -> None:
    one, two = await attached(node, "c1", "c2")
    second = await node.endpoints.attach(
        replace(node.spec("c2", request="again"), key=EndpointKey("c2", "eth1"))
    )
    await add_pools(node)
    assert node.endpoints.misrouted() == [two, second, one]


@asynccontextmanager
async def kept(node: Node) -> AsyncIterator[PoolRoutes]:
    """What keeps routes right, under way."""
    routes = PoolRoutes(node.endpoints)
    task = asyncio.create_task(routes.keep())
    try:
        yield routes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


async def test_only_so_many_get_their_turn_before_the_next_pause(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_routes_module, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(pool_routes_module, "PAUSE", 0.3)
    await attached(node, *(f"c{i}" for i in range(5)))
    await add_pools(node)
    begun = asyncio.get_running_loop().time()
    async with kept(node):
        await until(lambda: node.endpoints.misrouted() == [])
    assert asyncio.get_running_loop().time() - begun >= 0.6
    assert len([call for call in node.kernel.calls if call.startswith("reroute")]) == 5


async def test_one_that_refuses_holds_up_no_other_is_tried_again_and_logged_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_routes_module, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(pool_routes_module, "MOST_AT_ONCE", 1)
    monkeypatch.setattr(pool_routes_module, "PAUSE", 0.01)
    bad, *_ = await attached(node, "c1", "c2", "c3")
    node.kernel.fail["reroute"] = lambda e: KernelRefused("no") if e.key == bad.key else None
    await add_pools(node)
    with capture_logs() as logged:
        async with kept(node):
            await until(lambda: node.kernel.calls.count("reroute c1") >= 3)
            assert node.endpoints.misrouted() == [bad]
            del node.kernel.fail["reroute"]
            await until(lambda: node.endpoints.misrouted() == [])
    assert [entry["why"] for entry in logged if entry["log_level"] == "warning"] == ["no"]


async def test_a_change_is_seen_to_without_waiting_for_the_next_look(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_routes_module, "LOOK_EVERY", PATIENCE * 2)
    await attached(node, "c1")
    async with kept(node) as routes:
        await asyncio.sleep(0.05)
        await add_pools(node)
        routes.catalogue_changed()
        await until(lambda: node.endpoints.misrouted() == [])
