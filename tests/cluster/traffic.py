"""What a prober does without being asked again: datagrams at a rate, and numbers over TCP.

A socket for each datagram would be half of the work, so they are written to a raw socket with a UDP header in front,
where a new source port costs nothing.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

FIRST_PORT, LAST_PORT = 1024, 65535
PACE = 0.002
"""Seconds between two looks at what is due."""
BURST = 32
"""Datagrams to a target at a time when more are due: a receiver's queue has to hold them."""
RESTING = 0.005
"""Seconds between two numbers of a stream."""


class Flow:
    """Datagrams to one target, each from another port than any of the last minute's."""

    def __init__(self, ip: str, port: int, mark: bytes, rate: float) -> None:
        self.sent = 0
        self._rate = rate
        self._begun = time.monotonic()
        self._target = (ip, 0)
        self._to = struct.pack("!HHH", port, 8 + len(mark), 0) + mark
        self._ports: Iterator[int] = itertools.cycle(range(FIRST_PORT, LAST_PORT + 1))
        for _ in range(random.randrange(LAST_PORT - FIRST_PORT)):
            next(self._ports)
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP)
        # It would be given a copy of everything that arrives.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        if family == socket.AF_INET6:
            checksum_at = 6
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, checksum_at)

    def send_what_is_due(self) -> None:
        due = int((time.monotonic() - self._begun) * self._rate) - self.sent
        for _ in range(min(due, BURST)):
            self._socket.sendto(struct.pack("!H", next(self._ports)) + self._to, self._target)
            self.sent += 1


class Flood:
    """Flows, kept up by one thread until it is stopped."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, flows: dict[str, Flow]) -> None:
        """flows: by their mark."""
        self._flows = flows
        self._thread.start()

    def sent(self) -> dict[str, int]:
        return {mark: flow.sent for mark, flow in self._flows.items()}

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(PACE):
            for flow in self._flows.values():
                flow.send_what_is_due()


class Stream:
    """Numbers over a TCP connection to a server that sends back what it is sent: each in its place, and how soon."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(None)
        self._stopping = threading.Event()
        self._returned = 0
        self._longest = 0.0
        self._problem = ""
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def stop(self, within: float) -> dict[str, object]:
        """End it when all came back. returned: how many numbers did; longest: the seconds that one was waited for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(within)
        if any(thread.is_alive() for thread in self._threads):
            self._problem = self._problem or f"not all came back within {within} s"
        return {"returned": self._returned, "longest": self._longest, "problem": self._problem}

    def _write(self) -> None:
        try:
            for number in itertools.count():
                if self._stopping.wait(RESTING):
                    break
                self._connection.sendall(struct.pack("!Q", number))
            self._connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._problem = f"sending number {number}: {error}"

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as returning:
                while True:
                    asked = time.monotonic()
                    if not (raw := returning.read(8)):
                        return
                    self._longest = max(self._longest, time.monotonic() - asked)
                    if raw != struct.pack("!Q", self._returned):
                        self._problem = f"{raw.hex()} came back in place of number {self._returned}"
                        return
                    self._returned += 1
        except OSError as error:
            self._problem = f"waiting for number {self._returned}: {error}"
