"""Endpoints of which nobody knows whether they have ended: a question to the operator, not an answer.

One endpoint whose interface is gone when the agent starts has ended meanwhile. When *all* of several are gone, though
the machine has not booted, it may as well be the agent that does not see them. So they are ``MISSING``: what they have
stays theirs, and nothing else waits for that. It ends with

    their DEL, or a GC of their engine           the endpoint ends, as always
    their interface, seen again                  the endpoint is connected again, or cut off (isolator/conflicts.py)
                                                 where another container has one of its addresses by now
    `moorage endpoint missing --release`         they have ended
    `moorage endpoint missing --keep`            they live: nothing more is asked until the next start
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence

import structlog

from ipam.errors import MoorageError, NotFound
from isolator.endpoints import COLLECTED, Endpoints
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.netlink import HostLink

log = structlog.get_logger(__name__)

SEVERAL = 2
"""Containers that have to be gone together before it is doubted. A single one ends now and then."""


def missing(endpoints: Sequence[Endpoint], links: Mapping[str, HostLink], boot_id: str) -> list[Endpoint]:
    """Of the endpoints that the journal remembers those of which nobody knows whether they have ended.

    links: the node's, by name. boot_id: of now; those of another boot have ended with it.
    """
    expected = [e for e in endpoints if e.state in COLLECTED and e.asked.boot_id == boot_id]
    if _containers(expected) < SEVERAL or any(e.host_ifname in links for e in expected):
        return []
    return expected


def _containers(endpoints: Iterable[Endpoint]) -> int:
    return len({endpoint.key.container_id for endpoint in endpoints})


class Missing:
    """See the module's docstring."""

    def __init__(self, kernel: Kernel, endpoints: Endpoints) -> None:
        self._kernel = kernel
        self._endpoints = endpoints
        self._kept: set[EndpointKey] = set()
        self._asked = False

    def all(self) -> list[Endpoint]:
        """Those that are missing now."""
        return [e for e in self._endpoints.all() if e.state is EndpointState.MISSING]

    async def look(self) -> None:
        """Connect those again whose interface is seen, and ask about the others once."""
        found = self.all()
        if not found:
            return
        links = await self._kernel.links()
        for endpoint in found:
            if endpoint.host_ifname in links:
                try:
                    await self._endpoints.reconnect(endpoint)
                except MoorageError as error:
                    log.warning(
                        "endpoint is not connected again yet", endpoint=str(endpoint.key), why=str(error)
                    )
        if not self._asked and (question := self.question()):
            log.warning(question, endpoints=[str(endpoint.key) for endpoint in self.all()])
            self._asked = True

    def question(self) -> str:
        """What an operator is to answer; "" if nothing."""
        count = _containers(endpoint for endpoint in self.all() if endpoint.key not in self._kept)
        if not count:
            return ""
        return (
            f"the interfaces of all {count} containers were gone when the agent started, and nobody said that they "
            "have ended; their addresses are kept: `moorage endpoint missing --release` if they have, start the agent "
            "where they are seen if it was moved, `moorage endpoint missing --keep` if they live"
        )

    async def release(self, keys: Collection[EndpointKey]) -> list[Endpoint]:
        """They have ended. keys: which; () is all. Returns those that have; one that is seen again has not.

        Raises NotFound, TimeoutError.
        """
        chosen = self._chosen(keys)
        ends = await asyncio.gather(*(self._endpoints.end_missing(endpoint) for endpoint in chosen))
        ended = [endpoint for endpoint, end in zip(chosen, ends, strict=True) if end]
        log.info("endpoints ended: an operator said so", endpoints=[str(endpoint.key) for endpoint in ended])
        return ended

    def keep(self, keys: Collection[EndpointKey]) -> list[Endpoint]:
        """They live. keys: which; () is all. Returns them. Raises NotFound."""
        chosen = self._chosen(keys)
        self._kept.update(endpoint.key for endpoint in chosen)
        return chosen

    def _chosen(self, keys: Collection[EndpointKey]) -> list[Endpoint]:
        found = {endpoint.key: endpoint for endpoint in self.all()}
        if unknown := sorted(set(keys) - found.keys()):
            raise NotFound(
                f"{unknown[0]} is not missing on this machine; see `moorage endpoint missing` for those that are"
            )
        return [endpoint for key, endpoint in found.items() if not keys or key in keys]
