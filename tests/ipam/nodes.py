"""Simulated nodes that answer each other, and what stands in the store."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

from ipam import keys
from ipam.allocations import Promise
from ipam.coming_back import Asker
from ipam.intents import IntentServer
from ipam.journal import AddressRow
from ipam.keys import Family, IPAddress
from ipam.membership import Membership
from ipam.named import AddressRequest
from ipam.networks import PoolSpec, create_network
from ipam.records import Address, Intent, Network
from ipam.records import Node as NodeRecord
from ipam.store import Store, read_prefix
from moorage.lab.simulated import SimulatedNode
from tests.ipam.faulty import FaultyStore, eventually
from tests.patience import PATIENCE

Nodes = Callable[..., Awaitable[list["Node"]]]
"""Starts so many nodes; see conftest.py."""


class Node(SimulatedNode):
    """A simulated node that other nodes see and may ask. asked: the intents that it was left."""

    def __init__(self, path: Path, store: Store, name: str = "n1", **options: object) -> None:
        super().__init__(path, store, name, **options)
        self.asked: list[Intent] = []

    async def join(self) -> None:
        """Be seen alive by other nodes, and answer their intents; after start()."""
        self.live_on()
        await self.membership.register()

    def live_on(self) -> None:
        """The same, as soon as the fence is held. Signs of life meet no faults: late ones are tested elsewhere."""
        store = self.store.store if isinstance(self.store, FaultyStore) else self.store
        record = NodeRecord(
            name=self.name, version="1", machine_id=self.machine_id, state_id=self.journal.state_id
        )
        self.membership = Membership(store, record, self.instance, self.boot_id, self.holder.fenced)
        self.run_beside(self.membership.keep, IntentServer(self.store, self.name, self._answer).run)

    async def allocate(
        self, network: Network, uid: str, *ips: str, ipv4: int = 1, ipv6: int = 0, call: str = ""
    ) -> list[IPAddress]:
        """Addresses for a uid."""
        counts: dict[Family, int] = {4: ipv4, 6: ipv6}
        asker = Asker(uid=uid)
        named = tuple(map(ip_address, ips))
        lent = await self.holder.take(AddressRequest(network, named, counts=counts, asker=asker))
        self._commit(self.holder.allocations.plan(lent, Promise(uid, call or uuid.uuid4().hex, "modules")))
        return [held.ip for held in lent]

    def isolate(self, ips: Sequence[IPAddress], container: str) -> None:
        """A container uses what was allocated."""
        self.assign(self.holder.allocations.lend(ips), container)

    def release(self, uid: str) -> None:
        """A uid gives up what it has."""
        self._commit(self.holder.allocations.plan_release(self.holder.allocations.of(uid)))

    def _commit(self, rows: Sequence[AddressRow]) -> None:
        self.journal.save_addresses(rows)
        self.holder.accept(rows)

    async def _answer(self, intent: Intent) -> dict[str, object]:
        self.asked.append(intent)
        return await self.holder.give_back(intent)

    async def leave(self) -> None:
        """The agent is gone and its sign of life too."""
        await self.membership.leave()
        await self.crash()


async def warm_now(node: Node, count: int) -> None:
    """``count`` addresses lie ready, and nothing is left to be written."""
    await eventually(lambda: node.states().get("warm", 0) >= count and node.is_quiet())


async def network(
    store: Store,
    *cidrs: str,
    name: str = "prod",
    warm: int = 4,
    block_size: int | None = None,
    **fields: object,
) -> Network:
    """A network with these pools, created in the store."""
    specs = [PoolSpec(c, block_size=block_size if ":" not in c else None) for c in cidrs]
    return await create_network(store, Network(name=name, pools=[], warm=warm).with_(**fields), specs)


async def stored(store: Store) -> dict[IPAddress, Address]:
    items, _ = await read_prefix(store, keys.ADDRESSES)
    return {keys.ip_of(kv.key): Address.decode(kv.key, kv.value) for kv in items}


async def stored_when(
    store: Store, condition: Callable[[dict[IPAddress, Address]], bool], timeout: float = PATIENCE
) -> dict[IPAddress, Address]:
    """The addresses in the store, once ``condition`` holds of them."""
    found: dict[IPAddress, Address] = {}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while True:
                found = await stored(store)
                if condition(found):
                    return found
                await asyncio.sleep(0.01)
    raise AssertionError(f"the store has {found}")
