"""Packets of moorage's tunnel, as somebody makes them who is no node."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable

from scapy.layers.inet import IP, UDP, IPOption_Router_Alert, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from isolator.drivers.routed_layout import HOST_MAC
from isolator.fabric.plan import VNI, VXLAN_DEVICE, VXLAN_PORT, mac_of
from moorage.lab import LabNode, Namespace
from moorage.lab.switch import MAC, UNDERLAY4, UNDERLAY6
from tests.cluster.attacking import mark
from tests.cluster.peers import PORT, Peer
from tests.system.conftest import eventually

_numbers = itertools.count(1)
_HOP_BY_HOP = IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))])
_DESTINATION = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])


def network(source: str, target: str) -> Packet:
    """The IP header of the family of both."""
    return (IPv6 if ":" in source else IP)(src=source, dst=target)


def tunnelled(sender: str, receiver: str, source: str, target: str, label: str) -> bytes:
    """A VXLAN header and a frame from one node's device to another's, with a marked UDP packet."""
    inner = (
        Ether(src=mac_of(sender), dst=mac_of(receiver))
        / network(source, target)
        / UDP(sport=4711, dport=PORT)
        / Raw(mark(label))
    )
    return bytes(VXLAN(vni=VNI, flags=8) / inner)


def from_container(peer: Peer, packet: Packet) -> bytes:
    """A frame as a container sends it to its node."""
    return bytes(Ether(src=peer.wire.mac, dst=HOST_MAC) / packet)


def on_underlay(sender: int, receiver: int, packet: Packet) -> bytes:
    """A frame between two hosts of the underlay, by their numbers."""
    return bytes(Ether(src=MAC.format(sender), dst=MAC.format(receiver)) / packet)


def outer(source: str, target: str, payload: bytes, port: int = VXLAN_PORT) -> Packet:
    """A UDP packet to a tunnel's port."""
    return network(source, target) / UDP(sport=40000, dport=port) / Raw(payload)


def underlay(host: int, family: int) -> str:
    """The address of a host of the underlay."""
    return (UNDERLAY4 if family == 4 else UNDERLAY6).format(host).split("/")[0]


def device_addresses(node: LabNode) -> dict[int, str]:
    """The node's own addresses on its VXLAN device, by family; waits for them."""

    def found() -> dict[int, str]:
        # Without the device ip fails, and prints nothing.
        printed = node.namespace.run("ip", "-j", "addr", "show", "dev", VXLAN_DEVICE, check=False).stdout
        shown = json.loads(printed or '[{"addr_info": []}]')
        families = {"inet": 4, "inet6": 6}
        return {
            families[address["family"]]: address["local"]
            for address in shown[0]["addr_info"]
            if address["scope"] == "global"
        }

    eventually(lambda: len(found()) == 2)
    return found()


def add_second_address(node: LabNode, among: list[Namespace]) -> dict[int, str]:
    """Addresses of the node that are on none of its underlay's interfaces, by family; the others know the way."""
    ips = {4: f"203.0.113.{node.host}", 6: f"2001:db8:113::{node.host}"}
    for family, ip in ips.items():
        node.namespace.run("ip", "address", "add", ip, "dev", "lo")
        for other in among:
            other.run("ip", f"-{family}", "route", "add", ip, "via", underlay(node.host, family))
    return ips


def _in_fragments(size: int) -> Callable[[Packet], list[Packet]]:
    """size: bytes of the payload of each but the last."""

    def cut(packet: Packet) -> list[Packet]:
        if IPv6 in packet:
            head = packet[IPv6].copy()
            head.remove_payload()
            whole = bytes(packet[UDP])
            number = next(_numbers)
            return [
                head
                / IPv6ExtHdrFragment(
                    id=number, nh=socket.IPPROTO_UDP, offset=at // 8, m=int(at + size < len(whole))
                )
                / Raw(whole[at : at + size])
                for at in range(0, len(whole), size)
            ]
        packet = packet.copy()
        packet[IP].id = next(_numbers) & 0xFFFF
        return list(fragment(packet, fragsize=size))

    return cut


def _with_headers(*headers: Packet) -> Callable[[Packet], list[Packet]]:
    """IPv6 extension headers before UDP."""

    def put(packet: Packet) -> list[Packet]:
        built = packet[IPv6].copy()
        built.remove_payload()
        for header in headers:
            built = built / header.copy()
        built.lastlayer().nh = socket.IPPROTO_UDP
        return [built / Raw(bytes(packet[UDP]))]

    return put


def _with_options(packet: Packet) -> list[Packet]:
    packet = packet.copy()
    packet[IP].options = [IPOption_Router_Alert()]
    return [packet]


def _without_checksum(packet: Packet) -> list[Packet]:
    packet = packet.copy()
    packet[UDP].chksum = 0
    return [packet]


def _from_the_port(packet: Packet) -> list[Packet]:
    packet = packet.copy()
    packet[UDP].sport = packet[UDP].dport
    return [packet]


def _last_first(packet: Packet) -> list[Packet]:
    return _in_fragments(64)(packet)[::-1]


Form = Callable[[Packet], list[Packet]]
"""From a UDP packet to the packets that are sent for it."""

FORMS: dict[str, Form] = {
    "one packet": lambda packet: [packet],
    "from the tunnel's port": _from_the_port,
    "in fragments": _in_fragments(64),
    "in fragments, the last first": _last_first,
    "in fragments of 8 bytes": _in_fragments(8),
}
FORMS4: dict[str, Form] = {
    **FORMS,
    "with IPv4 options": _with_options,
    "without a checksum": _without_checksum,
}
FORMS6: dict[str, Form] = {
    **FORMS,
    "as an atomic fragment": _in_fragments(1 << 12),
    "behind hop-by-hop options": _with_headers(_HOP_BY_HOP),
    "behind destination options": _with_headers(_DESTINATION),
    "behind both options": _with_headers(_HOP_BY_HOP, _DESTINATION),
}
