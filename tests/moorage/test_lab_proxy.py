"""The lab's slow network: later, but whole and in order."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from isolator.netlink import Node
from moorage.lab import DelayingProxy, Namespace, Switch, unique
from moorage.lab.switch import address
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

PORT = 7
PROXY, SERVER = 150, 201
"""Host numbers on the underlay."""


@dataclass
class Line:
    """A connection through the proxy: both ends of it, and the proxy."""

    near: socket.socket
    far: socket.socket
    proxy: DelayingProxy

    def round_trip(self) -> float:
        """Seconds until one byte was sent there and back."""
        begun = time.monotonic()
        self.near.sendall(b"?")
        assert self.far.recv(1) == b"?"
        self.far.sendall(b"!")
        assert self.near.recv(1) == b"!"
        return time.monotonic() - begun


@pytest.fixture
def line() -> Iterator[Line]:
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(Switch(Namespace(unique("switch"))))
        namespace = stack.enter_context(Namespace(unique("server")))
        switch.plug(namespace, SERVER)
        ip = address(SERVER)
        home = stack.enter_context(Node())
        with stack.enter_context(home.open_namespace(str(namespace.path))).inside():
            listener = stack.enter_context(socket.create_server((ip, PORT)))
        proxy = stack.enter_context(DelayingProxy(switch, PROXY, f"{ip}:{PORT}"))
        with stack.enter_context(home.open_namespace(str(proxy.namespace.path))).inside():
            near = stack.enter_context(socket.create_connection((proxy.address.split(":")[0], PORT)))
        far = stack.enter_context(listener.accept()[0])
        for end in (near, far):
            end.settimeout(PATIENCE)
        yield Line(near, far, proxy)


def test_a_round_trip_takes_as_long_as_was_set_and_the_next_as_it_is_then(line: Line) -> None:
    assert quickest(line) < 0.3
    line.proxy.delay(round_trip=0.3)
    assert 0.3 <= quickest(line) < 0.9
    line.proxy.delay(round_trip=0.0)
    assert quickest(line) < 0.3


def quickest(line: Line) -> float:
    """Of ten round trips: a busy machine holds some of them up."""
    return min(line.round_trip() for _ in range(10))


def test_much_arrives_whole_and_in_order_and_is_not_held_up_piece_by_piece(line: Line) -> None:
    line.proxy.delay(round_trip=0.4)
    sent = b"".join(number.to_bytes(4, "big") for number in range(1 << 21))
    sender = threading.Thread(target=line.near.sendall, args=(sent,))
    begun = time.monotonic()
    sender.start()
    received = bytearray()
    while len(received) < len(sent):
        received += line.far.recv(1 << 20)
    sender.join()
    assert received == sent
    assert time.monotonic() - begun < 20  # one piece after the other, 128 of 64 KiB, would take 25 s


def test_an_end_is_passed_on_and_the_other_direction_stays_open(line: Line) -> None:
    line.proxy.delay(round_trip=0.1)
    line.near.sendall(b"last")
    line.near.shutdown(socket.SHUT_WR)
    assert line.far.recv(9) == b"last"
    assert line.far.recv(9) == b""
    line.far.sendall(b"answer")
    assert line.near.recv(9) == b"answer"


def test_a_broken_connection_is_broken_on_both_sides(line: Line) -> None:
    line.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    line.far.close()
    with contextlib.suppress(ConnectionResetError):
        assert line.near.recv(9) == b""
