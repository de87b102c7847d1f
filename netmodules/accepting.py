"""Accepting connections, no more at a time than there are descriptors for.

Who is not accepted yet waits in the kernel's queue, and when that is full in connect(2). asyncio's own server accepts
until descriptors have run out, for those who carry out what was asked as well, and then logs a traceback for every
connection that waits.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import structlog

from ipam.errors import TryAgain

log = structlog.get_logger(__name__)

Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Nothing is wrong with the socket when accept(2) says one of these."""


READ_AHEAD = 1 << 14
"""Bytes that are taken of what nobody has asked for yet, about."""


class Acceptor:
    """Serves what comes to a listening socket. most: connections at a time."""

    def __init__(self, listening: socket.socket, serve: Serve, most: int) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._serve = serve
        self._most = most
        self._room = asyncio.Semaphore(most)
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled; those that were accepted go on then. Raises TryAgain while something is short, and
        OSError if the socket is of no use."""
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection = await self._next()
            except BaseException as error:
                self._room.release()
                if isinstance(error, OSError) and error.errno in _SHORT:
                    raise TryAgain(
                        f"no caller can be accepted ({os.strerror(error.errno)}), beside {len(self._connections)} that "
                        "are served; callers wait; if it stays, raise LimitNOFILE or the memory of the agent's unit"
                    ) from error
                raise
            task = loop.create_task(self._serve_one(connection))
            self._connections.add(task)
            task.add_done_callback(self._ended)

    async def _next(self) -> socket.socket:
        """A connection; being cancelled loses none, as it would one that the event loop's ``sock_accept`` just took."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self._listening.accept()[0]
            except BlockingIOError:
                pass
            comes = asyncio.Event()
            loop.add_reader(self._listening, comes.set)
            try:
                await comes.wait()
            finally:
                loop.remove_reader(self._listening)

    async def _serve_one(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(READ_AHEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection)
        try:
            await self._serve(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        finally:
            # Not close(): what a caller never takes would keep the descriptor for ever.
            transport.abort()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()):
            log.error("connection failed on a bug", exc_info=error)
