"""Run as a process of its own: create a network with a pool in a store; prints what came of it.

python -m tests.ipam.racing_creates STORE-URL NAME CIDR
"""

from __future__ import annotations

import asyncio
import sys

from ipam.errors import AlreadyExists
from ipam.networks import PoolSpec, create_network
from ipam.records import Network
from ipam.store import open_store


async def create(url: str, name: str, cidr: str) -> str:
    store = await open_store(url)
    try:
        await create_network(store, Network(name=name, pools=[]), [PoolSpec(cidr)])
        return "created"
    except AlreadyExists:
        return "refused"
    finally:
        await store.close()


if __name__ == "__main__":
    print(asyncio.run(create(*sys.argv[1:])))
