"""Simulated nodes: the addresses of a node without its networking, so that hundreds fit one process.

What is simulated is the isolator; holder, writer and catalogue are the agent's own, on a journal of their own.

    node = SimulatedNode(directory, store, "n1")
    await node.start()
    ips = await node.add(network, "container-1")
    await node.holder.confirmed(ips)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ipam.catalogue import Catalogue
from ipam.coming_back import NOBODY, Asker
from ipam.errors import MoorageError
from ipam.holder import Holder, Owner
from ipam.holdings import Conflict
from ipam.keys import IPAddress
from ipam.named import AddressRequest
from ipam.namesakes import Identity, Namesakes
from ipam.records import Network
from ipam.shelf import Held
from ipam.store import Store
from ipam.sync import SyncReport
from isolator.journal import Journal

IFNAME = "eth0"

RETRY = 0.02
"""Seconds before a background task that failed is started again."""


class SimulatedNode:
    """See the module's docstring. live: addresses that an endpoint carries, for a journal that is lost.

    path: a directory for its journal. machine_id: "" if it has none. cooldown: seconds.
    others_away: as if a node were not in touch with the store.
    """

    def __init__(
        self,
        path: Path,
        store: Store,
        name: str,
        *,
        boot_id: str = "boot-1",
        machine_id: str = "",
        cooldown: float = 0.05,
    ) -> None:
        self.name = name
        self.path = path / f"{name}.journal"
        self.store = store
        self.boot_id = boot_id
        self.machine_id = machine_id
        self.cooldown = cooldown
        self.others_away = False
        self.live: set[IPAddress] = set()
        self.conflicts: list[Conflict] = []
        self._tasks: list[asyncio.Task[None]] = []

    def load(self) -> None:
        """Start from the journal, as an agent does before the store was heard."""
        self.instance = uuid.uuid4().hex
        self.journal = Journal(self.path, self.boot_id)
        self.namesakes = Namesakes(
            self.store,
            self.name,
            Identity(
                self.machine_id,
                self.journal.state_id,
                self.boot_id,
                self.instance,
                self.journal.instances,
                self.journal.machine_id,
            ),
        )
        self.journal.save_instances([*self.journal.instances, self.instance])
        self.catalogue = Catalogue(self.store, self.journal, self._catalogue_changed, node=self.name)
        self.holder = Holder(
            self.name,
            self.store,
            self.catalogue,
            self.journal,
            instance=self.instance,
            boot_id=self.boot_id,
            is_live=lambda ip, record: (
                record.state == "allocated" or (record.state == "assigned" and ip in self.live)
            ),
            on_conflict=self.conflicts.append,
            cooldown=self.cooldown,
            others_away=lambda: self.others_away,
            namesakes=self.namesakes,
        )
        self.catalogue.load()
        self.holder.load()

    def _catalogue_changed(self) -> None:
        self.holder.catalogue_changed()

    def serve(self) -> None:
        """Write, refill and follow the store from now on."""
        self.run_beside(self.holder.serve, self.catalogue.follow)

    def run_beside(self, *works: Callable[[], Awaitable[None]]) -> None:
        """Run these until ``crash``; each is started again when it fails."""
        self._tasks += [asyncio.create_task(_supervised(work)) for work in works]

    async def start(self) -> SyncReport:
        self.load()
        report = await self.holder.sync()
        self.journal.save_machine_id(self.machine_id)
        self.serve()
        return report

    async def crash(self) -> None:
        """Nothing more happens and nothing is tidied up; the journal's file stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self.journal.close()

    async def restart(self) -> SyncReport:
        await self.crash()
        return await self.start()

    # -- what the isolator does with it

    async def take(
        self,
        network: Network,
        *ips: str,
        reservation: str | None = None,
        pool: str | None = None,
        netgroups: tuple[str, ...] | None = None,
        asker: Asker = NOBODY,
    ) -> list[Held]:
        return await self.holder.take(
            AddressRequest(
                network,
                tuple(map(ip_address, ips)),
                reservation=reservation,
                pool=pool,
                netgroups=netgroups,
                asker=asker,
            )
        )

    def assign(
        self, lent: list[Held], container: str, reservation: str = "", netgroups: tuple[str, ...] = ()
    ) -> list[IPAddress]:
        owner = Owner(container, IFNAME, "mesos", netgroups, reservation=reservation)
        rows = self.holder.plan_assign(lent, owner)
        with self.journal.transaction():
            self.journal.save_addresses(rows)
        self.holder.accept(rows)
        return [row.ip for row in rows]

    async def add(
        self,
        network: Network,
        container: str,
        *ips: str,
        reservation: str | None = None,
        netgroups: tuple[str, ...] | None = None,
    ) -> list[IPAddress]:
        asker = Asker(container, IFNAME)
        lent = await self.take(network, *ips, reservation=reservation, netgroups=netgroups, asker=asker)
        return self.assign(lent, container, reservation or "", netgroups or ())

    def delete(self, *ips: IPAddress) -> None:
        rows = self.holder.plan_release(ips)
        self.journal.save_addresses(rows)
        self.holder.accept(rows)

    # -- looking in

    def status(self) -> dict[str, Any]:
        return self.holder.status()

    def is_quiet(self) -> bool:
        """In sync, and nothing is left to be written."""
        return not self.holder.problem and self.status()["outbox"] == 0

    def states(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for row in self.status()["addresses"]:
            counts[row["state"]] = counts.get(row["state"], 0) + row["count"]
        return counts


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of a burst. seconds: until the last caller had its address; transactions: sent until then."""

    ips: list[IPAddress]
    seconds: float
    transactions: int


async def burst(nodes: Sequence[SimulatedNode], network: Network, each: int) -> Burst:
    """All nodes are asked for ``each`` addresses at the same moment."""
    before = sum(node.status()["transactions"] for node in nodes)
    begun = time.perf_counter()
    taken = await asyncio.gather(*(node.add(network, f"c{i}") for node in nodes for i in range(each)))
    seconds = time.perf_counter() - begun
    sent = sum(node.status()["transactions"] for node in nodes) - before
    return Burst([ip for ips in taken for ip in ips], seconds, sent)


async def _supervised(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        with contextlib.suppress(MoorageError):
            await work()
        await asyncio.sleep(RETRY)
