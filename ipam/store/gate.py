"""The gate of a store: what is new about it is looked at before anything else is asked of it.

A connection that was lost and made anew may lead to a store that somebody restored meanwhile. Whoever can tell gives
``verify_with`` a coroutine function; from then on every call waits until it has returned for the connections of now.
Its own calls pass. What it raises is what the calls that wait for it raise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from ipam.errors import StoreUnavailable

_verifying: ContextVar[bool] = ContextVar("moorage_store_verifying", default=False)

Verify = Callable[[], Awaitable[None]]

PAUSE_STEP, LONGEST_PAUSE = 0.1, 1.0
"""Seconds between two looks of which each finds that something is new: by how much more each time, and at most."""


class Gate:
    """See the module's docstring. Open to all until somebody wants to verify."""

    def __init__(self) -> None:
        self._verify: Verify | None = None
        self._changes = 0
        self._verified = 0
        self._verification: asyncio.Task[None] | None = None

    def verify_with(self, verify: Verify) -> None:
        """Have this called now, before the next call, and again after each ``shut``."""
        self._verify = verify
        self.shut()

    def shut(self) -> None:
        """Something about the store may be different."""
        self._changes += 1

    async def passed(self) -> None:
        """Returns when the store as it is now was looked at. Raises what the look raises."""
        if self._verify is None or _verifying.get():
            return
        pause = 0.0
        while self._verified != self._changes:
            if self._verification is None or self._verification.done():
                self._verification = asyncio.create_task(
                    self._look(self._verify), name="moorage-store-verify"
                )
                self._verification.add_done_callback(_retrieve)
            look = self._verification
            # Others may wait for the same look as one who is cancelled.
            await asyncio.wait([look])
            if look.cancelled():
                raise StoreUnavailable("the store was closed by this process; open it again")
            look.result()
            # Servers that are never the same twice.
            await asyncio.sleep(pause)
            pause = min(pause + PAUSE_STEP, LONGEST_PAUSE)

    async def _look(self, verify: Verify) -> None:
        _verifying.set(True)
        changes = self._changes
        await verify()
        self._verified = changes

    async def close(self) -> None:
        """End a look that is under way."""
        if self._verification is not None:
            self._verification.cancel()
            await asyncio.wait([self._verification])


def _retrieve(task: asyncio.Task[None]) -> None:
    """Also of a look whose callers are gone, lest asyncio complains of it."""
    if not task.cancelled():
        task.exception()
