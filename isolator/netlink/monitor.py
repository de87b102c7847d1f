"""Noticing, on the event loop, that endpoints' links vanish: a namespace died, or somebody deleted them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from isolator.netlink import codec, messages

_GROUP_LINK = 1
_RECEIVE_BUFFER = 1 << 20


class LinkMonitor:
    """Calls back with the names of ``mrg*`` links that were deleted; also those we delete ourselves.

    on_vanished: the names seen in one wake-up.
    on_resync: events were lost; list the links again.

    Made in the network namespace that the calling thread is in.
    """

    def __init__(self, on_vanished: Callable[[frozenset[str]], None], on_resync: Callable[[], None]) -> None:
        self._on_vanished = on_vanished
        self._on_resync = on_resync
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.bind((0, _GROUP_LINK))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to call back, on that loop. Whatever vanished since the monitor was made is told then."""
        self._loop = loop
        loop.add_reader(self._socket, self._read)

    def stop(self) -> None:
        """Stop for good; twice is fine."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop = None
        self._socket.close()

    def _read(self) -> None:
        vanished: set[str] = set()
        lost = False
        while True:
            try:
                datagram = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            vanished.update(_vanished(datagram))
        if vanished:
            self._on_vanished(frozenset(vanished))
        if lost:
            self._on_resync()


def _vanished(datagram: bytes) -> set[str]:
    """Names of our links in RTM_DELLINK; a bridge reports a port it loses likewise, with a family."""
    names = (
        codec.as_text(codec.attributes(message.body, messages.LINK.size).get(messages.IFLA_IFNAME))
        for message in codec.messages(datagram)
        if message.kind == messages.RTM_DELLINK and message.body[0] == socket.AF_UNSPEC
    )
    return {name for name in names if name.startswith(messages.ENDPOINT_PREFIX)}
