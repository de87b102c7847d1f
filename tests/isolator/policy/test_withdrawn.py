"""Callers that may not call any more: what they had begun ends at once, whoever sends next, and stays ended."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import pytest

from isolator.drivers import Wiring
from isolator.model import IPAddress
from isolator.netlink import connections_of, forget
from isolator.policy import Isolation
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import AROUND, WORLD4, WORLD6, Machine, Room, admission

pytestmark = pytest.mark.kernel

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"
CLOSED = Isolation()
FORBIDDEN_FOR = 0.3
"""Seconds in which nothing that is forbidden arrives."""
PATIENCE = 10.0

LETTING_IN = {
    "public": {"netgroups": ("red", "public"), "isolation": CLOSED},
    "allow-from": {
        "netgroups": ("red",),
        "isolation": Isolation(allow_from=(ip_network(WORLD4), ip_network(WORLD6))),
    },
    "open": {"netgroups": ("red",), "isolation": Isolation(open=True)},
}
"""How a caller from outside all pools is let in, as ``admission`` has it."""


@dataclass
class Callee:
    """A container of a network without NAT."""

    machine: Machine
    room: Room
    wiring: Wiring

    def allow(self, **policy: object) -> None:
        self.machine.do(self.machine.policy.admit, admission(self.wiring, **policy))

    def withdraw(self) -> None:
        """Nobody else may call it from now on, and that was all that happened."""
        self.allow(netgroups=("red",), isolation=CLOSED)

    def forget(self) -> None:
        """What the agent does a moment later."""
        found = self.machine.do(connections_of, self.wiring.ips)
        self.machine.do(forget, self.machine.do(self.machine.policy.forbidden, found))


@pytest.fixture
def callee(machine: Machine, container: Room) -> Callee:
    machine.do(machine.policy.set_surroundings, replace(AROUND, nat_pools=()))
    return Callee(machine, container, machine.attach(container, "eth0", A4, A6))


@contextmanager
def tcp(client: Room, server: Room, ip: IPAddress) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An established connection: the client's end, the server's end."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    with ExitStack() as stack:
        listening, calling = (
            stack.enter_context(room.unbound(family, socket.SOCK_STREAM)) for room in (server, client)
        )
        listening.bind((str(ip), 0))
        listening.listen()
        for one in (listening, calling):
            one.settimeout(PATIENCE)
        calling.connect(listening.getsockname()[:2])
        serving = stack.enter_context(listening.accept()[0])
        calling.sendall(b"hello")
        assert serving.recv(64) == b"hello"
        serving.settimeout(FORBIDDEN_FOR)
        yield calling, serving


def refused(end: socket.socket) -> bool:
    """Whether a connection's end is told by a reset that it is over."""
    end.settimeout(PATIENCE)
    try:
        end.sendall(b"still there?")
        return end.recv(64) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("ip", [ip_address(A4), ip_address(A6)], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("by", LETTING_IN)
def test_a_tcp_caller_is_cut_whoever_sends_next(callee: Callee, by: str, ip: IPAddress) -> None:
    callee.allow(**LETTING_IN[by])
    with tcp(callee.machine.world, callee.room, ip) as (caller, server):
        callee.withdraw()
        caller.sendall(b"at once")
        with pytest.raises(TimeoutError):
            server.recv(64)
        callee.forget()
        caller.sendall(b"later")
        with pytest.raises(TimeoutError):
            server.recv(64)
        assert refused(server), "the container's own segment opens nothing"


@pytest.mark.parametrize("ip", [ip_address(A4), ip_address(A6)], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("by", LETTING_IN)
def test_a_udp_caller_is_cut_although_the_container_goes_on_sending(
    callee: Callee, by: str, ip: IPAddress
) -> None:
    callee.allow(**LETTING_IN[by])
    server, caller = callee.room.udp(ip), callee.machine.world.udp(WORLD4 if ip.version == 4 else WORLD6)
    for end in (server, caller):
        end.settimeout(PATIENCE)
    caller.sendto(b"hello", server.getsockname()[:2])
    _, seen = server.recvfrom(64)
    callee.withdraw()
    callee.forget()
    server.settimeout(FORBIDDEN_FOR)
    for _ in range(3):
        server.sendto(b"news", seen[:2])
        assert caller.recv(64) == b"news", "containers may call the world"
        caller.sendto(b"more", server.getsockname()[:2])
        with pytest.raises(TimeoutError):
            server.recv(64)


def test_a_public_container_does_not_keep_what_it_had_begun_with_one_that_was_public(
    callee: Callee, make_container: MakeRoom
) -> None:
    """Whom both may call, the other direction is open to; it is not to be taken for the one that was withdrawn."""
    other = make_container()
    callee.machine.attach(other, "eth0", B4, B6, netgroups=("public",), isolation=CLOSED)
    callee.allow(**LETTING_IN["public"])
    for ip in callee.wiring.ips:
        callee.allow(**LETTING_IN["public"])
        with tcp(other, callee.room, ip) as (caller, server):
            callee.withdraw()
            callee.forget()
            caller.sendall(b"later")
            with pytest.raises(TimeoutError):
                server.recv(64)
            assert refused(server)


def test_what_a_container_began_goes_on_whatever_is_withdrawn(callee: Callee) -> None:
    callee.allow(**LETTING_IN["public"])
    for world in (WORLD4, WORLD6):
        with tcp(callee.room, callee.machine.world, world) as (container, server):
            callee.withdraw()
            callee.forget()
            server.settimeout(PATIENCE)
            server.sendall(b"answer")
            assert container.recv(64) == b"answer"
            container.sendall(b"question")
            assert server.recv(64) == b"question"


def test_a_lost_connection_table_breaks_nothing_within_a_netgroup_and_is_told_elsewhere(
    callee: Callee, make_container: MakeRoom
) -> None:
    mate = make_container()
    callee.machine.attach(mate, "eth0", B4, B6, netgroups=("red",), isolation=CLOSED)
    callee.withdraw()
    for ip, world in zip(callee.wiring.ips, (WORLD4, WORLD6), strict=True):
        with (
            tcp(mate, callee.room, ip) as (client, server),
            tcp(callee.room, callee.machine.world, world) as (caller, _),
        ):
            callee.machine.sh("conntrack -F")
            server.sendall(b"who begins?")
            assert client.recv(64) == b"who begins?"
            assert refused(caller), "told at once, not after a quarter of an hour"
