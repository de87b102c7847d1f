"""Routes of running containers to their networks' pools, kept right as pools come and go.

An ADD lays the routes to the pools there are. What changes later is compared here, by level: what an endpoint was given
routes to (the journal) against what its network has (the catalogue). A container takes some 0.3 ms, on the thread that
no ADD waits for, and only so many get their turn in a second. What somebody takes away inside a container is put back
by mending.py.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from ipam.errors import MoorageError
from isolator.endpoints import Endpoints
from isolator.model import EndpointKey

log = structlog.get_logger(__name__)

LOOK_EVERY = 5.0
"""Seconds between looks; a change of the catalogue is looked at sooner."""

CHANGES_TOGETHER = 0.2
"""Seconds in which changes gather: a look takes some 3 ms with a thousand endpoints."""

MOST_AT_ONCE = 100
"""Endpoints that are seen to before the next second: some 30 ms of work."""

PAUSE = 1.0
"""Seconds before the next ones."""


class PoolRoutes:
    """See the module's docstring."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._changed = asyncio.Event()
        self._refused: dict[EndpointKey, str] = {}

    def catalogue_changed(self) -> None:
        self._changed.set()

    async def keep(self) -> None:
        """Keep them right until cancelled."""
        while True:
            self._changed.clear()
            done, left = await self._look()
            if done:
                log.info("routes to pools changed in containers", endpoints=done)
            if left:
                await asyncio.sleep(PAUSE)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._changed.wait()
                    await asyncio.sleep(CHANGES_TOGETHER)

    async def _look(self) -> tuple[int, bool]:
        """How many were seen to, and whether there are more that may be."""
        misrouted = self._endpoints.misrouted()
        keys = {endpoint.key for endpoint in misrouted}
        self._refused = {key: why for key, why in self._refused.items() if key in keys}
        # Those that could not be helped wait until the others had their turn.
        waiting = sorted(misrouted, key=lambda endpoint: endpoint.key in self._refused)
        done = 0
        for endpoint in waiting[:MOST_AT_ONCE]:
            why = "its interface is down, or the path to its namespace is not known"
            try:
                if await self._endpoints.reroute(endpoint):
                    done += 1
                    continue
            except MoorageError as error:
                why = str(error)
            if self._refused.get(endpoint.key) != why:
                log.warning("routes to pools are not as they should be", endpoint=str(endpoint.key), why=why)
            self._refused[endpoint.key] = why
        return done, len(waiting) > MOST_AT_ONCE
