"""A container does not change what nodes believe of the path to each other; true errors arrive where they should."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.vxlan import VXLAN

from isolator.fabric.plan import VNI, VXLAN_PORT
from moorage.lab import Lab, Namespace
from moorage.lab.switch import UPLINK
from tests.cluster.attacking import STRANGER, Tally, Wire, stranger, udp_socket
from tests.cluster.icmp import MTU, TOO_BIG, Flow, error, open_flow
from tests.cluster.peers import Peer, create_networks, peers
from tests.cluster.tunnel import from_container, on_underlay, underlay
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)
REPEAT = 2
EVIL = {
    "red": ("vx", "red", "cni"),
    "public": ("vx", "public", "cni"),
    "hostgw": ("hg", "red", "cni"),
    "open": ("op", "red", "cni"),
    "net-modules": ("vx", "red", "net-modules"),
}
"""Attackers on n1: network, netgroup, engine."""
CLOSED = 9
"""A UDP port that nobody listens on."""
LOW = 1300
"""Bytes: the MTU of a link behind the router."""
BEHIND = {4: "192.0.2.9", 6: "2001:db8:2::9"}
_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_MTU = {4: (socket.IPPROTO_IP, 14), 6: (socket.IPPROTO_IPV6, 24)}
_DO = 2
"""linux/in.h and in6.h: IP_MTU_DISCOVER, IP_MTU, IP_PMTUDISC_DO."""


@dataclass
class Scene:
    """peers: blue ones by fabric and node. between: a UDP flow of the nodes' own processes, by node and family."""

    lab: Lab
    evil: dict[str, Peer]
    peers: dict[tuple[str, int], Peer]
    between: dict[tuple[int, int], Flow]
    router: Namespace


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=2))
        lab.start()
        create_networks(lab.nodes[0], "vx", "hg", "op")
        router = stack.enter_context(stranger(lab))
        make_router(router)
        join = stack.enter_context(peers(lab))
        blue = {
            (network, number): join(lab.nodes[number - 1], network, "blue")
            for network in ("vx", "hg")
            for number in (1, 2)
        }
        evil = {
            name: join(lab.nodes[0], network, netgroup, engine=engine)
            for name, (network, netgroup, engine) in EVIL.items()
        }
        between = {
            (one, family): open_flow(
                lab.nodes[one - 1].namespace, underlay(one, family),
                lab.nodes[2 - one].namespace, underlay(3 - one, family),
            )
            for one in (1, 2)
            for family in FAMILIES
        }  # fmt: skip
        for node in lab.nodes:
            for family in FAMILIES:
                node.namespace.run(
                    "ip", f"-{family}", "route", "add", BEHIND[family], "via", underlay(STRANGER, family)
                )
        yield Scene(lab, evil, blue, between, router)


def make_router(namespace: Namespace) -> None:
    """It forwards to a link with a small MTU."""
    namespace.run(
        "sh", "-ec",
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\n"
        f"ip link add low mtu {LOW} type veth peer name behind mtu {LOW}\n"
        "ip link set low up; ip link set behind up\n"
        f"ip route add {BEHIND[4]} dev low; ip -6 route add {BEHIND[6]} dev low",
    )  # fmt: skip


def path_mtu(scene: Scene, node: int, other: int, family: int) -> int:
    """What a node believes of the path to another; 0 if nothing else than its link."""
    said = scene.lab.nodes[node - 1].namespace.run("ip", "route", "get", underlay(other, family)).stdout
    words = said.split()
    return int(words[words.index("mtu") + 1]) if "mtu" in words else 0


def forget_paths(scene: Scene) -> None:
    for node in scene.lab.nodes:
        for family in FAMILIES:
            node.namespace.run("ip", f"-{family}", "route", "flush", "cache")


@pytest.mark.parametrize("who", EVIL)
@pytest.mark.parametrize(("about", "family"), [("a process", 4), ("a process", 6), ("the tunnel", 4)])
def test_a_container_changes_no_nodes_path_mtu(
    scene: Scene, tally: Tally, about: str, who: str, family: int
) -> None:
    """The control is the same error from a router on the underlay. The lab's tunnels run over IPv4."""
    evil = scene.evil[who]
    header = bytes(VXLAN(vni=VNI, flags=8)) + bytes(64)
    frames, controls = [], []
    for node, other in ((1, 2), (2, 1)):
        flow = scene.between[node, family]
        if about == "the tunnel":
            flow = Flow(underlay(node, family), 54321, underlay(other, family), VXLAN_PORT)
        packet = error(TOO_BIG, evil.ips[family], flow.source, flow, "too big", header)
        frames.append(from_container(evil, packet))
        packet = error(TOO_BIG, underlay(STRANGER, family), flow.source, flow, "truth", header)
        controls.append(on_underlay(STRANGER, node, packet))
    forget_paths(scene)
    for _ in range(REPEAT):
        evil.wire.send(*frames)
    found = {(node, other): path_mtu(scene, node, other, family) for node, other in ((1, 2), (2, 1))}
    forget_paths(scene)
    with contextlib.closing(Wire(scene.router, UPLINK)) as wire:
        wire.send(*controls)
    for node, other in ((1, 2), (2, 1)):
        eventually(lambda node=node, other=other: path_mtu(scene, node, other, family) == MTU[family])
    forget_paths(scene)
    lowered = [pair for pair, mtu in found.items() if mtu]
    tally.note(f"2: path MTU of nodes, about {about}", family, who, REPEAT * len(frames), len(lowered))
    assert lowered == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("network", ["vx", "hg"])
@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 1)])
def test_who_calls_a_closed_port_of_a_container_of_its_netgroup_is_told(
    scene: Scene, network: str, one: int, other: int, family: int
) -> None:
    source, target = scene.peers[network, one], scene.peers[network, other]
    assert is_refused(source.namespace, target.ips[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_who_calls_a_closed_port_is_told_between_nodes_and_containers(scene: Scene, family: int) -> None:
    """A container of its own node and of another, a node of its own container and of another's."""
    for who in ("red", "hostgw", "net-modules"):
        evil = scene.evil[who]
        for node in scene.lab.nodes:
            assert is_refused(evil.namespace, underlay(node.host, family)), f"{who} calls {node.name}"
            assert is_refused(node.namespace, evil.ips[family]), f"{node.name} calls {who}"


def is_refused(source: Namespace, target: str) -> bool:
    """Whether the caller of a closed UDP port learns of it."""
    with udp_socket(source, 6 if ":" in target else 4) as sock:
        sock.connect((target, CLOSED))
        sock.settimeout(1)
        for _ in range(int(PATIENCE)):
            try:
                sock.send(b"anybody?")
                sock.recv(64)
            except ConnectionRefusedError:
                return True
            except TimeoutError:
                continue
    return False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["red", "hostgw", "public", "net-modules"])
def test_a_smaller_mtu_on_the_way_is_told(scene: Scene, who: str, family: int) -> None:
    """By a router of the world, through the node's masquerading."""
    evil = scene.evil[who]
    with udp_socket(evil.namespace, family) as sock:
        sock.setsockopt(*_DISCOVER[family], _DO)
        # Routes of a container's interface are looked up by source; so is what is remembered of a path.
        sock.bind((evil.ips[family], 0))
        sock.connect((BEHIND[family], CLOSED))

        def told() -> bool:
            with contextlib.suppress(OSError):
                sock.send(bytes(LOW + 50))
            return sock.getsockopt(*_MTU[family]) == LOW

        eventually(told)
