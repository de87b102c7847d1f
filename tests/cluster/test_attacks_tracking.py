"""A container has no more connections tracked than its network allows it, and takes nobody else's from the table."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import Raw

from moorage.lab import Lab, LabNode, Namespace
from tests.cluster.attacking import (
    QUIET,
    STRANGER,
    Ear,
    Tally,
    inside,
    mark,
    stranger,
    udp_socket,
)
from tests.cluster.icmp import open_flow
from tests.cluster.peers import PORT, Peer, create_networks, peers
from tests.cluster.tunnel import from_container, network, underlay
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)
LIMIT = 50
SLACK = 2
"""The two processors may each judge a packet before either's connection is in the table."""
FLOWS = 500
PORTS = range(20000, 20000 + FLOWS)
STREAM = 3000
"""Datagrams of one flow, in one direction."""
HTTP = 80
SILENT = f"""
table inet silent {{
    chain input {{ type filter hook input priority 0; tcp dport {HTTP} drop; tcp sport {HTTP} drop; }}
}}
"""
"""No answers to what others have forged: a reset would end the connection."""
EVIL = {"vxlan": ("vx", "cni"), "hostgw": ("hg", "cni"), "net-modules": ("vx", "net-modules")}


@dataclass
class Scene:
    """Attackers are on n1, and their friends of the same netgroup on both nodes, by network. others: a pair of blue."""

    lab: Lab
    evil: dict[str, Peer]
    near: dict[str, Peer]
    far: dict[str, Peer]
    others: tuple[Peer, Peer]
    outsider: Namespace

    @property
    def node(self) -> LabNode:
        return self.lab.nodes[0]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Networks are limited if this command line can."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=2))
        lab.start()
        n1, n2 = lab.nodes
        create_networks(n1, "vx", "hg")
        limit(n1)
        outsider = stack.enter_context(stranger(lab))
        join = stack.enter_context(peers(lab))
        evil = {who: join(n1, net, "red", engine=engine) for who, (net, engine) in EVIL.items()}
        near = {net: join(n1, net, "red") for net in ("vx", "hg")}
        far = {net: join(n2, net, "red") for net in ("vx", "hg")}
        others = join(n1, "vx", "blue"), join(n2, "vx", "blue")
        for silent in (*evil.values(), *near.values(), *far.values()):
            silent.namespace.run("nft", SILENT)
        outsider.run("nft", SILENT)
        server = inside(
            n1.namespace,
            lambda: socket.create_server(("::", HTTP), family=socket.AF_INET6, dualstack_ipv6=True),
        )
        stack.callback(server.close)
        yield Scene(lab, evil, near, far, others, outsider)


def limit(node: LabNode) -> list[str]:
    """What is said against it, by network."""
    answers = [
        node.cli("network", "set", name, "--max-connections", str(LIMIT), check=False)
        for name in ("vx", "hg")
    ]
    return [answer.stderr for answer in answers if answer.returncode]


@pytest.fixture(autouse=True)
def forgotten(scene: Scene) -> None:
    """Every test begins with none of the attackers' connections."""
    forget(scene)


def forget(scene: Scene) -> None:
    """As if all connections were over; those that go on are picked up again."""
    scene.node.namespace.run("conntrack", "-F")


def tracked(node: LabNode, ip: str) -> int:
    """Connections of this source in the node's table."""
    family = 6 if ":" in ip else 4
    said = node.namespace.run("conntrack", "-L", "-f", f"ipv{family}", "-s", ip, check=False).stdout
    return len(said.splitlines())


def targets(scene: Scene, who: str, family: int) -> dict[str, str]:
    name = scene.evil[who].network
    return {
        "a friend here": scene.near[name].ips[family],
        "a friend elsewhere": scene.far[name].ips[family],
        "the node": underlay(1, family),
        "the world": underlay(STRANGER, family),
    }


TARGETS = ("a friend here", "a friend elsewhere", "the node", "the world")
UDP_CASES = [("vxlan", target) for target in TARGETS] + [
    (who, target) for who in ("hostgw", "net-modules") for target in ("a friend elsewhere", "the node")
]


def test_a_network_limits_its_containers_connections(scene: Scene) -> None:
    assert limit(scene.node) == []


@pytest.mark.parametrize(("who", "target"), UDP_CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_udp_flows_of_a_container_are_limited(
    scene: Scene, tally: Tally, who: str, family: int, target: str
) -> None:
    """A packet from each of many ports, to one address."""
    evil, ip = scene.evil[who], targets(scene, who, family)[target]
    frames = udp_frames(evil, ip)
    evil.wire.send(*frames)
    judge(scene, tally, f"UDP to {target}", who, family)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forged_syns_of_a_container_are_limited(scene: Scene, tally: Tally, family: int, target: str) -> None:
    evil, ip = scene.evil["vxlan"], targets(scene, "vxlan", family)[target]
    syn = TCP(sport=PORTS[0], dport=HTTP, flags="S", seq=1)
    evil.wire.send(*from_ports(from_container(evil, network(evil.ips[family], ip) / syn)))
    judge(scene, tally, f"SYNs to {target}", "vxlan", family)


@pytest.mark.parametrize("family", FAMILIES)
def test_forged_handshakes_of_two_containers_are_limited(scene: Scene, tally: Tally, family: int) -> None:
    """Both play their parts, so that the kernel holds each for an established connection, for five days."""
    evil, friend = scene.evil["vxlan"], scene.near["vx"]
    here, there = evil.ips[family], friend.ips[family]
    first = PORTS[0]
    syn = from_container(evil, network(here, there) / TCP(sport=first, dport=HTTP, flags="S", seq=1))
    answer = TCP(sport=HTTP, dport=first, flags="SA", seq=1, ack=2)
    ack = from_container(evil, network(here, there) / TCP(sport=first, dport=HTTP, flags="A", seq=2, ack=2))
    evil.wire.send(*from_ports(syn))
    friend.wire.send(*from_ports(from_container(friend, network(there, here) / answer), answers=True))
    evil.wire.send(*from_ports(ack))
    judge(scene, tally, "handshakes of two", "vxlan", family)


def udp_frames(evil: Peer, ip: str) -> list[bytes]:
    packet = network(evil.ips[6 if ":" in ip else 4], ip) / UDP(sport=PORTS[0], dport=PORT) / Raw(b"flow")
    return from_ports(from_container(evil, packet))


def from_ports(frame: bytes, *, answers: bool = False) -> list[bytes]:
    """A TCP or UDP frame from each of PORTS in place of the first, or to each if it ``answers``."""
    ipv6 = frame[12:14] == b"\x86\xdd"
    transport = 54 if ipv6 else 34
    protocol = frame[20 if ipv6 else 23]
    checksum = transport + {socket.IPPROTO_TCP: 16, socket.IPPROTO_UDP: 6}[protocol]
    place = transport + 2 * answers
    (was,) = struct.unpack_from("!H", frame, checksum)
    made = []
    for port in PORTS:
        changed = bytearray(frame)
        struct.pack_into("!H", changed, place, port)
        # RFC 1624, equation 3
        total = (~was & 0xFFFF) + (~PORTS[0] & 0xFFFF) + port
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", changed, checksum, ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        made.append(bytes(changed))
    return made


def judge(scene: Scene, tally: Tally, what: str, who: str, family: int) -> None:
    """The table has what is allowed, and others' calls come about while it is at its limit."""
    ip = scene.evil[who].ips[family]
    eventually(lambda: tracked(scene.node, ip) >= LIMIT)
    count = tracked(scene.node, ip)
    one, other = scene.others
    open_flow(one.namespace, one.ips[family], other.namespace, other.ips[family])
    beyond = max(0, count - LIMIT - SLACK)
    tally.note(f"4: {what}, tracked beyond {LIMIT}", family, who, FLOWS, beyond)
    assert count <= LIMIT + SLACK


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", EVIL)
def test_one_stream_in_one_direction_is_not_cut_at_the_limit(
    scene: Scene, tally: Tally, who: str, family: int
) -> None:
    """Nobody answers, so that each of its packets is one of a new connection."""
    evil = scene.evil[who]
    friend = scene.far[evil.network]
    with contextlib.closing(Ear(friend.namespace)) as ear:
        with udp_socket(evil.namespace, family) as sock:
            sock.bind((evil.ips[family], 0))
            target = (friend.ips[family], PORT)
            sock.sendto(mark("first"), target)
            evil.wire.send(*udp_frames(evil, friend.ips[family]))
            for number in range(STREAM):
                sock.sendto(mark("stream"), target)
                if number % 100 == 0:
                    time.sleep(0.001)
        heard = 0
        deadline = time.monotonic() + PATIENCE
        while heard < STREAM and time.monotonic() < deadline:
            time.sleep(QUIET)
            heard += ear.heard()["stream"]
    tally.note("4: a stream in one direction, cut", family, who, STREAM, STREAM - heard)
    assert heard == STREAM


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", EVIL)
def test_it_connects_again_when_its_connections_are_over(scene: Scene, who: str, family: int) -> None:
    evil = scene.evil[who]
    friend = scene.near[evil.network]
    evil.wire.send(*udp_frames(evil, friend.ips[family]))
    forget(scene)
    open_flow(evil.namespace, evil.ips[family], friend.namespace, friend.ips[family])
