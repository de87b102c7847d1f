"""The process behind ``large``: ``python -m benchmarks.filling URL POOL COUNT`` fills a pool as other nodes would.

COUNT addresses of the pool become assigned to containers of other nodes, PER_NODE on each, in blocks where those nodes
would have claimed them. The records go straight into the store, many to a transaction.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import islice

from ipam import keys
from ipam.allocator import first_block
from ipam.pools import Geometry, geometry
from ipam.records import Address, AddressState, Block, Pool
from ipam.store import MAX_OPS, Put, Store, Txn, open_store

PER_NODE = 500
PER_BLOCK = 60
"""Assigned addresses of each block; a few of 64 are left."""

AT_ONCE = 8
"""Transactions under way."""


async def fill(url: str, pool: str, count: int) -> None:
    store = await open_store(url)
    try:
        kv = await store.get(keys.POOLS + pool)
        assert kv is not None, f"there is no pool {pool}"
        puts = _records(geometry(Pool.decode(kv.key, kv.value)), count)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(_write(store, puts))
    finally:
        await store.close()


async def _write(store: Store, puts: Iterator[Put]) -> None:
    while batch := tuple(islice(puts, MAX_OPS)):
        await store.txn(Txn(then=batch))


def _records(pool: Geometry, count: int) -> Iterator[Put]:
    claimed: set[int] = set()
    left = count
    while left > 0:
        node = f"other-{len(claimed)}"
        index = first_block(node, pool)
        for _ in range(0, min(PER_NODE, left), PER_BLOCK):
            while index in claimed:
                index = (index + 1) % pool.block_count
            claimed.add(index)
            yield from _block(pool, index, node, min(PER_BLOCK, left))
            left -= PER_BLOCK


def _block(pool: Geometry, index: int, node: str, count: int) -> Iterator[Put]:
    """A block of ``node`` and ``count`` of its addresses."""
    block, now = pool.block(index), time.time()
    record = Block(pool=pool.name, size=block.prefixlen, node=node, claimed_at=now)
    yield Put(keys.block_key(block), record.encode())
    for ip in islice(pool.dynamic_in(block), count):
        address = Address(
            pool=pool.name,
            state=AddressState.ASSIGNED,
            node=node,
            id=uuid.uuid4().hex,
            container_id=str(uuid.uuid4()),
            ifname="eth0",
            network=pool.network,
            engine="mesos",
            netgroups=[pool.network],
            since=now,
        )
        yield Put(keys.address_key(ip), address.encode())


if __name__ == "__main__":
    asyncio.run(fill(sys.argv[1], sys.argv[2], int(sys.argv[3])))
