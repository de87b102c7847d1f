"""Endpoints' routes, rules, addresses and neighbours, put back when somebody took them away.

What is wanted is compared with what is there, again and again, whatever is told: each endpoint comes up within
``ROUND``, and all of them first when the agent starts, since nobody knows what was done meanwhile. What the kernel
tells (netlink/witness.py) only says where to look first. A look takes some 0.8 ms of processor time, on a thread that
no ADD waits for; only what is put back is written on that of ADDs. A container that keeps undoing its own wiring is
mended every few seconds, no more often.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping

from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.netlink import HostLink, Seen, Witness

LOOK_EVERY = 1.0
"""Seconds between looks at what the kernel told."""

AGAIN_AFTER = 3.0
"""Seconds between two looks at one endpoint for a cause."""

MOST_AT_ONCE = 100
"""Endpoints that are looked at before the next second for a cause: some 80 ms of processor time, several times as much
if all of them have to be mended."""

ROUND = 8.0
"""Seconds after which an endpoint is looked at without a cause."""

MOST_IN_ROUND = 25
"""Endpoints a second that are looked at without a cause, some 20 ms of processor time: with more than ``ROUND`` times
as many, a round takes longer."""


def suspects(seen: Seen, endpoints: list[Endpoint], links: Mapping[str, HostLink]) -> list[Endpoint]:
    """The endpoints of which something may be missing. links: of the node, by name."""

    def suspected(endpoint: Endpoint) -> bool:
        link = links.get(endpoint.host_ifname)
        inside = link is not None and link.peer_namespace in seen.namespaces
        return (
            seen.lost or inside or endpoint.host_ifname in seen.links or not seen.ips.isdisjoint(endpoint.ips)
        )

    return [e for e in endpoints if e.state is EndpointState.ATTACHED and suspected(e)]


class Turns:
    """Whose turn it is to be looked at. now: seconds on any clock that only goes forward."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._waiting: dict[EndpointKey, None] = {}
        self._looked_at: dict[EndpointKey, float] = {}

    def suspect(self, keys: Iterator[EndpointKey]) -> None:
        """There is cause to look at these."""
        self._waiting |= dict.fromkeys(keys)

    def take(self, attached: list[EndpointKey]) -> list[EndpointKey]:
        """Who is to be looked at in this second. attached: all that can be."""
        now = self._now()
        there = set(attached)
        self._looked_at = {key: at for key, at in self._looked_at.items() if key in there}
        self._waiting = {key: None for key in self._waiting if key in there}

        def last(key: EndpointKey) -> float:
            return self._looked_at.get(key, -math.inf)

        # One that was never looked at counts as suspected: nobody knows what was done to it before.
        never = [key for key in attached if key not in self._looked_at]
        first = [key for key in self._waiting if last(key) <= now - AGAIN_AFTER]
        chosen = dict.fromkeys([*dict.fromkeys([*first, *never])][:MOST_AT_ONCE])
        # Suspects without end take nobody's turn.
        overdue = sorted(
            (key for key in attached if last(key) <= now - ROUND and key not in chosen), key=last
        )
        chosen |= dict.fromkeys(overdue[:MOST_IN_ROUND])
        for key in chosen:
            self._waiting.pop(key, None)
            self._looked_at[key] = now
        return list(chosen)

    @property
    def waiting(self) -> int:
        """How many there is cause to look at and that were not looked at yet."""
        return len(self._waiting)


class Mending:
    """See the module's docstring. What waits to be looked at outlives a failure of ``run``."""

    def __init__(self, kernel: Kernel, endpoints: Endpoints) -> None:
        self._kernel = kernel
        self._endpoints = endpoints
        self._turns = Turns(lambda: asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Mend until cancelled. Raises KernelRefused."""
        witness = Witness()
        try:
            # Nobody knows what went before the kernel was listened to.
            await self._suspect(Seen(lost=True))
            while True:
                await asyncio.sleep(LOOK_EVERY)
                if seen := witness.seen():
                    await self._suspect(seen)
                await self._look()
        finally:
            witness.close()

    def behind(self) -> str:
        """A sentence if more is to be looked at than the next seconds are enough for; else ""."""
        waiting = self._turns.waiting
        if waiting <= MOST_AT_ONCE:
            return ""
        return f"something may be missing of {waiting} endpoints; they are looked at, {MOST_AT_ONCE} a second"

    async def _suspect(self, seen: Seen) -> None:
        found = suspects(seen, self._endpoints.all(), await self._kernel.links())
        self._turns.suspect(endpoint.key for endpoint in found)

    async def _look(self) -> None:
        attached = [e.key for e in self._endpoints.all() if e.state is EndpointState.ATTACHED]
        for key in self._turns.take(attached):
            endpoint = self._endpoints.get(key)
            if endpoint is not None and endpoint.state is EndpointState.ATTACHED:
                await self._endpoints.mend(endpoint)
