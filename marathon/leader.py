"""Who listens: one listener per framework is active, the others stand by.

    leaders/<framework>     created while absent, on a lease; never rewritten, so its revision is the leadership
    listeners/<framework>   what the leader found last, on the same lease

Whatever a leader does compares that revision in the same transaction. So one that was paused for longer than its
lease, and does not know it, cannot do anything when it wakes up: its key is gone, or another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import Any

import msgspec
import structlog

from ipam import keys
from ipam.errors import InvalidInput, Overtaken, StoreError
from ipam.records import Record
from ipam.store.base import Compare, Lease, Put, Store, Txn, absent

log = structlog.get_logger(__name__)

LEASE = 6.0
"""Seconds until a dead leader's key is gone; another one takes over within 10."""

LOOK = 2.0
"""Seconds between looks at a leader's key, and at one's own lease, besides what the store tells by itself."""

_FRAMEWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", re.ASCII)


class Leader(Record, frozen=True, kw_only=True):
    """``leaders/<framework>``. where: of its process, for people."""

    instance: str
    where: str
    since: float


def check_framework(framework: str) -> str:
    """A framework's id as part of a key. Raises InvalidInput."""
    if _FRAMEWORK.fullmatch(framework) is None:
        raise InvalidInput(
            f"Marathon gave the framework id {framework!r:.80}, which is none of Mesos's; see its /v2/info"
        )
    return framework


class Leadership:
    """One candidate for one framework. instance: distinguishes candidates, where: tells people which one it is."""

    def __init__(self, store: Store, framework: str, instance: str, where: str) -> None:
        self._store = store
        self.framework = check_framework(framework)
        self._instance = instance
        self._where = where
        self._lease: Lease | None = None
        self._revision = 0

    @property
    def _key(self) -> str:
        return keys.LEADERS + self.framework

    @property
    def held(self) -> bool:
        """Whether it is held, as far as one can know without asking; ``guards`` is what decides."""
        return self._lease is not None and self._lease.alive

    @property
    def guards(self) -> tuple[Compare, ...]:
        """What every transaction of a leader compares. Raises Overtaken."""
        if not self.held:
            raise Overtaken(f"this process does not lead for framework {self.framework} any more")
        return (Compare(self._key, self._revision),)

    async def leader(self) -> Leader | None:
        """Who leads now. Raises StoreError."""
        kv = await self._store.get(self._key)
        return None if kv is None else Leader.decode(kv.key, kv.value)

    async def take(self) -> bool:
        """Lead if nobody does; says whether that is so now. Raises StoreError."""
        if await self._store.get(self._key) is not None:
            return False
        lease = await self._store.lease(LEASE)
        taken = False
        try:
            me = Leader(instance=self._instance, where=self._where, since=time.time())
            result = await self._store.txn(
                Txn((absent(self._key),), (Put(self._key, me.encode(), lease.id),))
            )
            taken = result.succeeded
        finally:
            if not taken:
                await _end(lease)
        if taken:
            self._lease, self._revision = lease, result.revision
        return taken

    async def campaign(self) -> None:
        """Wait until this one leads. Raises StoreError."""
        while not await self.take():
            page = await self._store.page(self._key, self._key + "\0", limit=1)
            if not page.items:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._vacant(page.revision + 1)
        log.info("this listener leads", framework=self.framework)

    async def _vacant(self, revision: int) -> None:
        async for batch in self._store.watch(self._key, revision):
            if any(event.key == self._key and event.kv is None for event in batch.events):
                return

    async def lost(self) -> None:
        """Returns when it is not held any more, or somebody took the key away."""
        while self.held:
            await asyncio.sleep(LOOK / 4)
            with contextlib.suppress(StoreError):
                kv = await self._store.get(self._key)
                if kv is None or kv.mod_revision != self._revision:
                    return

    async def tell(self, state: dict[str, Any]) -> None:
        """Leave for others how it stands. Raises Overtaken, StoreError."""
        guards = self.guards
        assert self._lease is not None, "guards raise without one"
        put = Put(keys.LISTENERS + self.framework, msgspec.json.encode(state), self._lease.id)
        if not (await self._store.txn(Txn(guards, (put,)))).succeeded:
            raise Overtaken(f"another process leads for framework {self.framework}")

    async def resign(self) -> None:
        """Let another one lead, at once if the store answers."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await _end(lease)


async def _end(lease: Lease) -> None:
    try:
        await lease.revoke()
    except StoreError as error:
        log.info("leadership is left to expire", why=str(error))
