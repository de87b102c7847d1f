"""ICMP errors as attackers make them: every type, about packets of flows that are there."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6ND_Redirect,
    ICMPv6NDOptRedirectedHdr,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
)
from scapy.packet import Packet, Raw

from moorage.lab import Namespace
from tests.cluster.attacking import inside, mark
from tests.cluster.tunnel import network
from tests.patience import PATIENCE

MTU = {4: 576, 6: 1280}
"""The smallest that a path may have."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A UDP flow. sockets: of both ends, which keep it."""

    source: str
    source_port: int
    target: str
    target_port: int
    sockets: tuple[socket.socket, ...] = ()

    def back(self) -> Flow:
        """The other direction."""
        return Flow(self.target, self.target_port, self.source, self.source_port, self.sockets)


def open_flow(source: Namespace, source_ip: str, target: Namespace, target_ip: str) -> Flow:
    """A datagram there and one back; waits until it came about, since other nodes may not know of an address yet."""
    calling, called = _bound(source, source_ip), _bound(target, target_ip)
    calling.settimeout(0.2)
    for _ in range(int(PATIENCE / 0.2)):
        try:
            calling.sendto(b"hello", called.getsockname()[:2])
            called.settimeout(0.2)
            _, seen = called.recvfrom(64)
            called.sendto(b"hello", seen)
            calling.recv(64)
        except OSError:
            continue
        return Flow(*calling.getsockname()[:2], *called.getsockname()[:2], sockets=(calling, called))
    raise AssertionError(f"no flow from {source_ip} to {target_ip}")


def _bound(namespace: Namespace, ip: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    made = inside(namespace, lambda: socket.socket(family, socket.SOCK_DGRAM))
    made.bind((ip, 0))
    return made


Error = Callable[[Packet, Packet], Packet]
"""From the outer header and the quoted packet to the whole."""


def quoted(flow: Flow, payload: bytes) -> Packet:
    """A packet of a flow, as an error quotes it."""
    return (
        network(flow.source, flow.target) / UDP(sport=flow.source_port, dport=flow.target_port) / Raw(payload)
    )


def error(kind: str, source: str, target: str, flow: Flow, label: str, payload: bytes = b"") -> Packet:
    """An error from source to target about a packet of a flow that carries a mark. payload: before the mark."""
    family = 6 if ":" in source else 4
    return ERRORS[family][kind](network(source, target), quoted(flow, payload + mark(label)))


def _icmp(type: int, code: int, **more: object) -> Error:
    return lambda outer, inner: outer / ICMP(type=type, code=code, **more) / inner


def _icmp6(header: Packet) -> Error:
    return lambda outer, inner: outer / header.copy() / inner


def _redirect6(outer: Packet, inner: Packet) -> Packet:
    outer.hlim = 255
    return outer / ICMPv6ND_Redirect(tgt="fd98::150", dst=inner.dst) / ICMPv6NDOptRedirectedHdr(pkt=inner)


TOO_BIG = "too big"

ERRORS: dict[int, dict[str, Error]] = {
    4: {
        TOO_BIG: _icmp(3, 4, nexthopmtu=MTU[4]),
        "net unreachable": _icmp(3, 0),
        "host unreachable": _icmp(3, 1),
        "protocol unreachable": _icmp(3, 2),
        "port unreachable": _icmp(3, 3),
        "prohibited": _icmp(3, 13),
        "source quench": _icmp(4, 0),
        "redirect": _icmp(5, 1, gw="198.18.0.150"),
        "time exceeded": _icmp(11, 0),
        "reassembly time exceeded": _icmp(11, 1),
        "parameter problem": _icmp(12, 0),
    },
    6: {
        TOO_BIG: _icmp6(ICMPv6PacketTooBig(mtu=MTU[6])),
        "no route": _icmp6(ICMPv6DestUnreach(code=0)),
        "prohibited": _icmp6(ICMPv6DestUnreach(code=1)),
        "address unreachable": _icmp6(ICMPv6DestUnreach(code=3)),
        "port unreachable": _icmp6(ICMPv6DestUnreach(code=4)),
        "time exceeded": _icmp6(ICMPv6TimeExceeded(code=0)),
        "reassembly time exceeded": _icmp6(ICMPv6TimeExceeded(code=1)),
        "parameter problem": _icmp6(ICMPv6ParamProblem(code=0)),
        "redirect": _redirect6,
    },
}
