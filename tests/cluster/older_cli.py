"""What an older command line did: a network whose pool nobody held against the nodes' own networks.

Run as a program in a node's namespace: NAME CIDR FABRIC. The store is that of the environment. It is not imported
from anywhere, so that it works with the installed packages alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from ipaddress import ip_network

from ipam import keys
from ipam.records import Network, Pool
from ipam.store import Put, Txn, open_store


async def create(name: str, cidr: str, fabric: str) -> None:
    store = await open_store(os.environ["MOORAGE_STORE"])
    try:
        size = ip_network(cidr)
        pool = Pool(
            name=cidr.replace("/", "-"),
            cidr=cidr,
            network=name,
            block_size=max(size.prefixlen, 26 if size.version == 4 else 122),
        )
        # Kept ready on every node, so that nobody has to come for an address first.
        network = Network(name=name, pools=[pool.name], fabric=fabric, preload=True, allow_from=["nodes"])
        await store.txn(
            Txn(
                (),
                (
                    Put(keys.POOLSET, b"1000"),
                    Put(keys.NETWORKS + name, network.encode()),
                    Put(keys.POOLS + pool.name, pool.encode()),
                ),
            )
        )
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(create(*sys.argv[1:]))
