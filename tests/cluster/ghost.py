"""Another node that claims a block and gives it back, twice a second, until it is told to end.

Run as a program in a node's namespace: POOL CIDR. The store is that of the environment. It is not imported from
anywhere, so that it works with the installed packages alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from ipaddress import ip_network

from ipam import keys
from ipam.records import Block, Node
from ipam.store import Delete, Put, Txn, open_store

NAME = "ghost"


async def come_and_go(pool: str, cidr: str) -> None:
    store = await open_store(os.environ["MOORAGE_STORE"])
    network = ip_network(cidr)
    key = keys.block_key(network)
    node = Node(name=NAME, version="1", underlay=["198.18.0.99"], mac="06:00:00:00:00:99", vxlan_port=4789)
    block = Block(pool=pool, size=network.prefixlen, node=NAME, claimed_at=0.0)
    await store.txn(Txn((), (Put(keys.NODES + NAME, node.encode()),)))
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    while not ended.done():
        await store.txn(Txn((), (Put(key, block.encode()),)))
        await asyncio.sleep(0.25)
        await store.txn(Txn((), (Delete(key),)))
        await asyncio.sleep(0.25)
    await store.txn(Txn((), (Delete(keys.NODES + NAME),)))
    await store.close()


if __name__ == "__main__":
    asyncio.run(come_and_go(*sys.argv[1:]))
