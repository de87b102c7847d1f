"""One watch: follows etcd over lost connections, cut-off members and oversized replies.

etcd's own order of things is kept, with three cares:

- **Resuming** starts behind the last event delivered, never behind a reply's header, whose revision may be
  ahead of its events; only a reply without events (progress, every 10 minutes) says how far all is told.
  Without those a quiet watch would find its place compacted after a lost connection.
- **A deaf watch is noticed.** A stream can stand, pings and all, while nothing is told on it any more. After SILENCE
  etcd is asked for its progress; what does not answer is set up anew, within 30 s in all. The reply to that question
  may be ahead of the events, so it says that the watch is heard, and not how far.
- **A torrent is taken in sips.** etcd sends a reply for each transaction, and each costs a client 0.2 ms whatever
  is in it. After a few in quick succession the watch is taken down, and set up a moment later: all that
  happened meanwhile comes in one reply. That spares etcd as much, which would send each change to each node.
- **A revision is whole** in a batch: replies above the request limit arrive in fragments, so the last
  revision of a fragment waits for the next one.
- **etcd asks for one revision more** than its caller did, and drops it: before 3.4.36 and 3.5.19 compacting at
  revision R also forgot the deletions *of* R, so a watch from R silently missed them (seen with 3.4.23).
  Asking for R-1, a compaction at R is reported, and R counts as gone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from ipam.errors import Compacted, StoreError, StoreUnavailable
from ipam.store import etcd_proto as pb
from ipam.store.base import WatchBatch
from ipam.store.etcd_calls import Calls, Closed, NoAnswer
from ipam.store.etcd_channel import aio
from ipam.store.etcd_codec import Codec
from ipam.store.etcd_errors import Failure, Kind

log = structlog.get_logger(__name__)

AHEAD = 4
"""Batches held for a slow caller; then etcd is not read, and keeps or compacts what comes after."""

BACKOFF = (0.1, 2.0)
"""Seconds before a watch is set up again: multiplier and most, of a random exponential wait, so that a
thousand agents do not come back to a restarted etcd in the same moment."""

CONFIRM = 5.0
"""Seconds etcd may take to confirm a watch; afterwards silence is normal."""

SILENCE = 10.0
"""Seconds without a reply after which etcd is asked for one, and which it then has to answer."""

OF_NO_WATCH = -1
"""The watch_id of the reply to a question for progress."""

TORRENT = (5, 0.05)
"""So many replies within so many seconds, and the watch rests."""

REST = 0.2
"""Seconds that it rests. What changed meanwhile comes within 0.1 s of its being set up again."""


class Watch:
    """See ipam.store.base.Store.watch; iterate over ``batches`` once."""

    def __init__(
        self, calls: Calls, codec: Codec, prefix: str, from_revision: int, running: set[Watch]
    ) -> None:
        """running: holds this watch while it is iterated over."""
        self._calls = calls
        self._codec = codec
        self._range = codec.prefix_range(prefix)
        self._next = from_revision
        self._running = running
        self._queue: asyncio.Queue[WatchBatch | StoreError | None] = asyncio.Queue(AHEAD)
        self._ended = False
        self._part: list[pb.Message] = []
        self._confirmed = False
        self._denied = False
        self._arrived: deque[float] = deque(maxlen=TORRENT[0])

    async def batches(self) -> AsyncIterator[WatchBatch]:
        """Raises Compacted, StoreError."""
        self._running.add(self)
        follower = asyncio.create_task(self._run(), name="moorage-etcd-watch")
        try:
            while (item := await self._queue.get()) is not None and not self._ended:
                if isinstance(item, StoreError):
                    raise item
                yield item
        finally:
            self._running.discard(self)
            follower.cancel()
            await asyncio.wait([follower])

    def end(self) -> None:
        """End the iteration, dropping what the caller has not taken yet."""
        self._ended = True
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def _run(self) -> None:
        try:
            while True:
                await self._until_it_breaks()
                await asyncio.sleep(REST if self._is_torrent() else random.uniform(0, BACKOFF[0]))
                self._arrived.clear()
        except Closed:
            self.end()
        except StoreError as error:
            await self._queue.put(error)
        except Exception as error:
            # Whoever follows would wait for ever for what this does not tell.
            log.exception("watch ended on a bug")
            await self._queue.put(StoreError(f"a watch of etcd failed ({error!r}); it is set up again"))

    async def _until_it_breaks(self) -> None:
        """Try until it is set up, then follow; so the back-off starts anew after each time it was."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(NoAnswer),
            wait=wait_random_exponential(multiplier=BACKOFF[0], max=BACKOFF[1]),
            reraise=True,
        ):
            with attempt:
                self._confirmed = False
                try:
                    await self._follow()
                except NoAnswer:
                    if not self._confirmed:
                        raise

    async def _follow(self) -> None:
        """Over one connection; returns when it breaks, or has to rest. Raises NoAnswer, Compacted, StoreError."""
        self._part = []
        async with self._calls.stream(pb.WATCH) as call:
            try:
                async with asyncio.timeout(CONFIRM):
                    await call.write(self._request())
                    reply = await call.read()
            except TimeoutError as error:
                raise NoAnswer("etcd did not confirm a watch in time") from error
            while reply is not aio.EOF:
                if reply.canceled:
                    self._canceled(reply)
                self._confirmed = True
                self._denied = False
                await self._take(reply)
                # The rest of a reply in fragments would have to be sent again.
                if self._is_torrent() and not reply.fragment:
                    return
                reply = await self._read(call)

    @staticmethod
    async def _read(call: Any) -> Any:
        """The next reply. Raises NoAnswer when nothing is told on the stream any more."""
        # To end the wait for a read ends the call, so that one read outlasts the question.
        reading = asyncio.ensure_future(call.read())
        try:
            if (await asyncio.wait({reading}, timeout=SILENCE))[1]:
                await call.write(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
                if (await asyncio.wait({reading}, timeout=SILENCE))[1]:
                    log.warning("watch of etcd is deaf, and is set up anew")
                    raise NoAnswer("etcd told nothing on a watch, and did not say how far it is")
            return await reading
        finally:
            reading.cancel()

    def _is_torrent(self) -> bool:
        count, seconds = TORRENT
        return len(self._arrived) == count and self._arrived[-1] - self._arrived[0] < seconds

    def _request(self) -> pb.Message:
        start, end = self._range
        create = pb.WatchCreateRequest(
            key=start,
            range_end=end,
            start_revision=max(self._next - 1, 1),
            progress_notify=True,
            fragment=True,
        )
        return pb.WatchRequest(create_request=create)

    async def _take(self, reply: pb.Message) -> None:
        if not reply.events:
            if not reply.created and reply.watch_id != OF_NO_WATCH:
                self._next = max(self._next, reply.header.revision + 1)
            return
        self._arrived.append(time.monotonic())
        self._part += (event for event in reply.events if event.kv.mod_revision >= self._next)
        whole = self._part
        self._part = []
        if reply.fragment and whole:
            unfinished = whole[-1].kv.mod_revision
            self._part = [event for event in whole if event.kv.mod_revision == unfinished]
            whole = whole[: -len(self._part)]
        if whole:
            events = self._codec.events(whole)
            revision = whole[-1].kv.mod_revision
            self._next = revision + 1
            if events:
                await self._queue.put(WatchBatch(events, revision))

    def _canceled(self, reply: pb.Message) -> NoReturn:
        if reply.compact_revision:
            raise compacted(self._next, reply.compact_revision)
        failure = Failure("this endpoint", "", reply.cancel_reason)
        # etcd 3.4 says "permission denied" of a token that is no longer valid, too.
        if failure.kind is Kind.LOGIN or (failure.kind is Kind.REFUSED and not self._denied):
            self._denied = True
            self._calls.forget_token()
            raise NoAnswer(str(failure.error()))
        if failure.kind is Kind.REFUSED:
            raise failure.error()
        raise NoAnswer(str(failure))


async def oldest_revision(calls: Calls, codec: Codec) -> int:
    """The compacted revision, which etcd tells to watches only. Raises StoreUnavailable."""
    start, end = codec.prefix_range("")
    create = pb.WatchCreateRequest(key=start, range_end=end, start_revision=1)
    async with calls.stream(pb.WATCH, timeout=CONFIRM) as call:
        await call.write(pb.WatchRequest(create_request=create))
        while (reply := await call.read()) is not aio.EOF:
            if reply.compact_revision:
                return int(reply.compact_revision)
            if reply.events:
                break
    raise StoreUnavailable("etcd compacts its history just now; list again")


def compacted(revision: int, compact_revision: int) -> Compacted:
    return Compacted(
        f"etcd has compacted its history up to revision {compact_revision}, and revision {revision} with it; "
        "list again",
        compact_revision,
    )
