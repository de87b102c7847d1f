"""Calls to etcd: what is retried, what is sent once, and who we say we are.

| | sent | after a failure that leaves the outcome open |
|---|---|---|
| ``ask``: reads, lease calls | again, to another member, jittered, up to ASK seconds | StoreUnavailable |
| ``once``: transactions | once, over a connection that stands | Ambiguous |
| ``stream``: watches, renewals | by the caller | StoreUnavailable |

All of them wait at the ``gate`` after a connection was made, and after a reply that does not go on from the one before.

Only what provably did not take effect is sent again by ``once``: a request that etcd refused for its token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from ipam.errors import Ambiguous, InvalidInput, StoreError, StoreUnavailable
from ipam.store import etcd_proto as pb
from ipam.store.etcd_channel import aio
from ipam.store.etcd_errors import AuthenticationOff, Failure, Kind
from ipam.store.etcd_link import Connection, Link
from ipam.store.etcd_url import EtcdUrl, login
from ipam.store.gate import Gate

ATTEMPT = 2.5
"""Seconds one attempt of ``ask`` may take, after which another member is asked."""

ASK = 8.0
"""Seconds after which ``ask`` makes no further attempt: an election, and a member that keeps silent, pass."""

ONCE = 3.0
"""Seconds a transaction may take: longer than an election, in which a follower accepts one and forgets it. etcd
itself gives up on one after 7 (5 and two elections)."""

BACKOFF = (0.05, 1.0)
"""Seconds between two attempts: multiplier and most, of a random exponential wait."""

SHORTEST = 0.5
"""Seconds that the last attempt of ``ask`` has at least: less would say nothing about the member."""

LINEARIZED = (pb.RANGE, pb.TXN)
"""Whose replies have a revision that is no older than any reply before: that of all members, not of one alone."""

LOGINS = 2
"""Times that a refused token is replaced for one request."""


class NoAnswer(StoreUnavailable):
    """A call failed, with or without effect; another member may be asked."""


class NotApplied(NoAnswer):
    """A call failed, or was not made, and is known to have had no effect."""


class Full(StoreUnavailable):
    """etcd has no space left; the request that used it up was applied all the same."""


class BadToken(NotApplied):
    """etcd wants a new login."""


class Closed(StoreUnavailable):
    """The store was closed, maybe during the call."""

    def __init__(self) -> None:
        super().__init__("the etcd store was closed by this process; open it again")


class TooLarge(StoreError):
    """The reply was larger than this client takes."""


class Gone(StoreError):
    """The revision asked for is compacted."""


class Calls:
    """The one place that sends anything to etcd."""

    def __init__(self, url: EtcdUrl) -> None:
        self._url = url
        self.gate = Gate()
        self._link = Link(url, self.gate.shut)
        self._heard: tuple[int, int] | None = None
        self._revision = 0
        self._token: str | None = None if url.user_file else ""
        self._login_lock = asyncio.Lock()
        self._closed = False

    def renew(self) -> None:
        """See Store.reconnect."""
        self._link.renew()

    async def close(self) -> None:
        """Calls in flight fail."""
        self._closed = True
        await self.gate.close()
        await self._link.close()

    def check_open(self) -> None:
        """Raises StoreUnavailable."""
        if self._closed:
            raise Closed

    async def ask(self, method: pb.Method, request: pb.Message) -> pb.Message:
        """The reply to what may be asked twice. Raises StoreError, StoreUnavailable, Gone, TooLarge."""
        until = time.monotonic() + ASK
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(NoAnswer),
            stop=stop_after_delay(ASK),
            wait=wait_random_exponential(multiplier=BACKOFF[0], max=BACKOFF[1]),
            reraise=True,
        ):
            with attempt:
                connection = await self._connection()
                left = max(until - time.monotonic(), SHORTEST)
                return await self._unary(connection, method, request, min(ATTEMPT, left))
        raise AssertionError("unreachable: the last attempt raises")

    async def once(self, method: pb.Method, request: pb.Message) -> pb.Message:
        """The reply to what must not be done twice. Raises Ambiguous, StoreError, StoreUnavailable."""
        connection = await self._connection()
        try:
            return await self._unary(connection, method, request, ONCE)
        except NotApplied:
            raise
        except (NoAnswer, TooLarge, Closed, Full) as error:
            raise Ambiguous(f"{error}; whether the transaction was applied is not known") from error

    @contextlib.asynccontextmanager
    async def stream(self, method: pb.Method, timeout: float | None = None) -> AsyncIterator[Any]:
        """An open call, to write to and read from; what it raises inside becomes ours.

        Raises StoreError, StoreUnavailable, Gone.
        """
        connection = await self._connection()
        token = await self._current_token(connection)
        with connection.used():
            call = connection.call(method)(metadata=_metadata(token), timeout=timeout, wait_for_ready=False)
            try:
                yield call
            except aio.AioRpcError as error:
                self._fail(connection, token, error)
            except asyncio.CancelledError as error:
                self._cancelled(error)
            finally:
                call.cancel()

    def forget_token(self) -> None:
        """Log in again before the next call: for an answer that hides a bad token."""
        if self._url.user_file:
            self._token = None

    # --- one attempt

    async def _connection(self) -> Connection:
        self.check_open()
        try:
            while True:
                connection = await self._link.ready()
                await self.gate.passed()
                # What was looked at is what is used.
                if connection.stands:
                    return connection
        except asyncio.CancelledError as error:
            self._cancelled(error)
        except StoreUnavailable as error:
            raise NotApplied(str(error)) from error

    async def _unary(
        self, connection: Connection, method: pb.Method, request: pb.Message, timeout: float
    ) -> pb.Message:
        for _ in range(LOGINS):
            token = await self._current_token(connection)
            with contextlib.suppress(BadToken):
                return await self._send(connection, method, request, timeout, token)
        token = await self._current_token(connection)
        try:
            return await self._send(connection, method, request, timeout, token)
        except BadToken as error:
            raise StoreUnavailable(str(error)) from error

    async def _send(
        self, connection: Connection, method: pb.Method, request: pb.Message, timeout: float, token: str
    ) -> pb.Message:
        with connection.used():
            before = self._revision
            try:
                reply = await connection.call(method)(
                    request, metadata=_metadata(token), timeout=timeout, wait_for_ready=False
                )
                if method in LINEARIZED:
                    self._hear(reply.header, before)
                return reply
            except aio.AioRpcError as error:
                self._fail(connection, token, error)
            except asyncio.CancelledError as error:
                self._cancelled(error)

    def _hear(self, header: pb.Message, before: int) -> None:
        """Notice a store that does not go on from where it was, also over a connection that was there before.

        before: the newest revision that was known when the request was sent.
        """
        of = header.cluster_id, header.raft_term
        if self._heard is None:
            self._heard = of
        elif of != self._heard or header.revision < before:
            self._heard, self._revision = of, header.revision
            self.gate.shut()
        self._revision = max(self._revision, header.revision)

    def _fail(self, connection: Connection, token: str, error: Any) -> NoReturn:
        """Raise what an error of gRPC means, and remember it of the endpoint or the token."""
        failure = Failure(str(connection.address), error.code().name, error.details() or "")
        if failure.too_large:
            raise TooLarge(str(failure)) from error
        match failure.kind:
            case Kind.UNKNOWN:
                self._link.failed(connection, failure)
                raise NoAnswer(str(failure)) from error
            case Kind.FULL:
                raise Full(str(failure.error())) from error
            case Kind.BUSY:
                self._link.failed(connection, failure)
                raise NotApplied(str(failure.error())) from error
            case Kind.LOGIN:
                if self._token == token:
                    self.forget_token()
                raise BadToken(str(failure.error())) from error
            case Kind.COMPACTED:
                raise Gone(str(failure.error())) from error
            case Kind.REFUSED:
                raise failure.error() from error

    def _cancelled(self, error: asyncio.CancelledError) -> NoReturn:
        """gRPC cancels calls when the store is closed, which is not their callers' being cancelled."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise Closed from error
        raise error

    # --- who we are

    async def _current_token(self, connection: Connection) -> str:
        if self._token is not None:
            return self._token
        async with self._login_lock:
            if self._token is None:
                self._token = await self._log_in(connection)
            return self._token

    async def _log_in(self, connection: Connection) -> str:
        """A token; empty if etcd asks for none. Raises NotApplied, StoreUnavailable."""
        try:
            found = login(self._url)
        except InvalidInput as error:
            raise StoreUnavailable(str(error)) from error
        if found is None:
            return ""
        request = pb.AUTHENTICATE.request(name=found.user, password=found.password)
        try:
            return str((await self._send(connection, pb.AUTHENTICATE, request, ATTEMPT, "")).token)
        except AuthenticationOff:
            return ""
        except NoAnswer as error:
            raise NotApplied(str(error)) from error


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    # hasleader: a member cut off from the others says so at once, and ends its streams, instead of waiting.
    leader = ("hasleader", "true")
    return (leader, ("token", token)) if token else (leader,)
