"""Intents: how others ask a node's agent for something without writing its records.

    asker:  put intents/<node>/<uuid> on a lease, wait for ``answer``, delete it
    agent:  follow intents/<node>/, act, write ``answer``

Only the node's agent writes its addresses; it acts only if the address's id and revision still are
what the asker saw, and only while the intent is there: that it is on a lease says that somebody waits for it. No time
is written into it, since the clocks of two machines may be hours apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog

from ipam import keys
from ipam.errors import Compacted, MoorageError, Overtaken, StoreError, TryAgain
from ipam.records import Intent
from ipam.store.base import Compare, Delete, KeyValue, Put, Store, Txn, absent, read_prefix, unchanged

log = structlog.get_logger(__name__)

RELIST = 30.0
"""Seconds without a request until they are listed anew: a watch does not notice a restored backup."""

NEVER = 4102444800.0
"""A wall clock of the year 2100, as ``expires``: earlier agents do not answer what is over by their own clock."""

Answerer = Callable[[Intent], Awaitable[dict[str, Any]]]


async def ask(
    store: Store, node: str, intent: Intent, timeout: float = 10.0, guards: Sequence[Compare] = ()
) -> dict[str, Any]:
    """Leave an intent for ``node`` and wait for its agent's answer.

    guards: have to hold when the intent is left. Raises Overtaken when they do not, TryAgain when no agent of that
    name is alive, or it does not answer within ``timeout`` seconds.
    """
    alive = await store.get(keys.ALIVE + node)
    if alive is None:
        raise TryAgain(
            f"the agent of node {node} is not running, and only it may answer for its addresses; start it"
        )
    key = f"{keys.INTENTS}{node}/{uuid.uuid4().hex}"
    lease = await store.lease(timeout + 5.0)
    try:
        put = await store.txn(
            Txn(
                (absent(key), *guards),
                (Put(key, intent.with_(expires=NEVER).encode(), lease.id),),
            )
        )
        if not put.succeeded:
            raise Overtaken(
                f"node {node} was not asked: who wanted to is not in charge any more; whoever is asks it"
            )
        async with asyncio.timeout(timeout):
            async for batch in store.watch(key, put.revision + 1):
                for event in batch.events:
                    if event.kv is None:
                        raise TryAgain(f"the request to node {node} expired unanswered; try again")
                    answered = Intent.decode(key, event.kv.value)
                    if answered.answer is not None:
                        return answered.answer
    except TimeoutError as error:
        raise TryAgain(
            f"the agent of node {node} did not answer within {timeout:.0f} s; see its log, then try again"
        ) from error
    finally:
        with contextlib.suppress(StoreError):  # it is over soon by itself
            await lease.revoke()
    raise TryAgain(f"the store closed before node {node} answered; try again")


class IntentServer:
    """The agent's side: answers every intent left for ``node``, each once."""

    def __init__(self, store: Store, node: str, answer: Answerer) -> None:
        self._store = store
        self._prefix = f"{keys.INTENTS}{node}/"
        self._answer = answer

    async def run(self) -> None:
        """Serve until cancelled. Raises StoreError when the store fails; the caller runs it again."""
        while True:
            items, revision = await read_prefix(self._store, self._prefix)
            for kv in items:
                await self._serve(kv)
            with contextlib.suppress(Compacted, TimeoutError):
                await self._follow(revision + 1)

    async def _follow(self, revision: int) -> None:
        """Raises TimeoutError when there was nothing for RELIST seconds."""
        now = asyncio.get_running_loop().time
        async with asyncio.timeout(RELIST) as patience:
            async for batch in self._store.watch(self._prefix, revision):
                patience.reschedule(None)
                for event in batch.events:
                    if event.kv is not None:
                        await self._serve(event.kv)
                patience.reschedule(now() + RELIST)

    async def _is_waited_for(self, kv: KeyValue) -> bool:
        """Whether it still is as it was read: those before it may have taken longer than its asker waits."""
        found = await self._store.get(kv.key)
        if found is None or found.mod_revision != kv.mod_revision:
            return False
        if not found.lease:
            log.warning("intent removed: it is on no lease, so nobody waits for it", key=kv.key)
            await self._store.txn(Txn((unchanged(kv),), (Delete(kv.key),)))
        return bool(found.lease)

    async def _serve(self, kv: KeyValue) -> None:
        try:
            intent = Intent.decode(kv.key, kv.value)
        except MoorageError as error:
            log.warning("intent ignored", key=kv.key, why=str(error))
            await self._store.txn(Txn((unchanged(kv),), (Delete(kv.key),)))
            return
        if intent.answer is not None or not await self._is_waited_for(kv):
            return
        try:
            answer = await self._answer(intent)
        except MoorageError as error:
            answer = {"done": False, "why": str(error)}
        except Exception:
            # One that cannot be answered must not keep the others from being answered.
            log.exception("intent failed on a bug", key=kv.key)
            answer = {"done": False, "why": "the agent failed on this request; its log says why"}
        await self._store.txn(
            Txn((unchanged(kv),), (Put(kv.key, intent.with_(answer=answer).encode(), kv.lease),))
        )
