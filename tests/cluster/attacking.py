"""Attackers of a lab: what they send from inside a namespace, and what of it arrives inside others, counted.

    near, far = Ear(victim.namespace), Ear(other.namespace)
    wire = Wire(evil.namespace)
    shots = [Shot("as a friend", lambda: wire.send(frame))]
    fire(shots, [truth], [near, far])      -> sent and delivered, when the truth has arrived

Everything that is sent carries a mark (``mark``) in its payload. What arrived is what a packet socket on the interface
of the receiving container has seen, or a UDP socket of the receiving node.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import pytest

from moorage.lab import Lab, Namespace
from moorage.lab.namespace import unique
from tests.patience import PATIENCE

T = TypeVar("T")

REPEAT = 5
"""Times that each shot is fired: one packet may be lost for reasons of its own."""

QUIET = 0.1
"""Seconds after which nothing more comes, once the truth, which was sent last, has arrived."""

QUEUE = 1 << 24
"""Bytes that may wait to be heard."""

STRANGER = 150
"""Host number of a machine on the underlay that is no node."""

_ETH_P_ALL = 3
_CLONE_NEWNET = 0x40000000
_SO_RCVBUFFORCE = 33
_TRUTH = "truth"
_MARK = re.compile(rb"<<([^<>]{1,80})>>")
_libc = ctypes.CDLL(None, use_errno=True)


def inside(namespace: Namespace, work: Callable[[], T]) -> T:
    """Run it in a namespace. A socket that it makes stays there, whoever uses it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with open(namespace.path, "rb") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def mark(label: str) -> bytes:
    """What a packet carries for it to be recognised. label: without angle brackets."""
    return b"<<" + label.encode() + b">>"


def truth(label: str = "") -> bytes:
    """The mark of what has to arrive."""
    return mark(f"{_TRUTH}{label}")


class Wire:
    """Frames into one interface of a namespace, past whatever its own kernel says. mac: the interface's own."""

    def __init__(self, namespace: Namespace, link: str = "eth0") -> None:
        self._socket = inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self._socket.bind((link, 0))
        self.mac = bytes(self._socket.getsockname()[4]).hex(":")

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._socket.send(frame)

    def close(self) -> None:
        self._socket.close()


class Hears(Protocol):
    """Somebody who tells what arrived."""

    def heard(self) -> Counter[str]:
        """The labels of all marks that arrived since this was asked last."""
        ...


class Ear:
    """Everything that arrives at one interface of a namespace."""

    def __init__(self, namespace: Namespace, link: str = "eth0") -> None:
        protocol = socket.htons(_ETH_P_ALL)
        self._socket = inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, protocol))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, QUEUE)
        self._socket.bind((link, _ETH_P_ALL))
        self._socket.setblocking(False)

    def frames(self) -> Iterator[bytes]:
        """What arrived since this was asked last."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, address = self._socket.recvfrom(65536)
                if address[2] != socket.PACKET_OUTGOING:
                    yield frame

    def heard(self) -> Counter[str]:
        return Counter(label.decode() for frame in self.frames() for label in _MARK.findall(frame))

    def close(self) -> None:
        self._socket.close()


class Listener:
    """A UDP service of both families on all addresses of a namespace."""

    def __init__(self, namespace: Namespace, port: int) -> None:
        self.socket = udp_socket(namespace, 6, port)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, QUEUE)
        self.socket.setblocking(False)

    def heard(self) -> Counter[str]:
        return Counter(_labels(self.socket))

    def close(self) -> None:
        self.socket.close()


class IcmpListener:
    """All ICMP, ICMPv6 and IGMP that a namespace's own stack is given."""

    def __init__(self, namespace: Namespace) -> None:
        self._sockets = [
            inside(namespace, lambda f=family, p=protocol: socket.socket(f, socket.SOCK_RAW, p))
            for family, protocol in (
                (socket.AF_INET, socket.IPPROTO_ICMP),
                (socket.AF_INET, socket.IPPROTO_IGMP),
                (socket.AF_INET6, socket.IPPROTO_ICMPV6),
            )
        ]
        for sock in self._sockets:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, QUEUE)
            sock.setblocking(False)

    def heard(self) -> Counter[str]:
        return Counter(label for sock in self._sockets for label in _labels(sock))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def _labels(sock: socket.socket) -> Iterator[str]:
    """Of the marks in everything that waits at a socket."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield from (label.decode() for label in _MARK.findall(sock.recv(65536)))


def udp_socket(namespace: Namespace, family: int, port: int = 0) -> socket.socket:
    """An ordinary UDP socket inside; one of IPv6 that has a port serves IPv4, too."""
    made = inside(
        namespace,
        lambda: socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM),
    )
    if port and family == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if port:
        made.bind(("::" if family == 6 else "0.0.0.0", port))
    made.settimeout(PATIENCE)
    return made


@dataclass(frozen=True, slots=True)
class Shot:
    """One packet, as often as it is called for. label: that of its mark."""

    label: str
    send: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Result:
    """sent, delivered: packets. which: of those delivered, by label."""

    sent: int
    delivered: int
    which: Counter[str]


def fire(
    shots: Iterable[Shot], truths: Iterable[Shot], ears: Sequence[Hears], repeat: int = REPEAT
) -> Result:
    """Send every shot ``repeat`` times, then the truths until each was heard; what was heard of the shots.

    Fails if a truth is never heard.
    """
    for ear in ears:
        ear.heard()
    sent = 0
    for shot in shots:
        for _ in range(repeat):
            # What a kernel refuses to send at all was not sent.
            with contextlib.suppress(OSError):
                shot.send()
                sent += 1
    heard: Counter[str] = Counter()
    waiting = list(truths)
    deadline = time.monotonic() + PATIENCE
    while waiting:
        for shot in waiting:
            shot.send()
        time.sleep(QUIET)
        heard.update(everything(ears))
        waiting = [shot for shot in waiting if not heard[shot.label]]
        assert time.monotonic() < deadline, f"never arrived: {[shot.label for shot in waiting]}"
    time.sleep(QUIET)
    heard.update(everything(ears))
    which = Counter({label: n for label, n in heard.items() if not label.startswith(_TRUTH)})
    return Result(sent, which.total(), which)


def everything(ears: Iterable[Hears]) -> Counter[str]:
    """What all of them heard."""
    return sum((ear.heard() for ear in ears), Counter[str]())


@dataclass
class Tally:
    """What was tried and what came of it: the table of a module's attacks."""

    rows: list[tuple[str, str, str, int, int]] = field(default_factory=list)

    def judge(self, attack: str, family: int | str, fabric: str, result: Result) -> None:
        """Note it. Fails if nothing was sent, or something arrived."""
        self.note(attack, family, fabric, result.sent, result.delivered)
        assert result.delivered == 0, (
            f"{attack}: {result.delivered} of {result.sent} delivered, such as {result.which.most_common(6)}"
        )

    def note(self, attack: str, family: int | str, fabric: str, sent: int, delivered: int) -> None:
        """A row of the table. Fails if nothing was sent."""
        self.rows.append(
            (attack, f"IPv{family}" if family in (4, 6) else str(family), fabric, sent, delivered)
        )
        assert sent > 0, f"{attack}: nothing was sent"

    def text(self) -> str:
        lines = [f"  {'attack':<58} {'family':<6} {'fabric':<16} {'sent':>6} {'delivered':>9}"]
        lines += [f"  {a:<58} {f:<6} {b:<16} {s:>6} {d:>9}" for a, f, b, s, d in self.rows]
        return "\n".join(lines)


@contextlib.contextmanager
def tallied(config: pytest.Config) -> Iterator[Tally]:
    """A table that is printed in the end."""
    tally = Tally()
    yield tally
    manager = config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        print(f"\n{tally.text()}")


@contextlib.contextmanager
def stranger(lab: Lab, host: int = STRANGER) -> Iterator[Namespace]:
    """A machine on the underlay that is no node."""
    namespace = Namespace(unique("stranger"))
    with namespace:
        lab.switch.plug(namespace, host)
        try:
            yield namespace
        finally:
            lab.switch.unplug(host)
