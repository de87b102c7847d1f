"""Port mappings on real traffic: from the world, from the node, from containers, from the container itself."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

from isolator.drivers import Wiring
from isolator.model import IPAddress, PortMapping
from isolator.netlink import flush_ports
from isolator.policy import Admission, Isolation, ruleset
from isolator.policy.book import Book
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import NODE4, NODE6, SILENCE, Machine, Room
from tests.patience import PATIENCE

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"
NODES = (NODE4, NODE6)
CLOSED = Isolation()


def mapped(machine: Machine, container: Room, *ports: PortMapping) -> Wiring:
    """An endpoint that nobody may call, but by its mapped ports."""
    wiring = machine.attach(container, "eth0", A4, A6, netgroups=("alone",), isolation=CLOSED, ports=ports)
    machine.do(Path(f"/proc/sys/net/ipv4/conf/{wiring.host_ifname}/route_localnet").write_text, "1")
    return wiring


def answer(
    server: Room,
    port: int,
    client: Room,
    target: IPAddress,
    target_port: int,
    proto: str,
    *,
    within: float = PATIENCE,
) -> str | None:
    """Whom the server saw calling; None if the call or its answer was lost."""
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    if proto == "udp":
        return _udp_answer(server, port, client, target, target_port, family, within)
    listening, calling = (room.unbound(family, socket.SOCK_STREAM) for room in (server, client))
    calling.settimeout(within)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("", port))
    listening.listen()
    try:
        calling.connect(place(target, target_port))
        connection, seen = listening.accept()
        with connection:
            connection.sendall(b"hello")
            assert calling.recv(64) == b"hello"
    except OSError:
        return None
    finally:
        listening.close()
    return str(seen[0])


def place(ip: IPAddress, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """For a socket; of a link-local address with its link, which stands behind it by number."""
    scope = ip.scope_id if isinstance(ip, IPv6Address) else None
    return (str(ip), port) if scope is None else (str(ip).split("%")[0], port, 0, int(scope))


def _udp_answer(
    server: Room, port: int, client: Room, target: IPAddress, target_port: int, family: int, within: float
) -> str | None:
    listening, calling = (room.unbound(family) for room in (server, client))
    for each in (listening, calling):
        each.settimeout(within)
    listening.bind(("", port))
    try:
        calling.sendto(b"hello?", place(target, target_port))
        _, seen = listening.recvfrom(64)
        listening.sendto(b"hello", seen)
        assert calling.recv(64) == b"hello"
    except OSError:
        return None
    finally:
        listening.close()
    return str(seen[0])


@pytest.mark.kernel
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_mapped_port_is_reached_from_everywhere(
    machine: Machine, make_container: MakeRoom, proto: str
) -> None:
    container, other = make_container(), make_container()
    mapped(machine, container, PortMapping(proto, 8080, 80))
    machine.attach(other, "eth0", B4, B6)
    for node, own in zip(NODES, (ip_address(A4), ip_address(A6)), strict=True):
        for client in (machine.world, other, machine, container):
            assert answer(container, 80, client, node, 8080, proto), (client.name, node)
        assert not answer(container, 80, machine.world, own, 80, proto, within=SILENCE), (
            "not past the mapping"
        )
        assert not answer(container, 80, other, own, 80, proto, within=SILENCE)
        assert not answer(container, 81, machine.world, node, 8081, proto, within=SILENCE)


@pytest.mark.kernel
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_mapped_port_is_reached_by_localhost_and_nothing_of_the_nodes_localhost_by_the_container(
    machine: Machine, container: Room, proto: str
) -> None:
    wiring = mapped(machine, container, PortMapping(proto, 8080, 80))
    assert answer(container, 80, machine, ip_address("127.0.0.1"), 8080, proto) == str(NODE4)
    container.sh(f"ip route add 127.0.0.0/8 via 169.254.1.1 dev eth0 onlink table {0x6D000000}")
    container.sh(f"ip rule add to 127.0.0.0/8 priority 1 lookup {0x6D000000}; ip rule del priority 0")
    container.do(Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text, "1")
    assert not answer(machine, 99, container, ip_address("127.0.0.1"), 99, proto, within=SILENCE)
    machine.do(machine.policy.revoke, [wiring.host_ifname])


@pytest.mark.kernel
def test_a_host_ip_limits_a_mapping_to_one_address_of_the_node(machine: Machine, container: Room) -> None:
    machine.sh("ip addr add 192.0.2.3/24 dev uplink")
    mapped(
        machine,
        container,
        PortMapping("tcp", 8080, 80, NODE4),
        PortMapping("tcp", 8081, 80, ip_address("::")),
    )
    assert answer(container, 80, machine.world, NODE4, 8080, "tcp")
    assert not answer(container, 80, machine.world, ip_address("192.0.2.3"), 8080, "tcp", within=SILENCE)
    assert not answer(container, 80, machine.world, NODE6, 8080, "tcp", within=SILENCE)
    assert answer(container, 80, machine.world, NODE6, 8081, "tcp")
    assert not answer(container, 80, machine.world, NODE4, 8081, "tcp", within=SILENCE)


@pytest.mark.kernel
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.0.53", "127.255.255.254"])
def test_a_host_ip_of_the_nodes_loopback_leads_from_the_node_itself(
    machine: Machine, container: Room, own: str, proto: str
) -> None:
    mapped(machine, container, PortMapping(proto, 8080, 80, ip_address(own)))
    assert answer(container, 80, machine, ip_address(own), 8080, proto) == str(NODE4)
    for other in ("127.0.0.2", str(NODE4)):
        assert not answer(container, 80, machine, ip_address(other), 8080, proto, within=SILENCE)


@pytest.mark.kernel
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_mapped_port_leaves_the_node_what_cannot_be_forwarded(
    machine: Machine, container: Room, proto: str
) -> None:
    """::1, and link-local addresses, which a process of the node or of its neighbour calls from its own."""
    for room, number in ((machine, 1), (machine.world, 2)):
        link = "uplink" if room is machine else "up0"
        room.sh(f"ip addr add fe80::{number}/64 dev {link} nodad")
        room.sh(f"ip neigh replace fe80::{3 - number} dev {link} lladdr 02:00:00:00:00:0{3 - number}")
        room.delivers(f"fe80::{number}")
    mapped(machine, container, PortMapping(proto, 8080, 80))
    for client, target in (
        (machine, ip_address("::1")),
        (machine, ip_address("fe80::1%1001")),
        (machine.world, ip_address("fe80::1%1002")),
    ):
        assert answer(machine, 8080, client, target, 8080, proto), (client.name, target)
    assert answer(container, 80, machine.world, NODE6, 8080, proto)


@pytest.mark.kernel
def test_an_endpoint_that_goes_takes_its_mappings_along(machine: Machine, container: Room) -> None:
    wiring = mapped(machine, container, PortMapping("tcp", 8080, 80))
    machine.detach(wiring)
    for name in ("ports4", "ports6", "hairpin4", "hairpin6"):
        assert "elements" not in machine.sh(f"nft list table inet moorage | grep -A4 ' {name} '")


@pytest.mark.kernel
def test_a_flow_to_a_mapped_port_of_another_machine_goes_on(
    machine: Machine, make_container: MakeRoom
) -> None:
    """A container's question to a name server, which is on its way when somebody maps UDP 53 of this node."""
    client, container = make_container(), make_container()
    machine.attach(client, "eth0", B4, B6, default_route=True)
    server = machine.world.udp(ip_address("192.0.2.2"), 53)
    asking = client.udp(ip_address(B4))
    asking.sendto(b"question", ("192.0.2.2", 53))
    _, seen = server.recvfrom(64)
    mapped(machine, container, PortMapping("udp", 53, 53))
    machine.do(flush_ports, machine.node, [53])
    server.sendto(b"answer", seen)
    assert asking.recv(64) == b"answer"


@pytest.mark.kernel
def test_a_udp_flow_that_began_before_the_mapping_does_not_go_on_past_it(
    machine: Machine, container: Room
) -> None:
    """A client that never stops sending keeps its connection alive, which remembers that nothing was mapped."""
    calling = machine.world.udp(ip_address("192.0.2.2"), 5000)
    on_node = machine.udp(NODE4, 8080)
    calling.sendto(b"early", (str(NODE4), 8080))
    assert on_node.recv(64) == b"early"
    mapped(machine, container, PortMapping("udp", 8080, 80))
    listening = container.udp(ip_address(A4), 80)
    calling.sendto(b"past it", (str(NODE4), 8080))
    assert on_node.recv(64) == b"past it"
    machine.do(flush_ports, machine.node, [8080])
    calling.sendto(b"mapped", (str(NODE4), 8080))
    assert listening.recv(64) == b"mapped"


def test_every_protocol_has_its_element() -> None:
    """SCTP too: the rules need nothing of the kernel that it may lack, as sockets would."""
    ports = (PortMapping("sctp", 99, 9), PortMapping("udp", 53, 5353, IPv6Address("2001:db8::1")))
    book = Book()
    one = Admission("mrgx", "02:00:00:00:00:01", (ip_address(A4), ip_address(A6)), "web", ("web",))
    book.admit(one)
    text = ruleset.change(book.admit(replace(one, ports=ports)))
    assert f"add element inet moorage ports4 {{ 132 . 99 : {A4} . 9 }}\n" in text
    assert f"add element inet moorage ports6 {{ 132 . 99 : {A6} . 9 }}\n" in text
    assert f"add element inet moorage portsat6 {{ 2001:db8::1 . 17 . 53 : {A6} . 5353 }}\n" in text
    assert "portsat4" not in text
