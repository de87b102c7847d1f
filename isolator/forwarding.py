"""That the node forwards: switched on, and looked at again and again, since others switch it off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from isolator.errors import KernelRefused
from isolator.kernel import Kernel

log = structlog.get_logger(__name__)

LOOK_EVERY = 5.0
"""Seconds between looks."""


class Forwarding:
    """See the module's docstring. links: of the underlay.

    Of links that are ours the drivers and the fabric see to it; of those of the underlay it is only told, since the
    kernel gives each the node's value when that is switched on, and who sets another has a reason.
    """

    def __init__(self, kernel: Kernel, links: Callable[[], Iterable[str]]) -> None:
        self._kernel = kernel
        self._links = links
        self._refused = ""
        self._silent: list[str] = []

    async def keep(self) -> None:
        """Keep it on until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                if off := await self._kernel.enable_forwarding():
                    log.warning("the node did not forward; it does again", settings=off)
                self._refused = ""
            except KernelRefused as error:
                self._refused = str(error)
            self._silent = [link for link in self._links() if await self._is_silent(link)]

    async def _is_silent(self, link: str) -> bool:
        return await self._kernel.setting(f"net/ipv4/conf/{link}/forwarding") == "0"

    def problems(self) -> list[str]:
        """Sentences about what keeps the node from forwarding."""
        found = [self._refused] if self._refused else []
        return found + [
            f"net.ipv4.conf.{link}.forwarding is 0, so containers hear nothing that comes by that link; find what sets "
            "it, such as IPv4Forwarding= of systemd-networkd"
            for link in self._silent
        ]
