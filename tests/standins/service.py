"""An HTTP server that a test holds in its hand: it goes away and comes back, refuses, hesitates, breaks off.

    with Marathon().instance() as marathon:
        requests.get(marathon.url + "/v2/info")
        marathon.stop()             nobody listens, every connection is broken
        marathon.start()            the same port again

It runs in threads of this process. With ``place`` it listens inside a network namespace: the socket is made there
and stays there for good, whichever thread reads from it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import parse_qs, urlsplit

import msgspec

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. path: unquoted by nobody, without the query. body: what was sent, b"" if nothing."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    client: str

    @property
    def json(self) -> Any:
        """The body as JSON. Raises MsgspecError."""
        return msgspec.json.decode(self.body)

    def accepts(self, kind: str) -> bool:
        return kind in self.headers.get("accept", "*/*").lower()


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. stream: chunks that follow each other until it ends or the caller hangs up; no body then."""

    status: int = 200
    body: bytes = b""
    kind: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Iterator[bytes] | None = None


def reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """An answer with a value as JSON."""
    return Reply(status, msgspec.json.encode(value), headers=headers)


@dataclass(slots=True)
class Faults:
    """How a service misbehaves now. Everything is off at first.

    status: answers every request with it, 0 for none; only the next ``refusals`` if that is not 0. delay: seconds
    before each answer. truncate: bodies break off in the middle, behind a promise of their whole length. hang: requests
    are read and never answered.
    """

    status: int = 0
    refusals: int = 0
    delay: float = 0.0
    truncate: bool = False
    hang: bool = False

    def none(self) -> None:
        """Behave again."""
        self.status, self.refusals, self.delay, self.truncate, self.hang = 0, 0, 0.0, False, False

    def refusal(self) -> int:
        """The status that the request at hand is refused with, 0 if it is not."""
        status = self.status
        if self.refusals:
            self.refusals -= 1
            if not self.refusals:
                self.status = 0
        return status


class Service(ABC):
    """See the module's docstring. Subclasses say what is answered, in ``answer``.

    place: path of a network namespace. host: address to listen at. user: "name:password" for HTTP basic; token: for an
    Authorization header, as ``token=...`` or ``Bearer ...``; without both everybody may ask. tls: makes it https.
    """

    def __init__(
        self,
        *,
        place: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        user: str = "",
        token: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.faults = Faults()
        self.host = host
        self.port = port
        self.asked: list[str] = []
        self._place = place
        self._accepted = _credentials(user, token)
        self._tls = tls
        self._server: _Server | None = None

    @abstractmethod
    def answer(self, asked: Asked) -> Reply:
        """What is said to a request that may ask. Called in the connection's own thread."""

    # -- being there

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; at the same port again after ``stop``."""
        assert self._server is None, "it runs already"
        server = _within(self._place, lambda: _Server((self.host, self.port), self))
        if self._tls is not None:
            server.socket = self._tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = server.server_address[1]
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As if it was killed: connections break, new ones are refused; no error if it does not run."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.break_connections()

    @property
    def is_running(self) -> bool:
        return self._server is not None

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    def break_connections(self) -> None:
        """Every connection there is ends here; new ones are welcome."""
        if self._server is not None:
            self._server.break_connections()

    # -- being asked

    def respond(self, asked: Asked) -> Reply:
        """``answer`` behind faults and authentication."""
        self.asked.append(f"{asked.method} {asked.path}")
        if self.faults.delay:
            time.sleep(self.faults.delay)
        if refused := self.faults.refusal():
            return reply({"message": "this stand-in was told to refuse"}, refused)
        if self._accepted and asked.headers.get("authorization") not in self._accepted:
            refusal = {"www-authenticate": 'Basic realm="Mesosphere"'}
            return Reply(401, b'{"message":"Invalid username or password."}', headers=refusal)
        try:
            return self.answer(asked)
        except msgspec.MsgspecError as error:
            return reply({"message": f"Invalid JSON: {error}"}, 400)


class Electing(Protocol):
    """What several processes of the same service share."""

    elected: Any

    def elect(self) -> None:
        """If nobody leads who runs, the first that does is elected."""


class Replica(Service):
    """One of several processes of the same service, of which one leads."""

    def __init__(self, whole: Electing, **place: Any) -> None:
        super().__init__(**place)
        self._whole = whole

    def start(self) -> None:
        super().start()
        self._whole.elect()

    def stop(self) -> None:
        led = self._whole.elected is self
        super().stop()
        if led:
            self._whole.elect()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service) -> None:
        self.service = service
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        # The base class asks the resolver for our name, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        host, port = self.socket.getsockname()[:2]
        self.server_address = (host, port)
        self.server_name, self.server_port = host, port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is nothing to tell; anything else is a bug of ours."""
        import sys

        if not isinstance(sys.exc_info()[1], (OSError, ssl.SSLError)):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 300
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def _serve(self) -> None:
        service = self.server.service
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, url.path, parse_qs(url.query), headers, body, str(self.client_address[0]))
        if service.faults.hang:
            self.connection.recv(1)  # until the caller gives up, or connections are broken
            self.close_connection = True
            return
        self._send(service.respond(asked), truncate=service.faults.truncate)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def _send(self, answer: Reply, *, truncate: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-type", answer.kind)
        if answer.stream is not None:
            self._send_stream(answer.stream)
            return
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        if truncate and answer.body:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(answer.body)

    def _send_stream(self, stream: Iterator[bytes]) -> None:
        """Chunked, until it ends; a caller that is gone ends it too."""
        self.send_header("transfer-encoding", "chunked")
        self.send_header("cache-control", "no-cache")
        self.end_headers()
        self.close_connection = True
        try:
            for chunk in stream:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.write(b"0\r\n\r\n")
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()


def _credentials(user: str, token: str) -> set[str]:
    """The Authorization headers that are let in; empty lets in everybody."""
    accepted = set()
    if user:
        accepted.add("Basic " + base64.b64encode(user.encode()).decode())
    if token:
        accepted |= {f"token={token}", f"Bearer {token}"}
    return accepted


def _within(place: Path | None, make: Callable[[], _Server]) -> _Server:
    """What ``make`` returns when it is called inside a network namespace; here without one."""
    if place is None:
        return make()
    made: list[_Server] = []
    failed: list[Exception] = []

    def inside() -> None:
        # This thread ends inside, and is the only one that was there.
        try:
            with place.open("rb") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))
            made.append(make())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
