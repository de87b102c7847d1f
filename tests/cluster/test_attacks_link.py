"""What a container sends below IP, or to everybody on its link, changes nothing on its node and reaches nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.igmp import IGMP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6MLDone,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from isolator.drivers.routed_layout import HOST_MAC
from isolator.fabric.plan import VNI, VXLAN_DEVICE, VXLAN_PORT, mac_of
from moorage.lab import Lab, LabNode, Namespace
from moorage.lab.switch import MAC, UPLINK
from tests.cluster.attacking import (
    STRANGER,
    Hears,
    IcmpListener,
    Listener,
    Shot,
    Tally,
    Wire,
    fire,
    mark,
    stranger,
    udp_socket,
)
from tests.cluster.peers import PORT, Peer, create_networks, peers
from tests.cluster.tunnel import from_container, network, on_underlay, underlay
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)
GROUP4, GROUP6 = "239.255.7.7", "ff02::7777"
EVERYBODY = "ff:ff:ff:ff:ff:ff"
MADE_UP = 200
EVIL = {"vxlan": ("vx", "cni"), "hostgw": ("hg", "cni"), "net-modules": ("vx", "net-modules")}


@dataclass
class Scene:
    """All on n1 but ``far``. links: of attackers, on n1. public: by network."""

    lab: Lab
    evil: dict[str, Peer]
    links: dict[str, str]
    friend: Peer
    blue: Peer
    public: dict[str, Peer]
    service: Listener
    stack: IcmpListener
    outsider: Namespace
    world: Wire

    @property
    def ears(self) -> list[Hears]:
        containers = (self.friend, self.blue, *self.public.values())
        return [*(peer.ear for peer in containers), self.service, self.stack]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=2))
        lab.start()
        n1 = lab.nodes[0]
        create_networks(n1, "vx", "hg")
        outsider = stack.enter_context(stranger(lab))
        join = stack.enter_context(peers(lab))
        evil = {who: join(n1, net, "red", engine=engine) for who, (net, engine) in EVIL.items()}
        links = {who: link_of(n1, peer) for who, peer in evil.items()}
        friend, blue = join(n1, "vx", "red"), join(n1, "vx", "blue")
        public = {net: join(n1, net, "public") for net in ("vx", "hg")}
        service, raw = Listener(n1.namespace, PORT), IcmpListener(n1.namespace)
        for link in (*links.values(), UPLINK):
            join_groups(n1, service.socket, link)
        world = Wire(outsider, UPLINK)
        for each in (service, raw, world):
            stack.callback(each.close)
        yield Scene(lab, evil, links, friend, blue, public, service, raw, outsider, world)


def link_of(node: LabNode, peer: Peer) -> str:
    """The node's end of a container's link."""
    (route,) = json.loads(node.namespace.run("ip", "-j", "route", "show", peer.ips[4]).stdout)
    return str(route["dev"])


def join_groups(node: LabNode, sock: socket.socket, link: str) -> None:
    """A listener of both families joins the groups on a link."""
    (shown,) = json.loads(node.namespace.run("ip", "-j", "link", "show", link).stdout)
    index = shown["ifindex"]
    ipv4 = socket.inet_aton(GROUP4) + bytes(4) + struct.pack("@i", index)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, ipv4)
    ipv6 = socket.inet_pton(socket.AF_INET6, GROUP6) + struct.pack("@I", index)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, ipv6)


def neighbours(node: LabNode, link: str) -> dict[str, str]:
    """What the node believes on a link, in whichever state: address -> MAC, "" without one."""
    shown = [
        entry
        for family in FAMILIES
        for entry in json.loads(
            node.namespace.run("ip", f"-{family}", "-j", "neigh", "show", "dev", link, "nud", "all").stdout
        )
    ]
    return {e["dst"]: e.get("lladdr", "") for e in shown if "NOARP" not in e["state"]}


def made_up(count: int) -> list[str]:
    """Addresses that nobody has."""
    return [f"198.18.0.{100 + n}" if n < 40 else f"10.99.{n // 200}.{n % 200 + 1}" for n in range(count)]


def arps(op: int, sender: str, claimed: str, asked: str, to: str = EVERYBODY) -> bytes:
    return bytes(Ether(src=sender, dst=to) / ARP(op=op, hwsrc=sender, psrc=claimed, pdst=asked))


@pytest.mark.parametrize("who", EVIL)
@pytest.mark.parametrize("kind", ["requests", "replies", "gratuitous"])
def test_arp_of_a_container_enters_nothing_in_its_nodes_neighbour_table(
    scene: Scene, tally: Tally, kind: str, who: str
) -> None:
    """The control is such a request from the underlay."""
    n1, evil, link = scene.lab.nodes[0], scene.evil[who], scene.links[who]
    before = neighbours(n1, link)
    elsewhere = neighbours(n1, UPLINK).keys()
    for claimed in [*made_up(MADE_UP), scene.blue.ips[4], n1.ip]:
        asked = claimed if kind == "gratuitous" else n1.ip
        op = 2 if kind == "replies" else 1
        evil.wire.send(
            arps(op, evil.wire.mac, claimed, asked), arps(op, evil.wire.mac, claimed, asked, HOST_MAC)
        )
    stray = f"198.18.0.{90 + list(EVIL).index(who)}"
    scene.world.send(arps(1, MAC.format(STRANGER), stray, n1.ip))
    eventually(lambda: stray in neighbours(n1, UPLINK))
    after = neighbours(n1, link)
    gained = {ip: mac for ip, mac in after.items() if before.get(ip) != mac}
    strays = [ip for ip in neighbours(n1, UPLINK) if ip in made_up(MADE_UP) and ip not in elsewhere]
    tally.note(f"3: ARP {kind} with made-up senders, entries", 4, who, 2 * MADE_UP, len(gained))
    assert (after, strays) == (before, []), f"{len(gained)} entries"


@pytest.mark.parametrize("who", EVIL)
def test_neighbour_discovery_of_a_container_enters_nothing(scene: Scene, tally: Tally, who: str) -> None:
    n1, evil, link = scene.lab.nodes[0], scene.evil[who], scene.links[who]
    before, routes = neighbours(n1, link), n1.namespace.run("ip", "-6", "route").stdout
    sent = 0
    for number in range(MADE_UP // 10):
        claimed = f"fd98::dead:{number:x}"
        for source, target in ((claimed, underlay(1, 6)), (evil.ips[6], "fe80::1"), ("fe80::9", claimed)):
            for to in (HOST_MAC, "33:33:00:00:00:01"):
                head = Ether(src=evil.wire.mac, dst=to) / IPv6(src=source, dst=underlay(1, 6), hlim=255)
                solicited = ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=evil.wire.mac)
                told = ICMPv6ND_NA(tgt=claimed, R=1, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=evil.wire.mac)
                evil.wire.send(bytes(head / solicited), bytes(head / told))
                sent += 2
    after = neighbours(n1, link)
    tally.note("3: NS and NA with made-up addresses, entries", 6, who, sent, len(after) - len(before))
    assert after == before
    assert n1.namespace.run("ip", "-6", "route").stdout == routes


def test_arp_out_of_the_tunnel_enters_nothing(scene: Scene, tally: Tally) -> None:
    """A node writes it, whom the tunnel lets in; the control is its datagram to a service of the other."""
    n1, n2 = scene.lab.nodes
    before = neighbours(n1, VXLAN_DEVICE)
    (own,) = [
        a["local"]
        for a in json.loads(n1.namespace.run("ip", "-j", "-4", "addr", "show", VXLAN_DEVICE).stdout)[0][
            "addr_info"
        ]
    ]
    with udp_socket(n2.namespace, 4) as sock:

        def write(frame: Packet) -> None:
            sock.sendto(bytes(VXLAN(vni=VNI, flags=8) / frame), (n1.ip, VXLAN_PORT))

        for op in (1, 2):
            for claimed in made_up(MADE_UP):
                for to in (mac_of("n1"), EVERYBODY):
                    arp = ARP(op=op, hwsrc=mac_of("n2"), psrc=claimed, pdst=own)
                    write(Ether(src=mac_of("n2"), dst=to) / arp)
        control = (
            Ether(src=mac_of("n2"), dst=mac_of("n1"))
            / network(n2.ip, own)
            / UDP(sport=1, dport=PORT)
            / Raw(mark("truth"))
        )
        fire([], [Shot("truth", lambda: write(control))], [scene.service])
    after = neighbours(n1, VXLAN_DEVICE)
    gained = len(after.keys() - before.keys())
    tally.note("3: ARP out of the tunnel, entries", 4, "vxlan", 4 * MADE_UP, gained)
    assert after == before


def odd_frames(scene: Scene, who: str) -> dict[str, Packet]:
    """Label -> frame. Forged ones claim the blue container's address."""
    evil, blue, friend = scene.evil[who], scene.blue, scene.friend
    mac = evil.wire.mac
    found: dict[str, Packet] = {}

    def put(name: str, *layers: Packet, to: str = HOST_MAC) -> None:
        frame: Packet = Ether(src=mac, dst=to)
        for layer in layers:
            frame = frame / layer
        found[name] = frame / Raw(mark(name))

    tags = {
        "802.1Q": Dot1Q(vlan=5),
        "priority tag": Dot1Q(vlan=0, prio=5),
        "802.1ad": Dot1AD(vlan=5) / Dot1Q(vlan=5),
        "802.1ad priority": Dot1AD(vlan=0) / Dot1Q(vlan=0),
    }
    udp = UDP(sport=PORT, dport=PORT)
    for family in FAMILIES:
        node = underlay(1, family)
        for name, tag in tags.items():
            for target in (friend.ips[family], blue.ips[family], node):
                put(f"{name} forged to {target}", tag, network(blue.ips[family], target), udp)
    for kind, ethertype in (
        ("LLDP", 0x88CC),
        ("unknown EtherType", 0x88B5),
        ("PPPoE", 0x8864),
        ("MPLS", 0x8847),
    ):
        for to in (EVERYBODY, "01:80:c2:00:00:0e", HOST_MAC):
            found[f"{kind} {to}"] = Ether(src=mac, dst=to, type=ethertype) / Raw(mark(f"{kind} {to}"))
    for source in (evil.ips[4], blue.ips[4], "0.0.0.0"):
        for target, to in (
            (GROUP4, "01:00:5e:7f:07:07"), (GROUP4, HOST_MAC),
            ("255.255.255.255", EVERYBODY), ("224.0.0.1", "01:00:5e:00:00:01"),
        ):  # fmt: skip
            put(f"IPv4 {source} to {target} {to}", IP(src=source, dst=target, ttl=4), udp, to=to)
        for number in (0x11, 0x12, 0x16, 0x17):
            igmp = IGMP(type=number, gaddr=GROUP4 if number != 0x11 else "0.0.0.0")
            put(f"IGMP {number:x} from {source}", IP(src=source, dst="224.0.0.1", ttl=1, proto=2), igmp)
    link_local = "fe80::9"
    for source in (evil.ips[6], link_local):
        for target, to in (
            (GROUP6, "33:33:00:00:77:77"),
            (GROUP6, HOST_MAC),
            ("ff02::1", "33:33:00:00:00:01"),
        ):
            put(f"IPv6 {source} to {target} {to}", IPv6(src=source, dst=target, hlim=4), udp, to=to)
        for name, message in (
            ("MLD query", ICMPv6MLQuery()), ("MLD report", ICMPv6MLReport(mladdr=GROUP6)),
            ("MLD done", ICMPv6MLDone(mladdr=GROUP6)), ("router advertisement", ICMPv6ND_RA(routerlifetime=1800)),
            ("redirect", ICMPv6ND_Redirect(tgt=link_local, dst=underlay(2, 6))),
        ):  # fmt: skip
            for target, to in (("ff02::1", "33:33:00:00:00:01"), (underlay(1, 6), HOST_MAC)):
                put(f"{name} {source} {target}", IPv6(src=source, dst=target, hlim=255), message, to=to)
    return found


@pytest.mark.parametrize("who", EVIL)
def test_nothing_but_plain_packets_of_a_container_gets_anywhere(scene: Scene, tally: Tally, who: str) -> None:
    """The controls: a plain datagram to a friend, another to the node, and a group's from the underlay."""
    n1, evil, link = scene.lab.nodes[0], scene.evil[who], scene.links[who]
    before = neighbours(n1, link)
    shots = [
        Shot(label, lambda frame=frame: evil.wire.send(frame))
        for label, frame in ((label, bytes(frame)) for label, frame in odd_frames(scene, who).items())
    ]
    udp = UDP(sport=PORT, dport=PORT)
    group = (
        Ether(src=MAC.format(STRANGER), dst="01:00:5e:7f:07:07")
        / network(underlay(STRANGER, 4), GROUP4)
        / udp
    )
    control = {
        f"truth {target}": from_container(
            evil, network(evil.ips[4], target) / udp / Raw(mark(f"truth {target}"))
        )
        for target in (scene.friend.ips[4], n1.ip)
    }
    truths = [Shot(label, lambda frame=frame: evil.wire.send(frame)) for label, frame in control.items()]
    groups = bytes(group / Raw(mark("truth group")))
    truths.append(Shot("truth group", lambda: scene.world.send(groups)))
    result = fire(shots, truths, scene.ears)
    tally.judge("3: tags, EtherTypes, multicast, IGMP, MLD, RA, redirects", "both", who, result)
    assert neighbours(n1, link) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vx", "hg"])
def test_the_world_does_not_speak_for_an_unused_address_of_a_nodes_own_block(
    scene: Scene, tally: Tally, name: str, family: int
) -> None:
    """It calls a public container; the control is the same packet from the world's own address."""
    public = scene.public[name]
    claimed = unused(scene.lab.nodes[0], public.ips[family])
    frames = {
        label: on_underlay(
            STRANGER, 1, network(source, public.ips[family]) / UDP(sport=PORT, dport=PORT) / Raw(mark(label))
        )
        for label, source in (("unused", claimed), ("truth", underlay(STRANGER, family)))
    }
    shots = {
        label: Shot(label, lambda frame=frame: scene.world.send(frame)) for label, frame in frames.items()
    }
    result = fire([shots["unused"]], [shots["truth"]], [public.ear])
    tally.judge("3: the world claims an unused address (B24)", family, name, result)


def unused(node: LabNode, near: str) -> str:
    """An address of the same block as ``near`` that no container has."""
    (block,) = [
        ip_network(row["block"])
        for row in node.ask("block", "list")
        if ip_address(near) in ip_network(row["block"])
    ]
    taken = {row["address"] for row in node.ask("ip", "list", "--state", "assigned")}
    return next(str(ip) for ip in list(block)[::-1] if str(ip) not in taken)
