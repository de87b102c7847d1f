"""How many connections an endpoint may have tracked, with real packets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ipam.isolation import MOST_CONNECTIONS
from ipam.records import Network
from isolator.drivers import Wiring
from isolator.netlink import sources
from isolator.policy import Isolation, isolation_of
from isolator.tracking import SHARE, connection_table, fair_share
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import (
    AROUND,
    NODE4,
    NODE6,
    WORLD4,
    WORLD6,
    Machine,
    Room,
    admission,
    heard,
    wrong_sets,
)
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

LIMIT = 40
MANY = 300
LIMITED = Isolation(connections=LIMIT)
GREEDY4, GREEDY6 = "10.0.0.5", "fd00::5"
OTHER4 = "10.0.0.6"
TARGETS = {
    "world, IPv4": WORLD4,
    "world, IPv6": WORLD6,
    "node, IPv4": NODE4,
    "node, IPv6": NODE6,
}


@dataclass
class Stage:
    """A container that opens whatever it can, and another one."""

    machine: Machine
    greedy: Room
    other: Room
    wiring: Wiring

    def tracked(self) -> int:
        """Connections that the greedy one has, in both families."""
        counted = self.machine.do(sources)
        return sum(counted[ip] for ip in self.wiring.ips)


@pytest.fixture
def stage(machine: Machine, make_container: MakeRoom) -> Iterator[Stage]:
    greedy, other = make_container(), make_container()
    wiring = machine.attach(greedy, "eth0", GREEDY4, GREEDY6, isolation=LIMITED)
    machine.attach(other, "eth0", OTHER4)
    yield Stage(machine, greedy, other, wiring)


def begin(room: Room, target: object, count: int) -> None:
    """So many flows of one datagram each, each to another port."""
    with room.do(
        socket.socket, socket.AF_INET6 if ":" in str(target) else socket.AF_INET, socket.SOCK_DGRAM
    ) as one:
        for port in range(20000, 20000 + count):
            one.sendto(b"?", (str(target), port))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_more_than_its_limit_is_tracked_of_an_endpoint(stage: Stage, target: object) -> None:
    begin(stage.greedy, target, MANY)
    assert stage.tracked() == LIMIT


def test_both_families_count_together(stage: Stage) -> None:
    begin(stage.greedy, WORLD4, LIMIT // 2)
    begin(stage.greedy, WORLD6, MANY)
    assert stage.tracked() == LIMIT


def test_others_go_on_while_one_is_at_its_limit(stage: Stage) -> None:
    begin(stage.greedy, WORLD4, MANY)
    assert heard(stage.machine.world, WORLD4, stage.other) is not None


def test_what_is_tracked_already_goes_on_at_the_limit(stage: Stage) -> None:
    """Also a flow that nobody ever answers: each of its packets is one of a new connection, for the kernel."""
    server = stage.machine.world.udp(WORLD4)
    with stage.greedy.udp(WORLD4.__class__(GREEDY4)) as flow:
        flow.sendto(b"first", server.getsockname())
        assert server.recv(16) == b"first"
        begin(stage.greedy, WORLD4, MANY)
        for number in range(500):
            flow.sendto(b"%d" % number, server.getsockname())
            assert server.recv(16) == b"%d" % number


def test_who_was_at_its_limit_begins_again_when_connections_end(stage: Stage) -> None:
    begin(stage.greedy, WORLD4, MANY)
    stage.machine.sh("conntrack -F >/dev/null 2>&1")
    deadline = time.monotonic() + PATIENCE
    while heard(stage.machine.world, WORLD4, stage.greedy, within=0.3) is None:
        assert time.monotonic() < deadline, "it never begins again"


def test_the_next_owner_of_a_name_begins_with_nothing(stage: Stage) -> None:
    begin(stage.greedy, WORLD4, MANY)
    stage.machine.detach(stage.wiring)
    stage.machine.sh("conntrack -F >/dev/null 2>&1")
    stage.machine.attach(stage.greedy, "eth0", GREEDY4, GREEDY6, isolation=LIMITED)
    deadline = time.monotonic() + PATIENCE
    while heard(stage.machine.world, WORLD4, stage.greedy, within=0.3) is None:
        assert time.monotonic() < deadline, "it is stopped for what another one had"


def test_a_limit_changes_in_place(stage: Stage) -> None:
    more = admission(stage.wiring, isolation=Isolation(connections=2 * LIMIT))
    stage.machine.do(stage.machine.policy.admit, more)
    begin(stage.greedy, WORLD4, MANY)
    assert stage.tracked() == 2 * LIMIT
    assert stage.machine.do(stage.machine.policy.connection_limits)[stage.wiring.host_ifname] == 2 * LIMIT
    assert stage.machine.do(wrong_sets, stage.machine.policy) == {}


def test_one_that_is_halted_begins_nothing_and_keeps_what_it_has(stage: Stage) -> None:
    server = stage.machine.world.udp(WORLD4)
    with stage.greedy.udp(WORLD4.__class__(GREEDY4)) as flow:
        flow.sendto(b"first", server.getsockname())
        assert server.recv(16) == b"first"
        stage.machine.do(stage.machine.policy.halt, [stage.wiring.host_ifname])
        before = stage.tracked()
        begin(stage.greedy, WORLD4, 10)
        flow.sendto(b"second", server.getsockname())
        assert server.recv(16) == b"second"
        assert stage.tracked() == before
    assert stage.machine.do(wrong_sets, stage.machine.policy) == {}, "the agent does not mend it away"
    stage.machine.do(stage.machine.policy.halt, [])
    assert heard(stage.machine.world, WORLD4, stage.greedy) is not None


def test_a_set_of_limits_that_was_flushed_is_seen(stage: Stage) -> None:
    stage.machine.sh("nft flush set inet moorage connections")
    assert stage.machine.do(wrong_sets, stage.machine.policy).keys() == {"connections"}


def test_what_the_store_says_of_a_limit_is_never_more_than_the_kernel_counts_to() -> None:
    """A record from elsewhere may hold any number; nft takes one of 32 bits."""
    for said, limit in ((5_000_000_000, MOST_CONNECTIONS), (-1, 0), (50, 50)):
        assert isolation_of(Network(name="web", pools=[], max_connections=said)).connections == limit


def test_ten_endpoints_at_their_limit_leave_half_of_the_table(machine: Machine) -> None:
    most = machine.do(connection_table).most
    assert most > 0, "the firewall has the kernel track connections"
    assert machine.do(fair_share) == most // SHARE
    assert 10 * machine.do(fair_share) <= most / 2
    assert AROUND.connections > 0


def test_limits_stay_while_nothing_is_tracked(stage: Stage) -> None:
    """The kernel takes idle elements out of dynamic sets, within a second or two."""
    begin(stage.greedy, WORLD4, LIMIT)
    stage.machine.sh("conntrack -F >/dev/null 2>&1")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert stage.machine.do(wrong_sets, stage.machine.policy) == {}
        # Somebody else changes a rule, or nobody looks.
        stage.machine.sh("nft add set inet moorage other '{ type ipv4_addr; }'")
        stage.machine.sh("nft delete set inet moorage other")
        time.sleep(0.2)
