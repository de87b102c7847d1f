"""Blocks listed and returned on an operator's word, on a real store and a real journal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipam import keys
from ipam.blocks import list_blocks, release_block
from ipam.errors import MoorageError, NotFound, TryAgain
from ipam.intents import IntentServer
from ipam.records import Address, AddressState, Alive, Intent
from ipam.store import Put, Store, Txn
from tests.ipam.faulty import eventually
from tests.ipam.nodes import Node, network


@pytest.fixture
async def alive(store: Store, node: Node) -> AsyncIterator[Node]:
    """A node that answers; not started."""
    alive = Alive(instance="i", boot_id="boot-1").encode()
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", alive),)))

    async def answer(intent: Intent) -> dict[str, Any]:
        return await node.holder.return_block(intent)

    server = asyncio.create_task(IntentServer(store, "n1", answer).run())
    yield node
    server.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await server


async def plant(store: Store, ip: str, node: str = "n2") -> None:
    record = Address(pool="10.64.0.0-24", state=AddressState.ASSIGNED, node=node, container_id="other")
    await store.txn(Txn(then=(Put(keys.address_key(ip_address(ip)), record.encode()),)))


async def test_blocks_are_listed_with_what_is_in_them(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await node.start()
    await node.add(net, "c1")
    await eventually(node.is_quiet)
    four, six = await list_blocks(store)
    await plant(store, str(ip_network(four.block)[-2]))
    four, six = await list_blocks(store)
    assert (four.node, four.assigned, four.warm, four.cooling, four.others) == ("n1", 2, 4, 0, 1)
    assert (four.free, six.others) == (64 - 6, 0)
    assert [b.block for b in await list_blocks(store, pool="fd00:64::/64")] == [six.block]
    assert await list_blocks(store, node="n2") == []


async def test_a_block_with_nothing_but_warm_addresses_is_returned(store: Store, alive: Node) -> None:
    await network(store, "10.64.0.0/24", preload=True)
    await alive.start()
    await eventually(lambda: alive.states() == {"warm": 4})
    (block,) = await list_blocks(store)
    assert await release_block(store, ip_network(block.block)) == "n1"
    # What it needs it takes again, from a block of its own.
    await eventually(lambda: alive.states() == {"warm": 4})


async def test_a_block_in_use_is_kept_naming_what_is_in_it(store: Store, alive: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await alive.start()
    (ip,) = await alive.add(net, "c1")
    await eventually(alive.is_quiet)
    (block,) = await list_blocks(store)
    with pytest.raises(MoorageError, match=f"node n1 kept .*: {ip} is assigned to c1"):
        await release_block(store, ip_network(block.block))
    assert alive.states() == {"assigned": 1, "warm": 4}


async def test_a_block_in_which_another_node_has_an_address_is_kept(store: Store, alive: Node) -> None:
    await network(store, "10.64.0.0/24", preload=True)
    await alive.start()
    await eventually(lambda: alive.states() == {"warm": 4})
    (block,) = await list_blocks(store)
    await plant(store, str(ip_network(block.block)[-2]))
    with pytest.raises(MoorageError, match="addresses of other nodes"):
        await release_block(store, ip_network(block.block))
    assert block.block in [found.block for found in await list_blocks(store)]


async def test_a_block_of_nobody_and_one_of_a_node_that_is_away(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c1")
    (block,) = await list_blocks(store)
    with pytest.raises(TryAgain, match="moorage node remove n1"):
        await release_block(store, ip_network(block.block))
    for cidr in ("10.65.0.0/26", f"{block.block.removesuffix('/26')}/27"):
        with pytest.raises(NotFound, match="no node has claimed"):
            await release_block(store, ip_network(cidr))
