"""Membership: this node's facts and its sign of life in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
    """Keeps ``nodes/<name>`` and, on a lease, ``alive/<name>``.

    on_fenced: told as soon as another agent turns out to live under this node's name, so that one which has
    nothing to write does not go on giving out addresses.
    """

    def __init__(
        self, store: Store, node: Node, instance: str, boot_id: str, on_fenced: Callable[[Fenced], None]
    ) -> None:
        self._store = store
        self._node = node
        self._on_fenced = on_fenced
        self._missing = False
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
        self._missing = False
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
            if self._lease is None or not self._lease.alive or self._missing:
                try:
                    await self.register()
                except Fenced as error:
                    self._on_fenced(error)
                except StoreError as error:
                    log.warning("node is not registered", why=str(error))
            await asyncio.sleep(LOOK)

    async def follow(self) -> None:
        """Watch who lives under this node's name, until cancelled. Raises StoreError; the caller runs it again."""
        key = keys.ALIVE + self._node.name
        page = await self._store.page(key, key + "~", limit=1)
        self._judge(page.items[0] if page.items else None)
        async for batch in self._store.watch(key, page.revision + 1):
            for event in batch.events:
                if event.key == key:
                    self._judge(event.kv)

    def _judge(self, kv: KeyValue | None) -> None:
        if kv is None:
            self._missing = True
        elif Alive.decode(kv.key, kv.value).instance != self._alive.instance:
            self._missing = True
            self._on_fenced(
                Fenced(
                    f"another agent took over node {self._node.name}; give one of the two another --node name"
                )
            )

    async def leave(self) -> None:
        """The agent ends in order: others need not wait for the lease."""
        if self._lease is not None:
            try:
                await self._lease.revoke()
            except StoreError as error:
                log.info("sign of life is left to expire", why=str(error))
            self._lease = None
