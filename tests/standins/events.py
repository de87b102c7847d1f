"""Marathon's event stream, and everything that can go wrong on one.

A stream is what one subscriber gets: server-sent events as Marathon writes them, blank keep-alive lines between
them, no ids and no replay. Its faults are drawn from a seeded generator, event by event.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

KEEPALIVE = b"\r\n"
"""What Marathon's server writes when there was nothing for a while."""

MOST_WAITING = 10_000
"""Events that may wait for a subscriber; Marathon drops one that is slower."""


@dataclass(slots=True)
class EventFaults:
    """Shares of the events, 0 to 1, that meet each fault. All are 0 at first.

    lose: never sent. duplicate: sent twice. delay: sent up to ``late`` seconds later, so that later ones overtake them.
    garble: cut in the middle, but ended like a whole one. cut: the connection breaks in the middle of it.
    """

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    late: float = 1.0
    garble: float = 0.0
    cut: float = 0.0

    def none(self) -> None:
        """Behave again."""
        self.lose = self.duplicate = self.delay = self.garble = self.cut = 0.0


class Broken(ConnectionError):
    """The stream ends here, in the middle of whatever it was saying."""


class Stream:
    """What one subscriber gets. kinds: the types of event it asked for; none means all."""

    def __init__(self, kinds: frozenset[str], keepalive: float) -> None:
        self._kinds = kinds
        self._keepalive = keepalive
        self._waiting: list[tuple[float, int, bytes]] = []
        self._number = 0
        self._closed = False
        self._changed = threading.Condition()

    def wants(self, kind: str) -> bool:
        return not self._kinds or kind in self._kinds

    def put(self, text: bytes, late: float = 0.0) -> None:
        """Send it, ``late`` seconds from now."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._closed = True
            self._number += 1
            heapq.heappush(self._waiting, (time.monotonic() + late, self._number, text))
            self._changed.notify()

    def close(self) -> None:
        """End it; what waits is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def chunks(self, *, silent: Silence) -> Iterator[bytes]:
        """What goes over the wire, until the stream is closed."""
        heard = time.monotonic()
        while True:
            due: list[bytes] = []
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                while self._waiting and self._waiting[0][0] <= now:
                    due.append(heapq.heappop(self._waiting)[2])
                if not due:
                    until = min(heard + self._keepalive, self._waiting[0][0] if self._waiting else now + 60)
                    if until > now:
                        self._changed.wait(until - now)
                        continue
            if silent.on:
                time.sleep(0.02)  # what would have been said is lost, keep-alives too
                continue
            heard = now
            for text in due or [KEEPALIVE]:
                if text is CUT:
                    return
                yield text


CUT = b"cut"
"""In the place of an event: here the connection breaks."""


@dataclass(slots=True)
class Silence:
    """on: streams stay open and say nothing any more, as behind a firewall that forgot the connection."""

    on: bool = False


class Streams:
    """All subscribers of a Marathon. keepalive: seconds."""

    def __init__(self, chance: random.Random, keepalive: float) -> None:
        self.faults = EventFaults()
        self.silence = Silence()
        self.keepalive = keepalive
        self.published = 0
        self.lost = 0
        self._chance = chance
        self._streams: list[Stream] = []
        self._lock = threading.Lock()

    def subscribe(self, kinds: frozenset[str]) -> Iterator[bytes]:
        """A new subscriber's bytes; it gets what is published from now on."""
        stream = Stream(kinds, self.keepalive)
        with self._lock:
            self._streams.append(stream)
        return self._follow(stream)

    def _follow(self, stream: Stream) -> Iterator[bytes]:
        try:
            yield from stream.chunks(silent=self.silence)
        finally:
            with self._lock:
                self._streams.remove(stream)

    @property
    def subscribers(self) -> int:
        return len(self._streams)

    def publish(self, event: dict[str, Any]) -> None:
        """Send it to everybody who wants its type, faults permitting."""
        kind = event["eventType"]
        text = b"event: %s\r\ndata: %s\r\n\r\n" % (kind.encode(), msgspec.json.encode(event))
        with self._lock:
            self.published += 1
            for stream in self._streams:
                if stream.wants(kind):
                    self._send(stream, text)

    def _send(self, stream: Stream, text: bytes) -> None:
        faults, chance = self.faults, self._chance
        if chance.random() < faults.lose:
            self.lost += 1
            return
        if chance.random() < faults.garble:
            text = text[: len(text) // 2] + b"\r\n\r\n"
        if chance.random() < faults.cut:
            stream.put(text[: len(text) // 2])
            stream.put(CUT)
            return
        late = chance.uniform(0, faults.late) if chance.random() < faults.delay else 0.0
        stream.put(text, late)
        if chance.random() < faults.duplicate:
            stream.put(text, late + chance.uniform(0, faults.late) * (faults.delay > 0))

    def close(self) -> None:
        """Every stream ends, as when Marathon does."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
