"""Where the store listens, as addresses: what the agent must always be able to reach, whatever the pools say.

Names are resolved when the agent starts and every so often, and never waited for long: a name server may be what is
unreachable. Until a name is known, whatever was known before still holds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

import structlog

from ipam.keys import IPAddress
from ipam.taken import Kind, Taken, taken

log = structlog.get_logger(__name__)

RESOLVE_EVERY = 60.0
"""Seconds between two looks at a name."""

RESOLVE_WITHIN = 2.0
"""Seconds that one look may keep the caller; the answer is used when it comes."""


class StoreAddresses:
    """See the module's docstring. endpoints: (name or IP, TCP port)."""

    def __init__(self, endpoints: Sequence[tuple[str, int]]) -> None:
        self._ports: dict[str, set[int]] = {}
        for host, port in endpoints:
            self._ports.setdefault(host, set()).add(port)
        self._known: dict[str, frozenset[IPAddress]] = {}
        self._literal = {host for host in self._ports if _parsed(host) is not None}
        self._asking: asyncio.Task[None] | None = None
        self._asked = float("-inf")

    async def look(self, before: Iterable[Taken], here: Iterable[Taken]) -> list[Taken]:
        """All addresses of all endpoints.

        before: what was known, for names that nobody has answered for yet. here: what the node's own networks use; a
        store at a loopback address is on this node, and listens on its other addresses as far as anybody knows.
        """
        await self._resolve()
        own = {one.network.version: one.ip for one in here if one.kind is Kind.ADDRESS}
        found = {
            entry
            for host, ports in self._ports.items()
            for ip in self._of(host)
            for at in ([ip] if not ip.is_loopback else own.values())
            for port in ports
            if (entry := taken(Kind.STORE, at, f"tcp/{port}")) is not None
        }
        if any(host not in self._known for host in self._ports.keys() - self._literal):
            found |= {one for one in before if one.kind is Kind.STORE}
        return sorted(found, key=str)

    def _of(self, host: str) -> frozenset[IPAddress]:
        literal = _parsed(host)
        return self._known.get(host, frozenset()) if literal is None else frozenset({literal})

    async def _resolve(self) -> None:
        names = sorted(self._ports.keys() - self._literal)
        now = asyncio.get_running_loop().time()
        if not names or (self._asking is None and now < self._asked + RESOLVE_EVERY):
            return
        if self._asking is None:
            self._asked = now
            self._asking = asyncio.create_task(self._ask(names))
        done, _ = await asyncio.wait({self._asking}, timeout=RESOLVE_WITHIN)
        if done:
            self._asking = None

    async def _ask(self, names: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        for name in names:
            try:
                answers = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:  # the latter of what can be no host name
                log.info("a name of the store was not resolved", name=name, why=str(error))
                continue
            ips = (_parsed(str(address[0])) for *_, address in answers)
            self._known[name] = frozenset(ip for ip in ips if ip is not None)


def _parsed(text: str) -> IPAddress | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None
