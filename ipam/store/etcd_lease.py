"""A lease of etcd and the task that renews it.

Whether it is alive is judged by this machine's clock from the moment the last successful renewal was *asked*
for, so that we give it up no later than etcd does. The clock counts a machine's sleep, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from ipam.errors import StoreError
from ipam.store import etcd_proto as pb
from ipam.store.etcd_calls import ATTEMPT, Calls, NoAnswer
from ipam.store.etcd_channel import aio
from ipam.store.etcd_errors import LeaseOver
from ipam.supervision import Supervision

RENEWALS = 3
"""Renewals within its time to live: two may fail before it is lost."""

RETRY = 0.25
"""Seconds before a renewal that failed is tried again."""


class EtcdLease:
    """See ipam.store.base.Lease."""

    def __init__(
        self,
        calls: Calls,
        lease: int,
        ttl: int,
        deadline: float,
        kept: set[EtcdLease],
        supervision: Supervision,
    ) -> None:
        """kept: holds this lease while it is renewed. supervision: of who renews it."""
        self._calls = calls
        self._id = lease
        self._ttl = ttl
        self._deadline = deadline
        self._gone = False
        self._kept = kept
        self._keeper = supervision.start(
            f"lease {lease:x}", self._keep_alive, longest=ttl / RENEWALS, ends=True
        )
        kept.add(self)

    @classmethod
    async def grant(
        cls, calls: Calls, ttl: float, kept: set[EtcdLease], supervision: Supervision
    ) -> EtcdLease:
        """etcd counts whole seconds and has a least of its own (1.5 elections). Raises StoreError."""
        asked = _now()
        # Asked for twice it leaves a lease behind that has no keys, for one time to live.
        reply = await calls.ask(pb.LEASE_GRANT, pb.LeaseGrantRequest(TTL=math.ceil(ttl)))
        return cls(calls, reply.ID, reply.TTL, asked + reply.TTL, kept, supervision)

    @property
    def id(self) -> int:
        return self._id

    @property
    def alive(self) -> bool:
        return not self._gone and _now() < self._deadline

    async def revoke(self) -> None:
        await self.abandon()
        self._gone = True
        with contextlib.suppress(LeaseOver):
            await self._calls.ask(pb.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._id))

    async def abandon(self) -> None:
        self._kept.discard(self)
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep_alive(self) -> None:
        pause = self._ttl / RENEWALS
        while not self._gone:
            await asyncio.sleep(pause)
            try:
                await self._renew()
                pause = self._ttl / RENEWALS
            except StoreError:
                pause = min(RETRY, self._ttl / RENEWALS)

    async def _renew(self) -> None:
        asked = _now()
        async with self._calls.stream(pb.LEASE_KEEP_ALIVE, timeout=ATTEMPT) as call:
            await call.write(pb.LeaseKeepAliveRequest(ID=self._id))
            reply = await call.read()
        if reply is aio.EOF:
            raise NoAnswer("etcd did not answer to the renewal of a lease")
        if reply.TTL <= 0:
            self._gone = True
            return
        self._ttl = reply.TTL
        self._deadline = asked + reply.TTL


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
