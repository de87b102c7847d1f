"""A netlink socket that speaks in batches.

One ``send`` carries all requests of a phase, the kernel works through them within that call, and one pass
collects all acknowledgements. A batch is **not** a transaction: after a request fails the next one is
still carried out, so each must be harmless if its predecessor failed.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Self

from isolator.errors import KernelRefused
from isolator.netlink import codec
from isolator.netlink.codec import Message, Request

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

_SOL_NETLINK = 270
_CAP_ACK = 10  # an error does not echo the request
_EXT_ACK = 11  # an error comes with the kernel's own words
_STRICT_CHECK = 12  # a dump honours the filter in its request

_BATCH = 64  # acknowledgements that surely fit a default receive buffer
_DUMP_ATTEMPTS = 20
_NLMSGERR_ATTR_MSG = 1


class NetlinkSocket:
    """A socket in the network namespace that the calling thread is in when it is made."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        except OSError as error:
            raise KernelRefused(
                f"the kernel gave no netlink socket ({error.strerror}); is its module loaded?",
                errno=error.errno or 0,
            ) from error
        for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))  # else it has no port before its first request
        self._seq = 0

    def close(self) -> None:
        """Close it; twice is fine."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """What the kernel calls this socket when it tells others of what was done through it."""
        port: int = self._socket.getsockname()[0]
        return port

    def execute(self, requests: Sequence[Request]) -> None:
        """Carry out all requests, in order, whatever becomes of each.

        Raises KernelRefused for the first one whose answer is neither success nor declared fine.
        """
        if refused := self.attempt(requests):
            raise refused[0]

    def attempt(self, requests: Sequence[Request]) -> list[KernelRefused]:
        """Carry out all requests; what the kernel said to those that it refused. Raises KernelRefused if it
        does not answer."""
        refused = []
        for start in range(0, len(requests), _BATCH):
            refused += self._attempt(requests[start : start + _BATCH])
        return refused

    def _attempt(self, batch: Sequence[Request]) -> list[KernelRefused]:
        first = self._seq + 1
        self._seq += len(batch)
        flags = codec.NLM_F_REQUEST | codec.NLM_F_ACK
        self._send(b"".join([request.encode(flags, first + i) for i, request in enumerate(batch)]), batch[0])
        refused = []
        waiting = len(batch)
        while waiting:
            for message in codec.messages(self._receive(16384, batch[0])):
                place = message.seq - first
                if message.kind != codec.NLMSG_ERROR or not 0 <= place < len(batch):
                    continue
                waiting -= 1
                number = -codec.S32.unpack_from(message.body)[0]
                if number and number not in batch[place].fine:
                    refused.append(_refusal(batch[place], number, message))
        return refused

    def dump(self, request: Request) -> list[Message]:
        """Everything the request selects, read again from the start when a change interrupted it.

        Raises KernelRefused; an errno that the request declares fine gives [].
        """
        for _ in range(_DUMP_ATTEMPTS):
            found = self._dump(request)
            if found is not None:
                return found
        raise KernelRefused(
            f"could not {request.doing}: it changed all the time while being read; try again",
            errno=errno.EINTR,
        )

    def _dump(self, request: Request) -> list[Message] | None:
        found = [message for datagram in self.stream(request) for message in codec.messages(datagram)]
        if any(message.flags & codec.NLM_F_DUMP_INTR for message in found):
            return None
        return [message for message in found if message.kind != codec.NLMSG_DONE]

    def stream(self, request: Request) -> Iterator[bytes]:
        """The datagrams of a dump as they come, for who cannot afford to parse them all; read it to its end.

        Raises KernelRefused; an errno that the request declares fine ends it.
        """
        self._seq += 1
        self._send(request.encode(codec.NLM_F_REQUEST | codec.NLM_F_DUMP, self._seq), request)
        while True:
            datagram = self._receive(65536, request)
            last = codec.last_message(datagram)
            if last.seq != self._seq:
                continue
            if last.kind not in (codec.NLMSG_ERROR, codec.NLMSG_DONE):
                yield datagram
                continue
            number = -codec.S32.unpack_from(last.body)[0] if len(last.body) >= 4 else 0
            if number and number not in request.fine:
                raise _refusal(request, number, last)
            if last.kind == codec.NLMSG_DONE:
                yield datagram
            return

    def get(self, request: Request) -> Message | None:
        """The one object the request names; None if the kernel's answer is an errno declared fine."""
        self._seq += 1
        self._send(request.encode(codec.NLM_F_REQUEST, self._seq), request)
        while True:
            for message in codec.messages(self._receive(65536, request)):
                if message.seq != self._seq:
                    continue
                if message.kind != codec.NLMSG_ERROR:
                    return message
                number = -codec.S32.unpack_from(message.body)[0]
                if number in request.fine:
                    return None
                raise _refusal(request, number, message)

    def _send(self, data: bytes, request: Request) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise KernelRefused(
                f"could not {request.doing}: {error.strerror}", errno=error.errno or 0
            ) from error

    def _receive(self, size: int, request: Request) -> bytes:
        try:
            return self._socket.recv(size)
        except OSError as error:
            raise KernelRefused(
                f"could not {request.doing}: the kernel's answer was lost ({error.strerror}); try again",
                errno=error.errno or 0,
            ) from error


def _refusal(request: Request, number: int, message: Message) -> KernelRefused:
    return KernelRefused(f"could not {request.doing}: {os.strerror(number)}{_reason(message)}", errno=number)


def _reason(message: Message) -> str:
    """The kernel's own words, if it had any: they follow the error and the (capped) request header."""
    if not message.flags & codec.NLM_F_ACK_TLVS:
        return ""
    offset = 4 if message.kind == codec.NLMSG_DONE else 4 + codec.HEADER.size
    words = codec.as_text(codec.attributes(message.body, offset).get(_NLMSGERR_ATTR_MSG))
    return f" ({words})" if words else ""
