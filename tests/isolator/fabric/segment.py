"""Nodes on one segment, each a room whose kernel a fabric works on; no agents, no store.

    n1 192.0.2.1, 2001:db8::1  ---+
    n2 192.0.2.2, 2001:db8::2  ---+--- a bridge
    n3 ...                     ---+

Node ``i`` has the blocks 10.64.i.0/26 and fd64::i00/122, and .5 and ::5 of them as its own.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from typing import Self

from ipam.keys import IPNetwork
from ipam.records import Node
from isolator.fabric.device import DeviceSpec
from isolator.fabric.kernel import FabricKernel
from isolator.fabric.plan import (
    OVERHEAD,
    SECOND_DEVICE,
    VXLAN_DEVICE,
    Here,
    Piece,
    Plan,
    at_home,
    mac_of,
    parse_peer,
    towards,
)
from isolator.model import IPAddress
from tests.isolator.rooms import Room

LINK = "up0"


class Place(Room):
    """One node. families: of its underlay."""

    def __init__(self, number: int, families: Collection[int] = (4, 6)) -> None:
        super().__init__(f"n{number}")
        self.node = f"n{number}"
        self.number = number
        self.underlay: list[IPAddress] = [
            ip_address(text)
            for family, text in ((4, f"192.0.2.{number}"), (6, f"2001:db8::{number}"))
            if family in families
        ]
        self.blocks: list[IPNetwork] = [
            ip_network(f"10.64.{number}.0/26"),
            ip_network(f"fd64::{number}00/122"),
        ]
        self.ips: list[IPAddress] = [ip_address(f"10.64.{number}.5"), ip_address(f"fd64::{number}05")]

    def __enter__(self) -> Self:
        super().__enter__()
        self.kernel = self.do(FabricKernel)
        return self

    def __exit__(self, *exc: object) -> None:
        self.kernel.close()
        super().__exit__(None, None, None)

    @property
    def record(self) -> Node:
        underlay = [str(ip) for ip in self.underlay]
        return Node(name=self.node, version="1", underlay=underlay, mac=mac_of(self.node), vxlan_port=4789)

    @property
    def names(self) -> list[str]:
        """What its VXLAN devices are called, in the order of its underlay addresses."""
        return [VXLAN_DEVICE if n == 0 else SECOND_DEVICE[ip.version] for n, ip in enumerate(self.underlay)]

    def device(self, name: str) -> DeviceSpec:
        local = self.underlay[self.names.index(name)]
        ips = tuple(self.ips) if name == VXLAN_DEVICE else ()
        return DeviceSpec(mac_of(self.node), local, 4789, 1500 - OVERHEAD[local.version], ips, name)

    def plan(self, fabric: str, *others: Place) -> Plan:
        """What leads to the others, and this node's own blocks. Nothing of it may be a problem."""
        tunnelled = fabric == "vxlan"
        families = tuple(ip.version for ip in self.underlay)
        here = Here(
            self.node,
            families,
            devices={family: name for family, name in zip(families, self.names, strict=False) if tunnelled},
            link=LINK,
            sources={ip.version: ip for ip in self.ips} if tunnelled else {},
        )
        whole = at_home([Piece(block, fabric) for block in self.blocks])
        for other in others:
            plan, problems = towards(parse_peer(other.record), [Piece(b, fabric) for b in other.blocks], here)
            assert problems == []
            whole.add(plan)
        return whole

    def reaches(self, ip: IPAddress, source: IPAddress | None = None) -> bool:
        bound = f"-I {source}" if source is not None else ""
        return " 0% packet loss" in self.sh(f"ping -n -c 1 -W 3 {bound} {ip} || true")


class Segment(ExitStack):
    """Places on one bridge, each with an underlay of the families that are listed for it. A context manager."""

    def __init__(self, *families: Collection[int]) -> None:
        super().__init__()
        self._families = families

    def __enter__(self) -> Self:
        super().__enter__()
        self.switch = self.enter_context(Room("switch"))
        self.switch.sh("ip link add br0 type bridge; ip link set br0 up")
        self.places = [self.enter_context(Place(n, of)) for n, of in enumerate(self._families, start=1)]
        for place in self.places:
            self._plug(place)
        return self

    def _plug(self, place: Place) -> None:
        self.switch.sh(f"ip link add p{place.number} type veth peer name {LINK} netns {place.name}")
        self.switch.sh(f"ip link set p{place.number} master br0 up")
        for ip in place.underlay:
            length, nodad = ("24", "") if ip.version == 4 else ("64", "nodad")
            place.sh(f"ip address add {ip}/{length} dev {LINK} {nodad}")
        for ip in place.ips:
            place.sh(f"ip address add {ip} dev lo")
        place.sh(f"ip link set {LINK} up")
        for ip in place.ips:
            if ip.version == 6:
                place.delivers(str(ip))
