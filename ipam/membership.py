"""Membership: this node's facts and its sign of life in the store."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from ipam import keys
from ipam.errors import Fenced, StoreError
from ipam.records import Alive, Fence, Node
from ipam.store.base import KeyValue, Lease, Put, Store, Txn

log = structlog.get_logger(__name__)

LEASE = 15.0
"""Seconds until a dead agent's sign of life is gone."""

LOOK = 1.0
"""Seconds between looks at the lease."""


def _unknown_fields(kv: KeyValue) -> dict[str, Any]:
    """What a newer version wrote about the node and this one does not know."""
    try:
        return Node.decode(kv.key, kv.value).unknown
    except StoreError:
        return {}


class Membership:
    """Keeps ``nodes/<name>`` and, on a lease, ``alive/<name>``."""

    def __init__(self, store: Store, node: Node, instance: str, boot_id: str) -> None:
        self._store = store
        self._node = node
        self._alive = Alive(instance=instance, boot_id=boot_id)
        self._lease: Lease | None = None

    async def register(self) -> None:
        """Say who and where we are. Raises Fenced unless this agent holds the node's fence, StoreUnavailable."""
        await self._check_fence()
        known = await self._store.get(keys.NODES + self._node.name)
        node = self._node
        if known is not None:
            node = node.with_(unknown=_unknown_fields(known))
        lease = await self._store.lease(LEASE)
        try:
            await self._store.txn(
                Txn(
                    then=(
                        Put(keys.NODES + node.name, node.encode()),
                        Put(keys.ALIVE + node.name, self._alive.encode(), lease.id),
                    )
                )
            )
        except BaseException:
            # Nobody would ever end it.
            await lease.abandon()
            raise
        self._lease, lost = lease, self._lease
        if lost is not None:
            await lost.abandon()

    async def _check_fence(self) -> None:
        kv = await self._store.get(keys.WRITERS + self._node.name)
        if kv is None or Fence.decode(kv.key, kv.value).instance != self._alive.instance:
            raise Fenced(
                f"another agent writes for node {self._node.name}, or none; it registers when it holds the fence"
            )

    async def keep(self) -> None:
        """Register again whenever the lease was lost, until cancelled."""
        while True:
            if self._lease is None or not self._lease.alive:
                try:
                    await self.register()
                except (StoreError, Fenced) as error:
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
