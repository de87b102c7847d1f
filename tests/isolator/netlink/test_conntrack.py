"""Forgetting connections."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.model import IPAddress
from isolator.netlink import Node, connections_of, flush_conntrack, flush_ports, forget
from isolator.netlink.codec import NLM_F_CREATE, NLM_F_EXCL, Request, attribute, nested
from isolator.netlink.codec import attributes as attributes_of
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from tests.isolator.rooms import WORLD4, WORLD6, Machine, Room

pytestmark = pytest.mark.kernel

_NEW, _GET = 0x100, 0x101


def a_tuple(kind: int, source: IPAddress, destination: IPAddress, sport: int, dport: int) -> bytes:
    """One direction of a UDP flow."""
    first = 1 if source.version == 4 else 3
    return nested(
        kind,
        nested(1, attribute(first, source.packed), attribute(first + 1, destination.packed)),
        nested(
            2,
            attribute(1, bytes([socket.IPPROTO_UDP])),
            attribute(2, sport.to_bytes(2, "big")),
            attribute(3, dport.to_bytes(2, "big")),
        ),
    )


def flow(
    source: str, destination: str, sport: int, *, answers: str | None = None, masqueraded: str | None = None
) -> Request:
    """A tracked flow. answers: who answers if it was redirected; masqueraded: whom it answers then."""
    asked, client = ip_address(destination), ip_address(source)
    answering, answered = ip_address(answers or destination), ip_address(masqueraded or source)
    family = socket.AF_INET if client.version == 4 else socket.AF_INET6
    body = (
        bytes([family, 0, 0, 0])
        + a_tuple(1, client, asked, sport, 53)
        + a_tuple(2, answering, answered, 53, sport)
        + attribute(7, (600).to_bytes(4, "big"))
        + (attribute(6, (1).to_bytes(4, "big")))
    )
    return Request(_NEW, NLM_F_CREATE | NLM_F_EXCL, body, "track a flow")


def flows(netfilter: NetlinkSocket) -> int:
    """How many are tracked."""
    return len(netfilter.dump(Request(_GET, 0, bytes(4), "count")))


@pytest.fixture
def netfilter(container: Room) -> Iterator[NetlinkSocket]:
    """A netfilter socket in a container where connections are tracked."""
    container.sh(
        "nft 'table inet t { chain c { type filter hook input priority 0; ct state new accept; }; }'"
    )
    with container.do(NetlinkSocket, NETLINK_NETFILTER) as netfilter:
        yield netfilter


def test_every_role_of_an_address_is_found_and_nothing_else(
    container: Room, netfilter: NetlinkSocket
) -> None:
    doomed = [
        flow("10.0.0.5", "10.9.0.1", 1),
        flow("10.9.0.1", "10.0.0.5", 2),
        flow("10.9.0.1", "192.0.2.1", 3, answers="10.0.0.5"),
        flow("10.9.0.1", "192.0.2.1", 4, masqueraded="10.0.0.5"),
        flow("10.0.0.5", "192.0.2.2", 5, masqueraded="192.0.2.1"),
        flow("fd00::5", "fd09::1", 6),
        flow("fd09::1", "fd00::5", 7),
    ]
    kept = [
        flow("10.0.0.6", "10.9.0.1", 8),
        flow("10.0.0.50", "10.9.0.1", 9),
        flow("fd00::55", "fd09::1", 10),
        flow("fd00::500", "fd09::1", 11),
    ]
    netfilter.execute([*doomed, *kept])
    assert flows(netfilter) == len(doomed) + len(kept)
    container.do(flush_conntrack, [ip_address("10.0.0.5"), ip_address("fd00::5")])
    assert flows(netfilter) == len(kept)
    container.do(flush_conntrack, [ip_address("10.0.0.5")])
    container.do(flush_conntrack, [ip_address("10.0.0.6"), ip_address("10.0.0.50")])
    assert flows(netfilter) == 2


def test_connections_are_told_by_who_began_them(container: Room, netfilter: NetlinkSocket) -> None:
    netfilter.execute(
        [
            flow("10.0.0.5", "192.0.2.2", 1, masqueraded="192.0.2.1"),
            flow("10.9.0.1", "192.0.2.1", 2, answers="10.0.0.5"),
            flow("fd09::1", "fd00::5", 3),
            flow("10.9.0.1", "10.0.0.6", 4),
        ]
    )
    found = container.do(connections_of, [ip_address("10.0.0.5"), ip_address("fd00::5")])
    assert {(str(c.source), str(c.target)) for c in found} == {
        ("10.0.0.5", "192.0.2.2"),
        ("10.9.0.1", "192.0.2.1"),
        ("fd09::1", "fd00::5"),
    }
    container.do(forget, found[:1])
    container.do(forget, found)
    assert flows(netfilter) == 1


def test_flows_to_a_port_are_found_by_their_first_packet(container: Room, netfilter: NetlinkSocket) -> None:
    container.sh("ip address add 10.9.0.1/32 dev lo; ip address add fd09::1/128 dev lo")
    elsewhere = flow("10.0.0.5", "10.9.0.2", 3)
    netfilter.execute([flow("10.0.0.5", "10.9.0.1", 1), flow("fd00::5", "fd09::1", 2), elsewhere])
    with container.do(Node) as node:
        container.do(flush_ports, node, [1, 2, 54])
        assert flows(netfilter) == 3
        container.do(flush_ports, node, [53])
        assert flows(netfilter) == 1, "the one to another machine is left"


def test_an_address_in_another_attribute_is_no_hit(container: Room, netfilter: NetlinkSocket) -> None:
    """The bytes of an address may turn up anywhere; only in a tuple do they mean it."""
    ip = ip_address("0.0.2.88")
    assert ip.packed == (600).to_bytes(4, "big"), "the timeout in seconds, just below"
    netfilter.execute([flow("10.0.0.5", "10.9.0.1", 1)])
    container.do(flush_conntrack, [ip])
    assert flows(netfilter) == 1


def test_zones_do_not_hide_entries(container: Room, netfilter: NetlinkSocket) -> None:
    in_zone = flow("10.0.0.5", "10.9.0.1", 1)
    netfilter.execute([in_zone._replace(body=in_zone.body + attribute(18, (7).to_bytes(2, "big")))])
    container.do(flush_conntrack, [ip_address("10.0.0.5")])
    assert flows(netfilter) == 0


def test_nothing_tracked_and_nothing_asked_are_fine(container: Room) -> None:
    container.do(flush_conntrack, [ip_address("10.0.0.5"), ip_address("fd00::5")])
    container.do(flush_conntrack, [])


def test_a_kernel_without_connection_tracking_has_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Request(2, 0, (-errno.EINVAL).to_bytes(4, "little", signed=True) + bytes(16), "").encode(0, 1)
    monkeypatch.setattr(NetlinkSocket, "_send", lambda *_: None)
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        monkeypatch.setattr(netfilter, "_socket", type("Refusing", (), {"recv": lambda *_: refusal}))
        listing = Request(_GET, 0, bytes(4), "list", (errno.EINVAL,))
        assert list(netfilter.stream(listing)) == []
        monkeypatch.undo()


def test_thirty_addresses_among_twenty_thousand_entries_cost_one_dump(
    container: Room, netfilter: NetlinkSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[Request] = []
    stream = NetlinkSocket.stream

    def noted(self: NetlinkSocket, request: Request) -> Iterator[bytes]:
        dumps.append(request)
        return stream(self, request)

    monkeypatch.setattr(NetlinkSocket, "stream", noted)
    netfilter.execute(
        [flow(f"10.0.{i % 200}.1", f"10.9.{i // 4000}.1", 1000 + i // 200) for i in range(20_000)]
    )
    container.do(flush_conntrack, [ip_address(f"10.0.{i}.1") for i in range(30)])
    assert len(dumps) == 1
    left = [attributes_of(m.body, 4) for m in netfilter.dump(Request(_GET, 0, bytes(4), "list"))]
    assert len(left) == 17_000


def test_an_established_flow_does_not_continue_to_the_next_owner(machine: Machine, container: Room) -> None:
    """The world talks to an address by an established, masqueraded flow; then the address changes hands."""
    for ip, world in ((ip_address("10.0.0.5"), WORLD4), (ip_address("fd00::5"), WORLD6)):
        wiring = machine.attach(container, "eth0", str(ip))
        server, client = machine.world.udp(world), container.udp(ip, 4000)
        client.sendto(b"hello", server.getsockname()[:2])
        _, seen = server.recvfrom(64)
        server.sendto(b"to the old owner", seen[:2])
        assert client.recv(64) == b"to the old owner"

        machine.detach(wiring)
        machine.do(flush_conntrack, [ip])
        machine.attach(container, "eth0", str(ip))
        new = container.udp(ip, 4001)
        new.close()
        server.sendto(b"to the new one", seen[:2])
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(64)
        machine.detach(wiring)
