"""Following prefixes of the store: what every reader that keeps a picture of it does after it has listed.

while True:
    revisions = list everything, prefix by prefix
    await follow(store, revisions, deliver, rewound)      # returns when the picture has to be made anew
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from ipam.errors import Compacted, StoreError
from ipam.store.base import Store, WatchBatch

log = structlog.get_logger(__name__)


class _Rewound(Exception):
    """The watches run ahead of the store."""


async def follow(
    store: Store,
    listed: Mapping[str, int],
    deliver: Callable[[str, WatchBatch], None],
    rewound: asyncio.Event,
) -> None:
    """Deliver every change below the prefixes from behind the revision at which each was listed.

    deliver: told the prefix and the batch. rewound: set by whoever learns that the store went back in time,
    which no watch notices. Returns when that happened, or when the store has compacted what comes next:
    list again. Raises StoreError.
    """
    trouble: list[Exception] = []
    try:
        async with asyncio.TaskGroup() as group:
            for prefix, revision in listed.items():
                group.create_task(_follow(store, prefix, revision + 1, deliver))
            group.create_task(_end_when(rewound))
    except* (Compacted, _Rewound) as again:
        log.info("store is listed anew", prefixes=sorted(listed), why=str(again.exceptions[0]))
    except* StoreError as errors:
        # An exception raised in here would arrive in a group of its own.
        trouble += errors.exceptions
    if trouble:
        raise trouble[0]


async def _follow(
    store: Store, prefix: str, revision: int, deliver: Callable[[str, WatchBatch], None]
) -> None:
    async for batch in store.watch(prefix, revision):
        deliver(prefix, batch)
    raise StoreError(f"the store closed while {prefix} was followed; restart the agent")


async def _end_when(rewound: asyncio.Event) -> None:
    await rewound.wait()
    raise _Rewound("the store went back in time")
