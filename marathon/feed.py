"""The feed: Marathon's event stream on a thread of its own, handed to the event loop in handfuls.

    connecting --> open --> broke off --> (jittered pause) --> connecting ...

Every opening asks for a full pass: what happened in between was not told, and never will be.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

from ipam.errors import MoorageError
from marathon.client import Marathon
from marathon.events import Event

log = structlog.get_logger(__name__)

MOST_WAITING = 100_000
"""Events that may wait for the loop; beyond it they are dropped, and a full pass looks at everything."""

LONGEST_PAUSE = 15.0
FIRST_PAUSE = 0.25
"""Seconds between attempts to open the stream, doubled each time, with jitter."""

STEADY = 30.0
"""Seconds for which a stream has to have been open for the pauses to begin small again."""


class Feed:
    """See the module's docstring. All but ``_run`` and what it calls is for the event loop.

    wake: set whenever there is something new. opened: how often the stream was opened. problem: why it is not open,
    "" while it is. heard: wall clock of the last event.
    """

    def __init__(self, marathon: Marathon) -> None:
        self._marathon = marathon
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[float, Event]] = deque()
        self._signalled = False
        self._ending = threading.Event()
        self.wake = asyncio.Event()
        self.opened = 0
        self.problem = "not connected yet"
        self.dropped = 0
        self.received = 0
        self.heard = 0.0

    def start(self) -> None:
        # A daemon: it may be inside a read for as long as a stream may be silent.
        threading.Thread(target=self._run, name="marathon-events", daemon=True).start()

    def stop(self) -> None:
        """It ends by itself soon; nothing is handed over any more."""
        self._ending.set()

    def take(self) -> tuple[list[Event], float]:
        """What came since the last call, and for how many seconds the oldest of it has waited."""
        self.wake.clear()
        self._signalled = False
        taken: list[Event] = []
        waited = 0.0
        while self._events:
            at, event = self._events.popleft()
            waited = waited or time.monotonic() - at
            taken.append(event)
        return taken, waited

    # -- on the thread

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._ending.is_set():
            begun = time.monotonic()
            try:
                for event in self._marathon.follow(self._on_open):
                    if self._ending.is_set():
                        return
                    self._put(event)
            except MoorageError as error:
                self._tell(self._on_closed, str(error))
            except Exception as error:  # a bug of ours must not end the listening
                log.exception("event stream failed on a bug; it is opened again")
                self._tell(self._on_closed, repr(error))
            if time.monotonic() - begun > STEADY:
                pause = FIRST_PAUSE
            self._ending.wait(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE)

    def _put(self, event: Event) -> None:
        self.received += 1
        self.heard = time.time()
        if len(self._events) >= MOST_WAITING:
            self.dropped += 1
            return
        self._events.append((time.monotonic(), event))
        if not self._signalled:
            self._signalled = True
            self._tell(self.wake.set)

    def _on_open(self) -> None:
        self._tell(self._opened)

    def _tell(self, what: Callable[..., None], *arguments: str) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed: the process ends
            self._ending.set()

    # -- on the loop, told by the thread

    def _opened(self) -> None:
        log.info("event stream is open", url=self._marathon.url)
        self.problem = ""
        self.opened += 1
        self.wake.set()

    def _on_closed(self, why: str) -> None:
        log.warning("event stream is not open; tried again", why=why)
        self.problem = why
        self.wake.set()
