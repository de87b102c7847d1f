"""The node's connection table, watched: when it runs full all of the node loses packets, its own services too.

Each endpoint has a limit in the firewall (policy/ruleset.py, chain ``counted``). The firewall counts what is open, and
began since its table was made; entries of TCP connections that have ended stay for two minutes. So when the connection
table is half full, the entries themselves are counted, and who has more than its limit begins nothing until a count
finds that it has not. Fullness is logged at 80 % and 95 %, with who has most.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.model import IPAddress
from isolator.tracking import SHARE, Table

log = structlog.get_logger(__name__)

LOOK_EVERY = 1.0
"""Seconds between looks at the table's size: two files. A flood of forged packets adds 20,000 entries a second."""

COUNTED_FROM = 0.5
"""Of the table; from then on the entries are counted, some 3 ms for each 1,000."""

COUNTED_EVERY = 5.0
"""Seconds between counts, unless the table grew by the share of one endpoint since the last."""

LEVELS = (0.8, 0.95)
"""Of the table; each is logged when it is reached."""

LARGEST = 3


@dataclass(frozen=True, slots=True)
class Source:
    """Who began connections. endpoint: as ``CONTAINER/IFNAME``, "" if it is none of this node."""

    ip: IPAddress
    count: int
    endpoint: str

    def __str__(self) -> str:
        return f"{self.endpoint or self.ip}: {self.count}"


class Connections:
    """See the module's docstring. on_size: told when the table has another size, of which limits are a share."""

    def __init__(self, kernel: Kernel, endpoints: Endpoints, on_size: Callable[[], None]) -> None:
        self._kernel = kernel
        self._endpoints = endpoints
        self._on_size = on_size
        self._table = Table(0, 0)
        self._largest: list[Source] = []
        self._halted: list[str] = []
        self._counted = Table(0, 0)
        self._counted_at = float("-inf")
        self._level = 0

    async def watch(self) -> None:
        """Look until cancelled. Raises KernelRefused."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY)

    async def look(self) -> None:
        """Look once. Raises KernelRefused."""
        before, self._table = self._table, await self._kernel.connection_table()
        if before.most != self._table.most:
            self._on_size()
        fullness = self._table.tracked / self._table.most if self._table.most else 0.0
        reached = sum(fullness >= level for level in LEVELS)
        if reached > self._level:
            # Before the count, which takes a while when it matters most.
            log.warning(
                "connection table runs full; when it is full the node loses packets of everybody",
                tracked=self._table.tracked,
                most=self._table.most,
            )
        if fullness < COUNTED_FROM:
            self._largest = []
            await self._halt(Counter())
        elif reached > self._level or self._is_count_due():
            await self._count()
            if reached > self._level:
                log.warning("who began most connections", largest=[str(source) for source in self._largest])
        self._level = reached

    def _is_count_due(self) -> bool:
        grown = self._table.tracked - self._counted.tracked
        since = asyncio.get_running_loop().time() - self._counted_at
        return grown > self._table.most // SHARE or since >= COUNTED_EVERY

    async def _count(self) -> None:
        self._counted = self._table
        sources = await self._kernel.connection_sources()
        self._counted_at = asyncio.get_running_loop().time()
        self._largest = [self._source(ip, count) for ip, count in sources.most_common(LARGEST)]
        await self._halt(sources)

    def _source(self, ip: IPAddress, count: int) -> Source:
        endpoint = self._endpoints.of_ip(ip)
        return Source(ip, count, str(endpoint.key) if endpoint is not None else "")

    async def _halt(self, sources: Counter[IPAddress]) -> None:
        """Who has more than its limit begins nothing more until a look finds that it has not."""
        found: Counter[str] = Counter()
        for endpoint in self._endpoints.all() if sources else ():
            found[endpoint.host_ifname] += sum(sources[ip] for ip in endpoint.ips)
        limits = await self._kernel.connection_limits() if found else {}
        over = sorted(name for name, count in found.items() if count > limits.get(name, count))
        if over == self._halted:
            return
        if over:
            log.warning("endpoints have more connections than they may; they begin no more", interfaces=over)
        await self._kernel.halt(over)
        self._halted = over

    def status(self) -> dict[str, Any]:
        """For `moorage status`. largest: who began most of them, while the table is half full."""
        return {
            "tracked": self._table.tracked,
            "most": self._table.most,
            "largest": [
                {"ip": str(source.ip), "count": source.count, "endpoint": source.endpoint}
                for source in self._largest
            ],
        }
