"""A node's half of IPAM, as the isolator composes it, on a real journal; and what stands in the store."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path

from ipam import keys
from ipam.catalogue import Catalogue
from ipam.errors import MoorageError
from ipam.holder import AddressRequest, Holder, Owner
from ipam.holdings import Conflict
from ipam.intents import IntentServer
from ipam.keys import IPAddress
from ipam.membership import Membership
from ipam.networks import PoolSpec, create_network
from ipam.records import Address, Intent, Network
from ipam.records import Node as NodeRecord
from ipam.shelf import Held
from ipam.store import Store, read_prefix
from ipam.sync import SyncReport
from isolator.journal import Journal
from tests.ipam.faulty import FaultyStore


class Node:
    """An agent's IPAM. live: addresses that an endpoint carries, for a journal that is lost."""

    def __init__(
        self, path: Path, store: Store, name: str = "n1", *, boot_id: str = "boot-1", cooldown: float = 0.05
    ) -> None:
        self.name = name
        self.path = path / f"{name}.journal"
        self.store = store
        self.boot_id = boot_id
        self.cooldown = cooldown
        self.live: set[IPAddress] = set()
        self.conflicts: list[Conflict] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.asked: list[Intent] = []

    def load(self) -> None:
        self.instance = uuid.uuid4().hex
        self.journal = Journal(self.path, self.boot_id)
        self.catalogue = Catalogue(self.store, self.journal, self._catalogue_changed)
        self.holder = Holder(
            self.name,
            self.store,
            self.catalogue,
            self.journal,
            instance=self.instance,
            boot_id=self.boot_id,
            is_live=lambda ip, record: record.state == "assigned" and ip in self.live,
            on_conflict=self.conflicts.append,
            cooldown=self.cooldown,
        )
        self.catalogue.load()
        self.holder.load()

    def _catalogue_changed(self) -> None:
        self.holder.catalogue_changed()

    def serve(self) -> None:
        for work in (self.holder.serve, self.catalogue.follow):
            self._tasks.append(asyncio.create_task(_supervised(work)))

    async def join(self) -> None:
        """Be seen alive by other nodes, and answer their intents; after start()."""
        self.live_on()
        await self.membership.register()

    def live_on(self) -> None:
        """The same, as soon as the fence is held. Signs of life meet no faults: late ones are tested elsewhere."""
        store = self.store.store if isinstance(self.store, FaultyStore) else self.store
        record = NodeRecord(name=self.name, version="1")
        self.membership = Membership(store, record, self.instance, self.boot_id, self.holder.fenced)
        intents = IntentServer(self.store, self.name, self._answer)
        for work in (self.membership.keep, intents.run):
            self._tasks.append(asyncio.create_task(_supervised(work)))

    async def _answer(self, intent: Intent) -> dict[str, object]:
        self.asked.append(intent)
        return await self.holder.give_back(intent)

    async def leave(self) -> None:
        """The agent is gone and its sign of life too."""
        await self.membership.leave()
        await self.crash()

    async def start(self) -> SyncReport:
        self.load()
        report = await self.holder.sync()
        self.serve()
        return report

    async def crash(self) -> None:
        """Nothing more happens and nothing is tidied up; the journal's file stays."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        self._tasks.clear()
        self.journal.close()

    async def restart(self) -> SyncReport:
        await self.crash()
        return await self.start()

    # -- what the isolator does with it

    async def take(
        self, network: Network, *ips: str, reservation: str | None = None, pool: str | None = None
    ) -> list[Held]:
        return await self.holder.take(
            AddressRequest(network, tuple(map(ip_address, ips)), reservation=reservation, pool=pool)
        )

    def assign(self, lent: list[Held], container: str, reservation: str = "") -> list[IPAddress]:
        rows = self.holder.plan_assign(lent, Owner(container, "eth0", "mesos", reservation=reservation))
        with self.journal.transaction():
            self.journal.save_addresses(rows)
        self.holder.accept(rows)
        return [row.ip for row in rows]

    async def add(
        self, network: Network, container: str, *ips: str, reservation: str | None = None
    ) -> list[IPAddress]:
        lent = await self.take(network, *ips, reservation=reservation)
        return self.assign(lent, container, reservation or "")

    def delete(self, *ips: IPAddress) -> None:
        rows = self.holder.plan_release(ips)
        self.journal.save_addresses(rows)
        self.holder.accept(rows)

    def is_quiet(self) -> bool:
        """In sync, and nothing is left to be written."""
        return not self.holder.problem and self.holder.status()["outbox"] == 0

    def states(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for row in self.holder.status()["addresses"]:
            counts[row["state"]] = counts.get(row["state"], 0) + row["count"]
        return counts


async def _supervised(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(MoorageError):
            await work()
        await asyncio.sleep(0.02)


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
    store: Store, condition: Callable[[dict[IPAddress, Address]], bool], timeout: float = 5.0
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
