"""Following prefixes of the store: what every reader that keeps a picture of it does after it has listed.

while True:
    revisions = list everything, prefix by prefix
    await follow(store, revisions, deliver, again)      # returns when the picture has to be made anew
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from ipam.errors import Compacted, StoreError
from ipam.store.base import Store, WatchBatch

log = structlog.get_logger(__name__)


async def follow(
    store: Store,
    listed: Mapping[str, int],
    deliver: Callable[[str, WatchBatch], None],
    again: asyncio.Event,
) -> None:
    """Deliver every change below the prefixes from behind the revision at which each was listed.

    deliver: told the prefix and the batch. again: set by whoever wants everything listed anew, because the
    store went back in time, say, which no watch notices. Returns then, and when the store has compacted what comes
    next: list again. Raises StoreError.
    """
    tasks = [
        asyncio.create_task(_follow(store, prefix, at + 1, deliver), name=f"watch of {prefix}")
        for prefix, at in listed.items()
    ]
    # No task group: one whose parent is cancelled in the moment in which a child fails forgets the cancellation.
    tasks.append(asyncio.create_task(_until(again), name="watch ends"))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    try:
        for task in done:
            task.result()
    except Compacted as error:
        log.info("store is listed anew", prefixes=sorted(listed), why=str(error))


async def _follow(
    store: Store, prefix: str, revision: int, deliver: Callable[[str, WatchBatch], None]
) -> None:
    async for batch in store.watch(prefix, revision):
        deliver(prefix, batch)
    raise StoreError(f"the store closed while {prefix} was followed; restart the agent")


async def _until(again: asyncio.Event) -> None:
    await again.wait()
