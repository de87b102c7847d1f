"""The listener: follows Marathon, and has what is stale verified and released.

    standby --leads--> connect --stream is open--> snapshot --> steady --(reconnected, interval)--> snapshot
                                                                  |
                                                         events, graces that end

- snapshot: addresses first, then tasks, labels and Mesos's agents; everything is judged (reconcile.py). The other
  order would make an address that was assigned in between look stale.
- steady: what an event told of is judged, and what became due.

Without the stream it works on, by full passes alone. Everything that changes something compares the leadership.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import time
import uuid
from collections.abc import Coroutine
from typing import Any

import structlog

from ipam.errors import MoorageError, Overtaken, StoreError
from ipam.store.base import Store
from marathon.actions import Actions
from marathon.book import Book
from marathon.client import Marathon
from marathon.feed import Feed
from marathon.leader import Leadership
from marathon.mesos import Master
from marathon.passes import RETRY, Passes
from marathon.reconcile import Timing

log = structlog.get_logger(__name__)

GATHER = 0.05
"""Seconds in which events gather into one pass."""

OPEN_WITHIN = 5.0
"""Seconds that the first pass waits for the stream; what is stale need not wait for it."""

TELL_EVERY = 2.0
"""Seconds between writes of the listener's state; three times that when nothing happens."""

ROWS_A_SECOND = 4000
"""Addresses and tasks that full passes read, on the average; big clusters are looked at less often."""

STAND_DOWN = 1.0
"""Seconds until one that lost leadership stands for it again."""


class Phase(enum.StrEnum):
    """Where a leader is; see the module's docstring."""

    CONNECT = "connect"
    SNAPSHOT = "snapshot"
    STEADY = "steady"


class Listener:
    """See the module's docstring."""

    def __init__(
        self, store: Store, marathon: Marathon, master: Master | None = None, timing: Timing | None = None
    ) -> None:
        self._store = store
        self._marathon = marathon
        self._master = master
        self._timing = timing or Timing()
        self._instance = uuid.uuid4().hex

    async def run(self) -> None:
        """Listen until cancelled; whatever fails is logged and tried again. Raises InvalidInput for a framework id
        that is none."""
        while True:
            leadership = Leadership(self._store, await self._introduced(), self._instance, whereabouts())
            try:
                await leadership.campaign()
                await self._lead(leadership)
            except (Overtaken, StoreError) as error:
                log.warning("this listener does not lead now", why=str(error))
            finally:
                await leadership.resign()
            await asyncio.sleep(STAND_DOWN)

    async def _introduced(self) -> str:
        """The framework id, once Marathon tells it."""
        while True:
            try:
                return (await asyncio.to_thread(self._marathon.info)).framework_id or ""
            except MoorageError as error:
                log.warning("Marathon does not say which framework it is; asked again", why=str(error))
            await asyncio.sleep(RETRY)

    async def _lead(self, leadership: Leadership) -> None:
        """One term: returns or raises Overtaken or StoreError when leadership or store is lost."""
        book = Book(self._store)
        actions = Actions(self._store, leadership)
        passes = Passes(
            self._store, book, self._marathon, self._master, leadership.framework, actions, self._timing
        )
        feed = Feed(self._marathon)
        term = Term(leadership, book, feed, passes, self._marathon.url, self._timing)
        feed.start()
        try:
            await first_of(book.follow(), leadership.lost(), actions.run(), term.listen(), term.tell())
        finally:
            feed.stop()


def whereabouts() -> str:
    """Tells people which process this is."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


async def first_of(*work: Coroutine[Any, Any, None]) -> None:
    """Run side by side until one ends, and end as that one did."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class Term:
    """The loop of a leader, and what it tells of itself. url: Marathon's that answered last."""

    def __init__(
        self, leadership: Leadership, book: Book, feed: Feed, passes: Passes, url: str, timing: Timing
    ) -> None:
        self._leadership = leadership
        self._book = book
        self._feed = feed
        self._passes = passes
        self._url = url
        self._timing = timing
        self._since = time.time()
        self._phase = Phase.CONNECT
        self._lag = 0.0
        self._full_at = 0.0
        self._opened = 0

    async def listen(self) -> None:
        """Pass after pass, until cancelled. Raises StoreError."""
        await self._book.listed.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_WITHIN):
                await self._feed.wake.wait()
        while True:
            events, waited = self._feed.take()
            if events:
                self._lag = waited
            full = time.monotonic() >= self._full_at or self._feed.opened != self._opened
            if await self._passes.event_pass(events) or full:
                await self._look_at_all()
            self._passes.changed.set()
            await self._wait()

    async def _look_at_all(self) -> None:
        self._phase = Phase.SNAPSHOT
        self._opened = self._feed.opened
        await self._book.refresh()
        await self._passes.full_pass()
        rows = self._passes.last_pass["addresses"] + (self._passes.last_pass["tasks"] or 0)
        pause = max(self._timing.interval, rows / ROWS_A_SECOND)
        if self._passes.problems:
            pause = min(pause, RETRY)
        self._full_at = time.monotonic() + pause
        self._phase = Phase.CONNECT if self._feed.problem else Phase.STEADY

    async def _wait(self) -> None:
        """Until there is something to do."""
        due = self._passes.next_due
        until = self._full_at if due is None else min(self._full_at, due)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                await self._feed.wake.wait()
        await asyncio.sleep(GATHER)

    async def tell(self) -> None:
        """Keep the listener's state in the store. Raises Overtaken, StoreError."""
        while True:
            await self._leadership.tell(self._state())
            await asyncio.sleep(TELL_EVERY)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_EVERY * 2):
                    await self._passes.changed.wait()
            self._passes.changed.clear()

    def _state(self) -> dict[str, Any]:
        feed = self._feed
        return {
            "framework": self._leadership.framework,
            "phase": self._phase.value
            if not feed.problem or self._phase is Phase.SNAPSHOT
            else Phase.CONNECT.value,
            "where": whereabouts(),
            "since": self._since,
            "told": time.time(),
            "url": self._url,
            "stream": {
                "open": not feed.problem,
                "problem": feed.problem,
                "events": feed.received,
                "dropped": feed.dropped,
                "last_event": feed.heard,
                "lag_seconds": round(self._lag, 3),
            },
            "grace": self._timing.grace,
            "interval": self._timing.interval,
            "gone_after": self._timing.gone_after,
            **self._passes.report(),
        }
