"""An ADD is answered when what its network promises is in place, also right after the network was made."""

from __future__ import annotations

import asyncio

import pytest

from ipam.networks import PoolSpec, create_network
from ipam.records import Network
from ipam.store import open_store
from moorage.lab import LabNode

pytestmark = pytest.mark.kernel

ROUNDS = 6


def test_the_first_packet_of_a_new_network_is_masqueraded(node: LabNode) -> None:
    async def make(number: int) -> None:
        store = await open_store(node.store)
        try:
            pools = [PoolSpec(f"10.{70 + number}.0.0/24"), PoolSpec(f"fd70:{number:x}::/64")]
            await create_network(store, Network(name=f"new{number}", pools=[]), pools)
        finally:
            await store.close()

    missing = []
    for number in range(ROUNDS):
        with node.container() as container:
            asyncio.run(make(number))
            answer = container.add(f"new{number}")
            assert answer.exit == 0, answer.stdout
            for family, ip in answer.ips.items():
                for name in (f"pools{family}", f"nat{family}"):
                    asked = ("nft", "get", "element", "inet", "moorage", name, f"{{ {ip} }}")
                    if node.namespace.run(*asked, check=False).returncode:
                        missing.append(f"{ip} was not in {name}")
    assert missing == []
