"""Membership: this node's facts and its sign of life in the store."""

from __future__ import annotations

import asyncio

import structlog

from ipam import keys
from ipam.errors import StoreError
from ipam.records import Alive, Node
from ipam.store.base import Lease, Put, Store, Txn

log = structlog.get_logger(__name__)

LEASE = 15.0
"""Seconds until a dead agent's sign of life is gone."""

LOOK = 1.0
"""Seconds between looks at the lease."""


class Membership:
    """Keeps ``nodes/<name>`` and, on a lease, ``alive/<name>``."""

    def __init__(self, store: Store, node: Node, instance: str, boot_id: str) -> None:
        self._store = store
        self._node = node
        self._alive = Alive(instance=instance, boot_id=boot_id)
        self._lease: Lease | None = None

    async def register(self) -> None:
        """Say who and where we are. Call it behind the fence only. Raises StoreUnavailable."""
        lease = await self._store.lease(LEASE)
        await self._store.txn(
            Txn(
                then=(
                    Put(keys.NODES + self._node.name, self._node.encode()),
                    Put(keys.ALIVE + self._node.name, self._alive.encode(), lease.id),
                )
            )
        )
        self._lease = lease

    async def keep(self) -> None:
        """Register again whenever the lease was lost, until cancelled."""
        while True:
            if self._lease is None or not self._lease.alive:
                try:
                    await self.register()
                except StoreError as error:
                    log.warning("node is not registered", why=str(error))
            await asyncio.sleep(LOOK)

    async def leave(self) -> None:
        """The agent ends in order: others need not wait for the lease."""
        if self._lease is not None:
            try:
                await self._lease.revoke()
            except StoreError as error:
                log.info("sign of life is left to expire", why=str(error))
            self._lease = None
