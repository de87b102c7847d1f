"""Connections to the members: one at a time in use, another one found when it fails.

Each endpoint has a gRPC channel of its own, so that we and not gRPC decide where a request goes and know
whether it left. ``Link.ready`` gives a connection that stands: to the endpoint used last, else to whichever
of the others answers first. A connection stands once the member's HTTP/2 settings have arrived, which a
paused process does not send although its kernel accepts the connection.

An endpoint that failed is *suspect* for a while, used only if no other can be. If it did not answer at all
its connection is replaced; the old one is closed when the last call on it is over. A new connection looks
the name up again and reads the certificates again. So it is replaced, too, where it cannot be made and the
certificates on the disk are others by now: gRPC would go on with the old ones for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from ipam.errors import InvalidInput, StoreUnavailable
from ipam.store import etcd_proto as pb
from ipam.store.certificates import failing_files
from ipam.store.etcd_channel import Channel, aio, channel, grpc
from ipam.store.etcd_errors import Failure
from ipam.store.etcd_url import Address, Certificates, EtcdUrl, certificates

CONNECT = 3.0
"""Seconds ``ready`` may take to find a member that answers. It takes no time if all refuse."""

SUSPECT = 5.0
"""Seconds an endpoint that failed is avoided: longer than an election (1 s by default)."""

LOOK = (0.002, 0.05)
"""Seconds between two looks whether a connection stands: at first, and at most."""

SETTLE = 0.02
"""Seconds that gRPC has for reporting the end of the calls that closing ended. It does so later, from a
thread; if the event loop is gone by then, what it has to report to other loops is held up."""

PROBE = 1.0
"""Seconds to find out why no connection could be made."""

_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class Connection:
    """A channel to one endpoint and its methods; closed when it is retired and nobody uses it."""

    def __init__(self, address: Address, made: Channel) -> None:
        self.address = address
        self.channel = made
        self._users = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._methods: dict[str, Callable[..., Any]] = {
            method.path: (made.stream_stream if method.streams else made.unary_unary)(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.reply.FromString,
            )
            for method in pb.METHODS
        }

    def call(self, method: pb.Method) -> Callable[..., Any]:
        return self._methods[method.path]

    @property
    def stands(self) -> bool:
        state = self.channel.get_state(try_to_connect=True)
        return bool(state is grpc.ChannelConnectivity.READY)

    async def connect(self) -> bool:
        """Wait until it stands (True) or an attempt failed (False)."""
        # Looked at now and then: gRPC's own wait for a change may not return when the channel is closed, and
        # one that was given up on still reports, to an event loop that may be gone.
        pause = LOOK[0]
        with self.used():
            while (state := self.channel.get_state(try_to_connect=True)) not in _FAILED:
                if state is grpc.ChannelConnectivity.READY:
                    return True
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, LOOK[1])
        return False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keeps it from being closed."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_idle()

    def retire(self) -> None:
        self._retired = True
        self._close_if_idle()

    @property
    def closing(self) -> bool:
        return self._closing is not None

    async def close(self) -> None:
        """Now, whatever is on it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self.channel.close(), name="moorage-etcd-close")
        await self._closing

    def _close_if_idle(self) -> None:
        if self._retired and not self._users and self._closing is None:
            self._closing = asyncio.create_task(self.channel.close(), name="moorage-etcd-close")


class Endpoint:
    """One address of the URL, and the connection to it if there is one."""

    def __init__(self, address: Address, url: EtcdUrl) -> None:
        self.address = address
        self._url = url
        self._connection: Connection | None = None
        self._made_with: Certificates | None = None
        self._retired: list[Connection] = []
        self._suspect_until = 0.0

    @property
    def suspect(self) -> bool:
        return time.monotonic() < self._suspect_until

    def connection(self) -> Connection:
        """Raises StoreUnavailable when the certificates cannot be read now."""
        if self._connection is None:
            try:
                self._made_with = certificates(self._url)
            except InvalidInput as error:
                raise StoreUnavailable(str(error)) from error
            self._connection = Connection(self.address, channel(self.address, self._made_with))
        return self._connection

    def reread(self) -> bool:
        """Its connection could not be made: whether another one may be, with what is on the disk now."""
        try:
            if certificates(self._url) == self._made_with:
                return False
        except InvalidInput:
            return False  # they are being replaced at this moment
        self.renew()
        return True

    def failed(self, connection: Connection, failure: Failure) -> None:
        """A call on ``connection`` failed in a way that another endpoint may not."""
        if connection is not self._connection:
            return
        self._suspect_until = time.monotonic() + SUSPECT
        if failure.deadline:
            self.renew()

    def renew(self) -> None:
        """What is called from now on goes over a new connection; the old one ends with what is on it."""
        if self._connection is not None:
            self._connection.retire()
            self._retired = [*(one for one in self._retired if not one.closing), self._connection]
            self._connection = None

    async def close(self) -> None:
        if self._connection is not None:
            self._retired.append(self._connection)
        for connection in self._retired:
            await connection.close()


class Link:
    """All endpoints, the one in use first."""

    def __init__(self, url: EtcdUrl, on_new: Callable[[], None]) -> None:
        """on_new: told when what is called next may go over a connection that nothing went over before."""
        self._on_new = on_new
        self._url = url
        # Shuffled, so that a thousand agents do not all lean on the first member of the list.
        self._endpoints = [Endpoint(address, url) for address in url.addresses]
        random.shuffle(self._endpoints)
        self._finding: asyncio.Task[Connection] | None = None

    async def ready(self) -> Connection:
        """A connection that stands. Nothing was sent when it raises StoreUnavailable."""
        first = self._endpoints[0]
        if not first.suspect and (connection := first.connection()).stands:
            return connection
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(self._find(), name="moorage-etcd-connect")
            self._finding.add_done_callback(_look_at)  # also if all who waited for it were cancelled
        return await asyncio.shield(self._finding)

    def failed(self, connection: Connection, failure: Failure) -> None:
        # gRPC connects anew by itself, to the same address.
        self._on_new()
        for endpoint in self._endpoints:
            if endpoint.address == connection.address:
                endpoint.failed(connection, failure)

    def renew(self) -> None:
        """See Store.reconnect."""
        self._on_new()
        for endpoint in self._endpoints:
            endpoint.renew()

    async def close(self) -> None:
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.wait([self._finding])
        for endpoint in self._endpoints:
            await endpoint.close()
        await asyncio.sleep(SETTLE)

    async def _find(self) -> Connection:
        trusted = [endpoint for endpoint in self._endpoints if not endpoint.suspect]
        suspects = [endpoint for endpoint in self._endpoints if endpoint.suspect]
        deadline = time.monotonic() + CONNECT
        for group in (trusted, suspects):
            endpoint = await _first_that_stands(group, deadline - time.monotonic())
            if endpoint is None and [one for one in group if one.reread()]:
                self._on_new()
                endpoint = await _first_that_stands(group, deadline - time.monotonic())
            if endpoint is not None:
                if endpoint is not self._endpoints[0]:
                    self._on_new()
                self._endpoints.remove(endpoint)
                self._endpoints.insert(0, endpoint)
                return endpoint.connection()
        raise StoreUnavailable(await self._why())

    async def _why(self) -> str:
        """gRPC says why it cannot connect only to a call that fails of it: a read, which harms nobody."""
        failures = await asyncio.gather(*(_probe(endpoint.connection()) for endpoint in self._endpoints))
        names = ", ".join(sorted(str(endpoint.address) for endpoint in self._endpoints))
        reasons = "; ".join(sorted({reason for reason in failures if reason}))
        cure = "; ".join(failing_files(self._url)) or (
            "check that it runs, the addresses and certificates in the store URL, and the network in between"
        )
        return f"etcd cannot be reached at {names} ({reasons or 'no answer'}); {cure}"


def _look_at(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled():
        task.exception()


async def _first_that_stands(endpoints: list[Endpoint], within: float) -> Endpoint | None:
    """The first of them that a connection stands to; None if all fail or the time is up."""
    connections = [endpoint.connection() for endpoint in endpoints]
    attempts = {
        asyncio.create_task(connection.connect(), name="moorage-etcd-connect"): endpoint
        for connection, endpoint in zip(connections, endpoints, strict=True)
    }
    pending = set(attempts)
    try:
        async with asyncio.timeout(max(within, 0)):
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.result():
                        return attempts[task]
    except TimeoutError:
        return None
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return None


async def _probe(connection: Connection) -> str:
    """Why the endpoint cannot be used, as gRPC puts it; empty if it keeps silent."""
    request = pb.RANGE.request(key=b"\0", keys_only=True)
    # It is only to fail: on a connection that stands meanwhile its answer, any answer, will do.
    with connection.used():
        try:
            await connection.call(pb.RANGE)(request, timeout=PROBE, wait_for_ready=False)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                return str(error.details())
    return ""
