"""Membership: this node's facts and its sign of life in the store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from ipam import keys
from ipam.drain import Drain
from ipam.errors import ANEW, Fenced, StoreError, TryAgain
from ipam.records import Alive, Fence, Node
from ipam.schema import check_schema, read_schema
from ipam.store.base import KeyValue, Lease, Put, Store, Txn, absent, unchanged

log = structlog.get_logger(__name__)

LEASE = 15.0
"""Seconds until a dead agent's sign of life is gone."""

LOOK = 1.0
"""Seconds between looks at the lease."""

TRIES = 100
"""Each fails only because this node's own fence moved meanwhile."""


class Membership:
    """Keeps ``nodes/<name>`` and, on a lease, ``alive/<name>``.

    on_fenced: told as soon as another agent turns out to live under this node's name, so that one which has
    nothing to write does not go on giving out addresses.
    drain: says whether the node is drained; told if the store says so and the journal forgot.
    has_claimed: whether this agent has held the node's fence since it started. Until then whoever holds it, and lives
    under the name, may be this agent's own predecessor, and Writer.claim says who is somebody else.
    state_id: of the agent's state directory; goes into its sign of life.
    """

    def __init__(
        self,
        store: Store,
        node: Node,
        instance: str,
        boot_id: str,
        on_fenced: Callable[[Fenced], None],
        drain: Drain | None = None,
        *,
        has_claimed: Callable[[], bool] = lambda: True,
        state_id: str = "",
    ) -> None:
        self._store = store
        self._node = node
        self._on_fenced = on_fenced
        self._drain = drain
        self._has_claimed = has_claimed
        self._telling = asyncio.Lock()
        self._described = asyncio.Event()
        self._told: Node | None = None
        self._missing = False
        self._alive = Alive(instance=instance, boot_id=boot_id, state_id=state_id)
        self._alive_told: Alive | None = None
        self._lease: Lease | None = None

    async def register(self) -> None:
        """Say who and where we are. Raises Fenced unless this agent holds the node's fence, StoreUnavailable."""
        await self._check_fence()
        known = await self._record()
        if known is not None and known.drained and self._drain is not None:
            self._drain.remember()
        lease = await self._store.lease(LEASE)
        try:
            await self._show(lease)
        except BaseException:
            # Nobody would ever end it.
            await lease.abandon()
            raise
        self._lease, lost = lease, self._lease
        self._missing = False
        if lost is not None:
            await lost.abandon()

    async def _show(self, lease: Lease) -> None:
        alive = self._alive
        await self._write(Put(keys.ALIVE + self._node.name, alive.encode(), lease.id))
        self._alive_told = alive

    def agree(self, incarnation: str) -> None:
        """The store has all of what this node holds, in that incarnation of it; others are told at once."""
        if incarnation != self._alive.incarnation:
            self._alive = self._alive.with_(incarnation=incarnation)
            self._described.set()

    def describe(self, node: Node) -> None:
        """What this node is from now on; the store is told at once, or as soon as it answers."""
        self._node = node
        self._described.set()

    def _facts(self) -> Node:
        return self._node.with_(drained=self._drain is not None and self._drain.confirmed)

    async def tell(self) -> None:
        """Write what this node is now. Raises Fenced, StoreUnavailable."""
        await self._write()

    async def _write(self, *also: Put) -> None:
        """Only while the fence is this agent's, so that what an operator ended does not come back, and while
        this agent knows the schema, so that nobody who upgrades the store overlooks it."""
        async with self._telling:
            for _ in range(TRIES):
                fence = await self._check_fence()
                schema = await read_schema(self._store)
                check_schema(schema)
                key = keys.NODES + self._node.name
                kv = await self._store.get(key)
                known = self._decode(kv)
                told = self._facts()
                node = told.with_(
                    since=(known.since if known else 0.0) or time.time(),
                    unknown=known.unknown if known else {},
                )
                guards = (schema.guard, unchanged(fence), absent(key) if kv is None else unchanged(kv))
                if (await self._store.txn(Txn(guards, (Put(key, node.encode()), *also)))).succeeded:
                    self._told = told
                    return
        raise TryAgain(f"node {self._node.name} wrote too much meanwhile to say what it is; it tries again")

    async def _record(self) -> Node | None:
        return self._decode(await self._store.get(keys.NODES + self._node.name))

    @staticmethod
    def _decode(kv: KeyValue | None) -> Node | None:
        try:
            return None if kv is None else Node.decode(kv.key, kv.value)
        except StoreError:
            return None  # it is written anew

    async def _check_fence(self) -> KeyValue:
        kv = await self._store.get(keys.WRITERS + self._node.name)
        if kv is None or Fence.decode(kv.key, kv.value).instance != self._alive.instance:
            raise Fenced(
                f"another agent writes for node {self._node.name}, or none; it registers when it holds the fence"
            )
        return kv

    async def keep(self) -> None:
        """Register again whenever the lease was lost, until cancelled."""
        while True:
            lost = self._lease is None or not self._lease.alive or self._missing
            if lost or self._told != self._facts() or self._alive_told != self._alive:
                try:
                    if lost or self._lease is None:
                        await self.register()
                    elif self._alive_told != self._alive:
                        await self._show(self._lease)
                    else:
                        await self.tell()
                except Fenced as error:
                    if self._has_claimed():
                        self._on_fenced(error)
                except (StoreError, TryAgain) as error:
                    log.warning("node is not registered", why=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._described.wait()
            self._described.clear()

    async def follow(self) -> None:
        """Watch who lives under this node's name, until cancelled. Raises StoreError; the caller runs it again."""
        key = keys.ALIVE + self._node.name
        page = await self._store.page(key, key + "\0", limit=1)
        await self._judge(page.items[0] if page.items else None)
        async for batch in self._store.watch(key, page.revision + 1):
            for event in batch.events:
                # The watch is of a prefix, which longer names have as well.
                if event.key == key:
                    await self._judge(event.kv)

    async def _judge(self, kv: KeyValue | None) -> None:
        if kv is not None and Alive.decode(kv.key, kv.value).instance == self._alive.instance:
            return
        self._missing = True
        if kv is not None and self._has_claimed() and not await self._holds_fence():
            self._on_fenced(
                Fenced(
                    f"another agent took over node {self._node.name}; give one of the two another --node "
                    f"name, {ANEW}"
                )
            )

    async def _holds_fence(self) -> bool:
        """Whether this agent does: then whoever else is alive by the store lived before it, since nobody is registered
        without the fence. A killed predecessor's sign of life comes back with a store that was away."""
        try:
            await self._check_fence()
        except Fenced:
            return False
        return True

    async def leave(self) -> None:
        """The agent ends in order: others need not wait for the lease."""
        if self._lease is not None:
            try:
                await self._lease.revoke()
            except StoreError as error:
                log.info("sign of life is left to expire", why=str(error))
            self._lease = None
