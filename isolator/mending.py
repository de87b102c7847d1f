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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from isolator.drivers.base import UNSEEN, Repair
from isolator.endpoints import Endpoints
from isolator.errors import KernelRefused
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.netlink import HostLink, Seen, Witness

log = structlog.get_logger(__name__)

LOOK_EVERY = 1.0
"""Seconds between looks at what the kernel told."""

AGAIN_AFTER = 3.0
"""Seconds between two looks at one endpoint for a cause."""

MOST_AT_ONCE = 100
"""Endpoints that are looked at before the next second for a cause: some 80 ms of processor time, several times as much
if all of them have to be mended."""

TRY_AGAIN_AFTER = 60.0
"""Seconds before what could not be put back is tried again, as long as nothing else is different."""

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

    def suspect(self, keys: Iterable[EndpointKey]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Left:
    """What could not be put back, as sentences. not_before: the loop's seconds at which it is tried again, if nothing
    else is different."""

    sentences: tuple[str, ...]
    not_before: float


class Mending:
    """See the module's docstring. What waits to be looked at outlives a failure of ``run``."""

    def __init__(self, kernel: Kernel, endpoints: Endpoints) -> None:
        self._kernel = kernel
        self._endpoints = endpoints
        self._turns = Turns(lambda: asyncio.get_running_loop().time())
        self._left: dict[EndpointKey, _Left] = {}

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

    def problems(self) -> list[str]:
        """Sentences about what somebody took of endpoints and is not put back."""
        found = [
            f"{key} is not as it should be: {'; '.join(left.sentences)}"
            for key, left in self._left.items()
            if self._endpoints.get(key) is not None
        ]
        if (waiting := self._turns.waiting) > MOST_AT_ONCE:
            found.append(
                f"something may be missing of {waiting} endpoints; they are looked at, {MOST_AT_ONCE} a second"
            )
        return found

    async def _suspect(self, seen: Seen) -> None:
        found = suspects(seen, self._endpoints.all(), await self._kernel.links())
        self._turns.suspect(endpoint.key for endpoint in found)

    async def _look(self) -> None:
        attached = [e.key for e in self._endpoints.all() if e.state is EndpointState.ATTACHED]
        for key in self._turns.take(attached):
            endpoint = self._endpoints.get(key)
            if endpoint is not None and endpoint.state is EndpointState.ATTACHED:
                await self.mend(endpoint)

    async def mend(self, endpoint: Endpoint) -> None:
        """Look at an endpoint, and put back what somebody took of it, unless that was in vain a moment ago."""
        try:
            found = await self._kernel.damage(endpoint)
        except KernelRefused as error:
            self._note(endpoint, Repair(after=(str(error),)))
            return
        if not found:
            self._left.pop(endpoint.key, None)
        elif not self._is_hopeless(endpoint, found):
            await self.repair(endpoint)

    async def repair(self, endpoint: Endpoint) -> None:
        """Put back what somebody took of it. What cannot be is logged once, and told by ``problems`` until it could."""
        try:
            async with self._endpoints.unchanged(endpoint) as unchanged:
                if not unchanged:
                    return  # what is on its way in or out only looks like damage
                repair = await self._kernel.repair(endpoint)
                if any(text.startswith(UNSEEN) for text in repair.after):
                    endpoint, repair = await self._find(endpoint, repair)
        except KernelRefused as error:
            self._note(endpoint, Repair(after=(str(error),)))
            return
        if repair.mended:
            log.warning("endpoint repaired", endpoint=str(endpoint.key), was="; ".join(repair.mended))
        self._note(endpoint, repair)

    async def _find(self, endpoint: Endpoint, before: Repair) -> tuple[Endpoint, Repair]:
        """The endpoint with the path that leads to its namespace now, repaired by that, if there is one."""
        path = await self._kernel.find_namespace(endpoint)
        if path is None:
            return endpoint, before
        log.info("endpoint's namespace found", endpoint=str(endpoint.key), was=endpoint.netns, path=path)
        moved = self._endpoints.moved(endpoint, path)
        after = await self._kernel.repair(moved)
        return moved, Repair((*before.before, *after.before), after.after)

    def _is_hopeless(self, endpoint: Endpoint, found: Sequence[str]) -> bool:
        """Whether nothing is different from what could not be put back a moment ago."""
        known = self._left.get(endpoint.key)
        if known is None or not set(found) <= set(known.sentences):
            return False
        return asyncio.get_running_loop().time() < known.not_before

    def _note(self, endpoint: Endpoint, repair: Repair) -> None:
        before = self._left.pop(endpoint.key, None)
        if not repair.after or self._endpoints.get(endpoint.key) is not endpoint:
            return
        # Where something was put back, the rest may be possible now.
        pause = 0.0 if repair.mended else TRY_AGAIN_AFTER
        self._left[endpoint.key] = _Left(repair.after, asyncio.get_running_loop().time() + pause)
        if before is None or repair.after != before.sentences:
            log.error(
                "endpoint is not as it should be", endpoint=str(endpoint.key), why="; ".join(repair.after)
            )
