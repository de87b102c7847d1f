"""A container that lies, frame by frame: about its address, its MAC, and about whose neighbour it is.

scapy builds the frames; they leave through a packet socket inside the container, past whatever its own kernel says.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from isolator.drivers import Wiring
from isolator.drivers.routed_layout import HOST_MAC
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import AROUND, NODE4, NODE6, POOLS, WORLD4, WORLD6, Machine, Room, heard
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

LIAR4, LIAR6 = "10.0.0.5", "fd00::5"
VICTIM4, VICTIM6 = "10.0.0.6", "fd00::6"
FRIEND4, FRIEND6 = "10.0.0.7", "fd00::7"
PORT = 4711
ETH_P_ALL = 3
TRUTH = b"the truth"
QUIET = 0.15
"""Seconds after which nothing more comes."""


@dataclass
class Stage:
    """Three containers that may all talk to each other, one of which lies."""

    machine: Machine
    liar: Room
    victim: Room
    friend: Room
    wirings: dict[str, Wiring]

    @property
    def own_mac(self) -> str:
        return self.wirings["liar"].mac

    def send(self, *frames: Packet) -> None:
        """From the liar's interface, as they are."""
        raw = self.liar.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
        with raw:
            raw.bind(("eth0", 0))
            for frame in frames:
                raw.send(bytes(frame))

    def neighbours(self) -> str:
        """All that the node believes about who is where; not how fresh that is."""
        lines = self.machine.sh("ip -4 neigh show; ip -6 neigh show").splitlines()
        return "\n".join(sorted(" ".join(line.split()[:5]) for line in lines if "lladdr" in line))

    def all_talk(self) -> bool:
        victim, friend = ip_address(VICTIM4), ip_address(FRIEND4)
        return (
            heard(self.victim, victim, self.friend) == FRIEND4
            and heard(self.friend, friend, self.victim) == VICTIM4
            and heard(self.victim, ip_address(VICTIM6), self.friend) == FRIEND6
            and heard(self.victim, victim, self.machine) is not None
            and heard(self.machine.world, WORLD4, self.victim) is not None
        )


@pytest.fixture
def stage(machine: Machine, make_container: MakeRoom) -> Iterator[Stage]:
    liar, victim, friend = make_container(), make_container(), make_container()
    wirings = {
        "liar": machine.attach(liar, "eth0", LIAR4, LIAR6),
        "victim": machine.attach(victim, "eth0", VICTIM4, VICTIM6),
        "friend": machine.attach(friend, "eth0", FRIEND4, FRIEND6),
    }
    yield Stage(machine, liar, victim, friend, wirings)


class Ear:
    """Everything that arrives in a room on one link, as bytes."""

    def __init__(self, room: Room, link: str) -> None:
        self._socket = room.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind((link, ETH_P_ALL))
        self._socket.settimeout(QUIET)

    def heard(self, awaited: bytes = b"") -> bytes:
        """All there was, until it is quiet and what is awaited has come."""
        deadline = time.monotonic() + PATIENCE
        found = everything(self._socket)
        while awaited not in found and time.monotonic() < deadline:
            found += everything(self._socket)
        return found

    def close(self) -> None:
        self._socket.close()


def everything(sock: socket.socket) -> bytes:
    found = b""
    try:
        while True:
            found += sock.recv(65536)
    except TimeoutError:
        return found


def arriving(stage: Stage, frames: dict[bytes, Packet]) -> set[bytes]:
    """Which of the liar's frames, each with a mark in it, are seen anywhere: by containers, the world, the node.

    The last of them is the truth, which has to arrive.
    """
    ears = [Ear(stage.victim, "eth0"), Ear(stage.friend, "eth0"), Ear(stage.machine.world, "up0")]
    on_node = [stage.machine.udp(NODE4, PORT), stage.machine.udp(NODE6, PORT)]
    try:
        stage.send(*frames.values())
        for server in on_node:
            server.settimeout(QUIET)
        found = b""
        deadline = time.monotonic() + PATIENCE
        while TRUTH not in found and time.monotonic() < deadline:
            found += b"".join([*(ear.heard() for ear in ears), *map(everything, on_node)])
        return {mark for mark in frames if mark in found}
    finally:
        for each in (*ears, *on_node):
            each.close()


TARGETS = [
    (LIAR4, VICTIM4, FRIEND4),
    (LIAR4, str(WORLD4), FRIEND4),
    (LIAR4, str(NODE4), FRIEND4),
    (LIAR6, VICTIM6, FRIEND6),
    (LIAR6, str(WORLD6), FRIEND6),
    (LIAR6, str(NODE6), FRIEND6),
]


def packet(source: str, target: str, mark: bytes, mac: str) -> Packet:
    network = IPv6 if ":" in source else IP
    return Ether(src=mac, dst=HOST_MAC) / network(src=source, dst=target) / UDP(sport=PORT, dport=PORT) / mark


@pytest.mark.parametrize(("own", "target", "other"), TARGETS)
def test_only_the_own_address_and_mac_get_out(stage: Stage, own: str, target: str, other: str) -> None:
    mac = stage.own_mac
    lies = [
        (other, mac),
        (other, stage.wirings["friend"].mac),
        (own, stage.wirings["friend"].mac),
        (own, "02:00:00:00:00:99"),
        ("192.0.2.77" if ":" not in own else "2001:db8::77", mac),
        ("127.0.0.1" if ":" not in own else "::1", mac),
        ("0.0.0.0" if ":" not in own else "::", mac),
        ("169.254.1.1" if ":" not in own else "fe80::1", mac),
    ]
    marks = {f"{source} from {sender}.".encode(): (source, sender) for source, sender in lies}
    frames = {mark: packet(source, target, mark, sender) for mark, (source, sender) in marks.items()}
    frames[TRUTH] = packet(own, target, TRUTH, mac)
    assert arriving(stage, frames) == {TRUTH}


def test_a_flow_of_others_cannot_be_joined(stage: Stage) -> None:
    """A spoofed segment or ICMP error would be `established` or `related`, were it not dropped before conntrack."""
    server = stage.victim.udp(ip_address(VICTIM4), 7)
    client = stage.friend.udp(ip_address(FRIEND4), 1234)
    client.sendto(b"hello", (VICTIM4, 7))
    assert server.recvfrom(64)[1] == (FRIEND4, 1234)
    mac = stage.own_mac
    inner = IP(src=VICTIM4, dst=FRIEND4) / UDP(sport=7, dport=1234)
    for frame in (
        Ether(src=mac, dst=HOST_MAC) / IP(src=FRIEND4, dst=VICTIM4) / UDP(sport=1234, dport=7) / b"injected",
        Ether(src=mac, dst=HOST_MAC) / IP(src=FRIEND4, dst=VICTIM4) / TCP(sport=1234, dport=7, flags="R"),
        Ether(src=mac, dst=HOST_MAC) / IP(src=FRIEND4, dst=VICTIM4) / ICMP(type=3, code=3) / inner,
        Ether(src=mac, dst=HOST_MAC)
        / IP(src=LIAR4, dst=VICTIM4, flags=1)
        / UDP(sport=1234, dport=7)
        / b"fragment",
    ):
        stage.send(frame)
    client.sendto(b"still the friend", (VICTIM4, 7))
    assert server.recvfrom(64) == (b"still the friend", (FRIEND4, 1234))


@pytest.mark.parametrize("kind", [1, 2])
def test_arp_changes_nobodys_mind(stage: Stage, kind: int) -> None:
    """Asking in another's name, or answering for it: victims, the gateway, the node, the world."""
    before = stage.neighbours()
    mac = stage.own_mac
    for claimed in (VICTIM4, FRIEND4, str(NODE4), str(WORLD4), "169.254.1.1"):
        for target in (str(NODE4), claimed, "169.254.1.1"):
            for ether in ("ff:ff:ff:ff:ff:ff", HOST_MAC):
                stage.send(Ether(src=mac, dst=ether) / ARP(op=kind, hwsrc=mac, psrc=claimed, pdst=target))
    time.sleep(0.1)
    kept = [line for line in stage.neighbours().splitlines() if line in before.splitlines()]
    assert kept == before.splitlines()
    assert stage.all_talk()


def test_neighbour_discovery_changes_nobodys_mind(stage: Stage) -> None:
    before = stage.neighbours()
    routes = stage.machine.sh("ip -6 route show")
    mac = stage.own_mac
    for source in (LIAR6, VICTIM6, "fe80::1"):
        for claimed in (VICTIM6, str(NODE6), str(WORLD6), "fe80::1"):
            head = Ether(src=mac, dst=HOST_MAC) / IPv6(src=source, dst=str(NODE6), hlim=255)
            stage.send(
                head / ICMPv6ND_NA(tgt=claimed, R=1, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac),
                head / ICMPv6ND_NA(tgt=claimed, R=1, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac),
                head / ICMPv6ND_NS(tgt=str(NODE6)) / ICMPv6NDOptSrcLLAddr(lladdr=mac),
                head / ICMPv6ND_RA(routerlifetime=1800) / ICMPv6NDOptSrcLLAddr(lladdr=mac),
            )
    time.sleep(0.1)
    kept = [line for line in stage.neighbours().splitlines() if line in before.splitlines()]
    assert kept == before.splitlines()
    assert stage.machine.sh("ip -6 route show") == routes
    assert stage.all_talk()


def test_pings_in_anothers_name_are_not_answered_to_it(stage: Stage) -> None:
    ear = Ear(stage.friend, "eth0")
    mac = stage.own_mac
    stage.send(
        Ether(src=mac, dst=HOST_MAC) / IP(src=FRIEND4, dst=VICTIM4) / ICMP() / b"reflected",
        Ether(src=mac, dst=HOST_MAC) / IPv6(src=FRIEND6, dst=VICTIM6) / ICMPv6EchoRequest(data=b"reflected"),
    )
    assert b"reflected" not in ear.heard()
    ear.close()


def test_the_world_cannot_speak_for_a_container(stage: Stage) -> None:
    """Neither for one of this node nor, past the tunnel, for one of others."""
    elsewhere = ip_address("10.0.99.99")
    stage.machine.do(stage.machine.policy.set_others, [(elsewhere, ("web",))])
    stage.machine.do(stage.machine.policy.set_surroundings, replace(AROUND, tunnelled_pools=POOLS))
    raw = stage.machine.world.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
    ear = Ear(stage.victim, "eth0")
    with raw:
        raw.bind(("up0", 0))
        for source, mark, passes in (
            (FRIEND4, b"as a friend", False),
            (str(elsewhere), b"as one of elsewhere", False),
            (str(WORLD4), b"as itself", True),
            (str(elsewhere), b"believed without a tunnel", True),
        ):
            if b"without" in mark:
                stage.machine.do(stage.machine.policy.set_surroundings, AROUND)
            frame = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01") / IP(src=source, dst=VICTIM4)
            raw.send(bytes(frame / UDP(sport=PORT, dport=PORT) / mark))
            assert (mark in ear.heard(mark if passes else b"")) == passes, source
    ear.close()


@pytest.mark.parametrize("target", ["192.0.2.255", "255.255.255.255", "224.0.0.1"])
def test_a_broadcast_of_a_container_reaches_nobody_on_its_node(stage: Stage, target: str) -> None:
    """The kernel gives those to every socket that listens on all addresses. Control: the node's own address."""
    listening = stage.machine.unbound(socket.AF_INET)
    listening.bind(("0.0.0.0", 0))
    port = listening.getsockname()[1]
    asking = stage.liar.udp(ip_address(LIAR4))
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    asking.sendto(b"to all", (target, port))
    asking.sendto(TRUTH, (str(NODE4), port))
    assert listening.recv(64) == TRUTH


ECHO, SMALL = 0x1234, 1290


def echo(source: str, target: str) -> Packet:
    if ":" in source:
        return IPv6(src=source, dst=target) / ICMPv6EchoRequest(id=ECHO, seq=1, data=b"x" * 1200)
    return IP(src=source, dst=target) / ICMP(type=8, id=ECHO, seq=1) / (b"x" * 1000)


def too_big(source: str, target: str) -> Packet:
    """Of ``source`` to ``target``, about the answer to an echo request that ``source`` sent."""
    if ":" in source:
        answer = IPv6(src=target, dst=source) / ICMPv6EchoReply(id=ECHO, seq=1, data=b"x" * 1200)
        return IPv6(src=source, dst=target) / ICMPv6PacketTooBig(mtu=SMALL) / Raw(bytes(answer)[:600])
    answer = IP(src=target, dst=source, flags="DF") / ICMP(type=0, id=ECHO, seq=1) / (b"x" * 1000)
    return IP(src=source, dst=target) / ICMP(type=3, code=4, nexthopmtu=SMALL) / Raw(bytes(answer)[:128])


@pytest.mark.parametrize(
    ("liar", "node", "world"),
    [(LIAR4, NODE4, WORLD4), (LIAR6, NODE6, WORLD6)],
    ids=["IPv4", "IPv6"],
)
def test_a_container_does_not_shrink_anybodys_path_to_its_node(
    stage: Stage, liar: str, node: object, world: object
) -> None:
    """Its echo request leaves with the node's address, and so would its error about the answer. Control: the node's own
    error about an answer to itself."""
    there = stage.machine.world

    def path() -> str:
        return there.sh(f"ip route get {node}")

    ether = Ether(src=stage.own_mac, dst=HOST_MAC)
    stage.send(ether / echo(liar, str(world)))
    time.sleep(QUIET)
    stage.send(ether / too_big(liar, str(world)))
    time.sleep(QUIET)
    assert "mtu" not in path()
    with stage.machine.do(socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("uplink", 0))
        frame = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / too_big(str(node), str(world))
        raw.send(bytes(frame))
    deadline = time.monotonic() + PATIENCE
    while f"mtu {SMALL}" not in path():
        assert time.monotonic() < deadline, path()
