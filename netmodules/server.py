"""The agent's unix socket: one request, one reply per connection.

    accept -> who is it (SO_PEERCRED) -> frame in -> handler -> frame out -> wait for the caller's hang-up

A request runs as a task of its own, because it outlives its connection:

    caller hangs up       the call goes on; an ADD that nobody comes back for within ``return_window`` seconds
                          is handed to ``on_abandoned``
    same id comes back    it joins the call, running or just finished, and gets the same reply

A reply counts as delivered when the caller closes after reading all of it: closing a unix socket with unread
bytes shows as a reset at this end, which is how a hook that was killed is told from one that is done.
A request id that is not here any more is the isolator's to recognise: its journal remembers it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import structlog

from ipam.errors import TryAgain
from ipam.supervision import Supervision
from isolator.errors import AgentBusy
from netmodules import frame
from netmodules.accepting import Acceptor
from netmodules.request import Handler, Reply, Request, parse_request, refusal

__all__ = ["Handler", "Reply", "Request", "Server"]

log = structlog.get_logger(__name__)

# Connections that wait to be accepted: a burst of containers, each with several networks.
BACKLOG = 1024

CALLERS = 512
"""Connections that are served at a time, at most."""

ORDINARY, LARGE_AT_ONCE = 1 << 16, 8
"""Bytes of a request that is read whenever it comes, and how many larger ones are read at a time: a runtime's GC may
name thousands of attachments."""

SOCKET_EVERY = 2.0
"""Seconds between looks whether the socket is still at its path."""

ACCEPT_AGAIN = 2.0
"""Seconds at most before somebody is accepted again, where that failed."""


class _Call:
    """A request being carried out, and who waits for it."""

    __slots__ = ("callers", "delivered", "request", "task", "watch")

    def __init__(self, request: Request, task: asyncio.Task[Reply]) -> None:
        self.request = request
        self.task = task
        self.callers = 0
        self.delivered = False
        self.watch: asyncio.Task[None] | None = None


class Server:
    """See the module's docstring.

    handlers: by the request's ``call``.
    on_abandoned: undoes an ADD that succeeded and whose caller is gone.
    supervision: of the task that accepts. callers: served at a time; the others wait to be accepted.
    return_window: seconds in which a caller that was cut off may return.
    read_timeout: seconds a caller has to send its whole request, and to take its reply.
    """

    def __init__(
        self,
        socket_path: Path,
        handlers: Mapping[str, Handler],
        on_abandoned: Callable[[Request], Awaitable[None]],
        supervision: Supervision,
        *,
        callers: int = CALLERS,
        return_window: float = 30.0,
        read_timeout: float = 10.0,
    ) -> None:
        self._path = socket_path
        self._handlers = handlers
        self._on_abandoned = on_abandoned
        self._supervision = supervision
        self._most_callers = callers
        self._return_window = return_window
        self._read_timeout = read_timeout
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._allowed_uids = {0, os.geteuid()}
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._inode = 0
        self._calls: dict[str, _Call] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Listen. Raises AgentBusy when a live agent answers on the path; replaces a dead one's socket."""
        _prepare_directory(self._path.parent)
        _refuse_live_agent(self._path)
        self._listen()
        self._accepting = self._supervision.start("listener", self._accept, longest=ACCEPT_AGAIN)

    def _listen(self) -> None:
        listening = _bind(self._path)
        if self._listening is not None:
            self._listening.close()
        self._listening, self._inode = listening, self._path.stat().st_ino
        log.info("listening", socket=str(self._path))

    async def _accept(self) -> None:
        """Until cancelled, on a socket that callers find. Raises what keeps it from that."""
        if not self._path.exists():
            _prepare_directory(self._path.parent)
            self._listen()
        assert self._listening is not None
        acceptor = Acceptor(self._listening, self._serve, self._most_callers)
        accepting = asyncio.create_task(acceptor.run(), name="accepting")
        try:
            while True:
                await asyncio.wait({accepting}, timeout=SOCKET_EVERY)
                if accepting.done():
                    return accepting.result()
                if not self._path.exists():
                    raise TryAgain(f"somebody removed the socket {self._path}; it is made anew")
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)

    async def stop(self, timeout: float = 30.0) -> None:
        """Stop accepting, remove the socket, let calls in flight finish for ``timeout`` seconds."""
        if self._listening is None or self._accepting is None:
            return
        self._stopping = True
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listening.close()
        self._listening = None
        _unlink_if_ours(self._path, self._inode)
        for call in list(self._calls.values()):
            if call.watch is not None and call.task.done():
                self._leave(call)
        for reading in self._reading:
            reading.cancel()
        in_flight = {*self._answering, *self._watches, *(call.task for call in self._calls.values())}
        if in_flight:
            _, late = await asyncio.wait(in_flight, timeout=timeout)
            for task in late:
                task.cancel()
        await asyncio.gather(*in_flight, *self._reading, return_exceptions=True)

    def _leave(self, call: _Call) -> None:
        """Keep an ADD whose caller may still return, to the next agent: its journal knows the request id."""
        log.warning("stopped before the caller of an ADD came back; it is kept", **call.request.names())
        if call.watch is not None:
            call.watch.cancel()
        self._calls.pop(call.request.request_id, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from accept to close."""
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            request = await self._receive(reader, writer)
            self._reading.discard(task)
            if request is not None:
                self._answering.add(task)
                await self._answer(request, reader, writer)
        except asyncio.CancelledError:
            # Only stop() cancels; the caller sees the connection end and tries the next agent.
            log.info("connection cut: the agent stops")
        finally:
            self._reading.discard(task)
            self._answering.discard(task)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
        """The caller's request, or None when there is nothing to answer."""
        uid = _peer_uid(writer)
        if uid not in self._allowed_uids:
            log.warning("connection refused: only root and the agent's own user may call", uid=uid)
            return None
        header = b""
        try:
            async with asyncio.timeout(self._read_timeout):
                header = await reader.readexactly(frame.HEADER)
                payload = await self._payload(reader, frame.payload_length(header))
            return parse_request(frame.decode(payload))
        except asyncio.IncompleteReadError as error:
            if header or error.partial:
                log.warning("request cut short by its caller")
        except (TimeoutError, ConnectionError):
            log.warning("request not complete in time", seconds=self._read_timeout)
        except ValueError as error:
            log.warning("request is not a moorage frame", error=str(error))
        return None

    async def _payload(self, reader: asyncio.StreamReader, length: int) -> bytes:
        if length <= ORDINARY:
            return await reader.readexactly(length)
        async with self._large:
            return await reader.readexactly(length)

    async def _answer(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry out the request, or join it, and send the reply."""
        call = self._join(request)
        if call is None:
            log.error("one request id on two different requests", **request.names())
            await self._send(refusal(100, f"request id {request.request_id} is in use"), reader, writer)
            return
        call.callers += 1
        hangup = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({call.task, hangup}, return_when=asyncio.FIRST_COMPLETED)
            if hangup.done():
                hangup.exception()
                log.info("caller hung up; the call goes on", **request.names())
            elif not call.task.cancelled():
                call.delivered |= await self._send_and_wait(call.task.result(), hangup, writer)
        finally:
            hangup.cancel()
            call.callers -= 1
            self._settle(call)

    async def _send(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._send_and_wait(reply, asyncio.ensure_future(reader.read(1)), writer)

    async def _send_and_wait(
        self, reply: Reply, hangup: asyncio.Future[bytes], writer: asyncio.StreamWriter
    ) -> bool:
        """Send; True if the caller has taken all of it."""
        writer.write(frame.encode({"exit": b"%d" % reply.exit, "stdout": reply.stdout}))
        try:
            async with asyncio.timeout(self._read_timeout):
                await writer.drain()
                await hangup
        except (TimeoutError, ConnectionError):
            return False
        return True

    def _join(self, request: Request) -> _Call | None:
        """The call with this id, started if it is new; None if the id belongs to another request."""
        call = self._calls.get(request.request_id)
        if call is None:
            call = _Call(request, asyncio.ensure_future(self._carry_out(request)))
            self._calls[request.request_id] = call
            started = call
            call.task.add_done_callback(lambda _: self._settle(started))
        elif call.request != request:
            return None
        if call.watch is not None:
            call.watch.cancel()
            call.watch = None
        return call

    async def _carry_out(self, request: Request) -> Reply:
        handler = self._handlers.get(request.call)
        if handler is None:
            return refusal(100, f"this agent does not know calls of the kind {request.call!r}")
        try:
            return await handler(request)
        except Exception:
            log.exception("handler failed", **request.names())
            return refusal(100, "the moorage agent failed to carry this out; see the agent's log")

    def _settle(self, call: _Call) -> None:
        """Decide what becomes of a call that nobody waits for."""
        if call.callers:
            return
        lost = call.request.undoable and not call.delivered and not call.task.cancelled()
        if lost and self._stopping and call.task.done():
            self._leave(call)
        elif lost and call.watch is None:
            call.watch = asyncio.ensure_future(self._undo_unless_returned(call))
            self._watches.add(call.watch)
            call.watch.add_done_callback(self._watches.discard)
        elif not lost and call.task.done():
            self._calls.pop(call.request.request_id, None)

    async def _undo_unless_returned(self, call: _Call) -> None:
        """Wait for the caller; ``_join`` cancels this when it returns."""
        await asyncio.sleep(self._return_window)
        await asyncio.wait({call.task})
        del self._calls[call.request.request_id]
        if call.task.cancelled() or call.task.result().exit != 0:
            return
        log.warning("ADD undone: its caller hung up and did not return", **call.request.names())
        try:
            await self._on_abandoned(call.request)
        except Exception:
            log.exception("an abandoned ADD could not be undone", **call.request.names())


def _prepare_directory(directory: Path) -> None:
    """Make it 0700. One that exists is left as it is: it may be a directory that others use, like /run."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = directory.stat().st_mode & 0o777
    if mode & 0o077:
        log.warning(
            "the socket's directory is open to others; 0700 is safer", path=str(directory), mode=oct(mode)
        )


def _refuse_live_agent(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            pass
        except OSError:
            return
    raise AgentBusy(f"another moorage agent answers at {path}; stop it, or give this one another socket")


def _bind(path: Path) -> socket.socket:
    """A listening socket that appears under its name only when it listens, with mode 0600."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(temporary))
        temporary.chmod(0o600)
        listening.listen(BACKLOG)
        temporary.replace(path)
    except OSError:
        listening.close()
        raise
    return listening


def _unlink_if_ours(path: Path, inode: int) -> None:
    try:
        if path.stat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        log.warning("the socket was already gone", socket=str(path))


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
