"""The process behind a DelayingProxy: ``python -m moorage.lab.delaying LISTEN TARGET``, both ``ip:port``.

What it forwards arrives later, in order, at full throughput. It reads how long a round trip shall take, in
seconds, a line each time, from its stdin, acknowledges it on its stdout, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import Any

CHUNK = 1 << 16
"""Bytes read at once."""

IN_FLIGHT = 256
"""Chunks that may be on their way in one direction of a connection; then its sender has to wait."""


class _Wire:
    """What all connections share: how long one way takes, in seconds."""

    def __init__(self) -> None:
        self.one_way = 0.0

    async def connect(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection, both ways, until both sides have ended it or one has broken it."""
        host, _, port = target.rpartition(":")
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(far_writer):
                await _until_one_fails(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        await _until_one_fails(self._receive(source, under_way), self._deliver(under_way, sink))

    async def _receive(
        self, source: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        now = asyncio.get_running_loop().time
        chunk = b"?"
        while chunk:
            chunk = await source.read(CHUNK)
            await under_way.put((now() + self.one_way, chunk))

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(due - now())
            if not chunk:
                sink.write_eof()
                return
            sink.write(chunk)
            await sink.drain()


async def _until_one_fails(*both: Coroutine[Any, Any, None]) -> None:
    """Until both are done; the first OSError ends the other, too, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in both:
                group.create_task(one)
    except* OSError as errors:
        raise ConnectionError(str(errors.exceptions[0])) from errors


async def _serve(listen: str, target: str) -> None:
    wire = _Wire()
    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(
        lambda reader, writer: wire.connect(target, reader, writer), host, int(port)
    )
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    while order := await orders.readline():
        wire.one_way = float(order) / 2
        sys.stdout.write("done\n")
        sys.stdout.flush()
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
