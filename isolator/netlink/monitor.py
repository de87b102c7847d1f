"""Noticing, on the event loop, what changes in the node's network namespace.

LinkMonitor tells of endpoints' links that vanish: a namespace died, or somebody deleted or renamed them. ChangeMonitor
tells
that the node's own links, addresses or default routes changed, or that a route of the fabric was deleted.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce

from isolator.netlink import codec, messages
from isolator.netlink.codec import Message
from isolator.netlink.inventory import parse_link
from isolator.netlink.seal import claimed

_GROUP_LINK, _GROUP_IPV4_ADDRESS, _GROUP_IPV4_ROUTE, _GROUP_IPV6_ADDRESS, _GROUP_IPV6_ROUTE = 1, 5, 7, 9, 11
"""RTNLGRP_* of linux/rtnetlink.h."""
_RECEIVE_BUFFER = 1 << 20

_ENDPOINT_INDEX = 1 << 29
"""Link indexes from here on are those that the driver chose for endpoints."""


class _Monitor(ABC):
    """Made in the network namespace that the calling thread is in."""

    def __init__(self, *groups: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.bind((0, reduce(lambda mask, group: mask | 1 << (group - 1), groups, 0)))

    async def run(self) -> None:
        """Call back until cancelled, beginning with whatever happened since it was made. Raises what reading raises, or
        who is called back."""
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            try:
                self._read()
            except Exception as error:
                loop.remove_reader(self._socket)
                failed.set_exception(error)

        loop.add_reader(self._socket, read)
        try:
            await failed
        finally:
            loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        datagrams: list[bytes] = []
        lost = False
        while True:
            try:
                datagrams.append(self._socket.recv(65536))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
        self._take(datagrams, lost=lost)

    @abstractmethod
    def _take(self, datagrams: list[bytes], *, lost: bool) -> None:
        """What one wake-up brought. lost: there was more than the kernel could keep for us."""


class LinkMonitor(_Monitor):
    """Calls back with the names of ``mrg*`` links that were deleted, also those we delete ourselves, or renamed.

    on_vanished: the names seen in one wake-up, of renamed ones those that they had from us.
    on_resync: events were lost; list the links again.
    """

    def __init__(self, on_vanished: Callable[[frozenset[str]], None], on_resync: Callable[[], None]) -> None:
        super().__init__(_GROUP_LINK)
        self._on_vanished = on_vanished
        self._on_resync = on_resync

    def _take(self, datagrams: list[bytes], *, lost: bool) -> None:
        vanished = frozenset(name for datagram in datagrams for name in _vanished(datagram))
        if vanished:
            self._on_vanished(vanished)
        if lost:
            self._on_resync()


class ChangeMonitor(_Monitor):
    """Calls back, once a wake-up, when something changed that underlay or fabric rest on.

    ours: the port of the fabric's own socket, of whose changes it need not be told.
    """

    def __init__(self, on_change: Callable[[], None], ours: int = 0) -> None:
        super().__init__(
            _GROUP_LINK, _GROUP_IPV4_ADDRESS, _GROUP_IPV4_ROUTE, _GROUP_IPV6_ADDRESS, _GROUP_IPV6_ROUTE
        )
        self._on_change = on_change
        self._ours = ours

    def _take(self, datagrams: list[bytes], *, lost: bool) -> None:
        told = (message for datagram in datagrams for message in codec.messages(datagram))
        if lost or any(
            _matters(message) for message in told if not message.port or message.port != self._ours
        ):
            self._on_change()


def _matters(message: Message) -> bool:
    """Not what comes and goes with endpoints."""
    match message.kind:
        case messages.RTM_NEWLINK | messages.RTM_DELLINK:
            _, _, index, _, _ = messages.LINK.unpack_from(message.body)
            return bool(index < _ENDPOINT_INDEX)
        case messages.RTM_NEWADDR | messages.RTM_DELADDR:
            _, _, _, _, index = messages.ADDRESS.unpack_from(message.body)
            return bool(index < _ENDPOINT_INDEX)
        case messages.RTM_NEWROUTE | messages.RTM_DELROUTE:
            _, dst_len, _, _, table, protocol, _, _, _ = messages.ROUTE.unpack_from(message.body)
            if table != messages.TABLE_MAIN:
                return False
            if protocol != messages.ROUTE_PROTOCOL:
                return bool(dst_len == 0)
            metric = codec.attributes(message.body, messages.ROUTE.size).get(messages.RTA_PRIORITY)
            return message.kind == messages.RTM_DELROUTE and codec.as_u32(metric) == messages.FABRIC_METRIC
        case _:
            return False


def _vanished(datagram: bytes) -> set[str]:
    """Names of our links in RTM_DELLINK, and of those that RTM_NEWLINK has another name for.

    A bridge reports a port it loses likewise, with a family.
    """
    found = set()
    for message in codec.messages(datagram):
        if (
            message.kind in (messages.RTM_DELLINK, messages.RTM_NEWLINK)
            and message.body[0] == socket.AF_UNSPEC
        ):
            link = parse_link(message)
            # Whoever looks because of it asks for the seal.
            own_name = claimed(link.alias) or link.own_name
            if own_name and (message.kind == messages.RTM_DELLINK or link.name != own_name):
                found.add(own_name)
    return found
