"""The typed values that cross the isolator's border: what an engine asks for, what it gets.

Nothing here knows a wire format; netmodules translates to and from these.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from ipam.keys import Family, IPNetwork
from ipam.netgroups import Netgroup
from ipam.next_hops import next_hop
from ipam.records import Label

IPAddress: TypeAlias = IPv4Address | IPv6Address

PROTOCOLS = ("tcp", "udp", "sctp")
"""What has ports that can be mapped."""


class EndpointKey(NamedTuple):
    """One interface of one container."""

    container_id: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.container_id}/{self.ifname}"


@dataclass(frozen=True, slots=True)
class Asked:
    """When a call left its caller, on the clock of one boot.

    boot_id: /proc/sys/kernel/random/boot_id of the caller.
    at: CLOCK_BOOTTIME, nanoseconds.
    """

    boot_id: str
    at: int


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the node that leads to one of the container.

    protocol: of PROTOCOLS. host_port, container_port: 1 to 65535.
    host_ip: the node's address that it holds for; None is every address of the node, the unspecified one of a
    family (``0.0.0.0``, ``::``) every address of that family. What ``can_be_mapped`` excludes is among none of these.
    """

    protocol: str
    host_port: int
    container_port: int
    host_ip: IPAddress | None = None

    def claims_the_same_as(self, other: PortMapping) -> bool:
        """Whether a packet to the node could be meant by both."""
        return (self.protocol, self.host_port) == (other.protocol, other.host_port) and _overlap(
            self.host_ip, other.host_ip
        )

    def covers(self, ip: IPAddress) -> bool:
        """Whether packets to this address of the node are meant."""
        return can_be_mapped(ip) and _overlap(self.host_ip, ip)

    def __str__(self) -> str:
        host = "" if self.host_ip is None else f" on {self.host_ip}"
        return f"{self.protocol} port {self.host_port}{host} to {self.container_port}"


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``rate`` bits per second, and ``burst`` bits at once; a burst of 0 is for the driver to choose."""

    rate: int
    burst: int = 0


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """ingress: of what goes to the container. egress: of what comes from it. None is no limit."""

    ingress: Limit | None = None
    egress: Limit | None = None

    def within(self, most: int) -> Bandwidth:
        """With ``most`` bits per second where no limit was asked for; 0 is none."""
        if not most:
            return self
        return Bandwidth(self.ingress or Limit(most), self.egress or Limit(most))


UNLIMITED = Bandwidth()


def can_be_mapped(ip: IPAddress) -> bool:
    """Whether a port of this address of a node can lead to a container.

    Linux does not forward packets from ::1 or from link-local IPv6 addresses, and others rarely go to those. It does
    from 127.0.0.0/8 (``route_localnet``).
    """
    return not ip.is_multicast and not (ip.version == 6 and (ip.is_loopback or ip.is_link_local))


def _overlap(one: IPAddress | None, other: IPAddress | None) -> bool:
    if one is None or other is None or one == other:
        return True
    return one.version == other.version and (one.is_unspecified or other.is_unspecified)


@dataclass(frozen=True, slots=True)
class AttachSpec:
    """An ADD, parsed and validated as far as that needs neither store nor kernel.

    ips: static addresses asked for, at most one a family; () lets IPAM choose.
    allocated: the endpoint's addresses are those and no others, and all of them are allocated (ipam/allocations.py).
    netgroups: () means the network's default.
    mtu: bytes; None lets the network or the underlay decide.
    port_mappings: no two of them claim the same port of the node.
    engine_network: what the engine itself calls the network, "" if that is not known.
    """

    key: EndpointKey
    request_id: str
    asked: Asked
    engine: str
    network: str
    netns: str
    ips: tuple[IPAddress, ...] = ()
    reservation: str | None = None
    netgroups: tuple[Netgroup, ...] = ()
    labels: tuple[Label, ...] = ()
    mac: str | None = None
    pool: str | None = None
    default_route: bool = False
    mtu: int | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = UNLIMITED
    engine_network: str = ""
    allocated: bool = False

    @property
    def who(self) -> str:
        """Who asks, for error messages."""
        return str(self.key)


@dataclass(frozen=True, slots=True)
class Work:
    """What an endpoint is for, as its engine says: ids of a framework and one of its tasks. app: "" if it has none."""

    framework: str
    task: str
    app: str = ""


class EndpointState(enum.StrEnum):
    """attaching -> attached -> detaching -> (gone).

    CONFLICT: the store gave its address to somebody else; it is cut off until it has the address again, or its DEL.
    MISSING: its interface was not there when the agent started, nor was any other's, and nobody has said whether its
    container has ended; it keeps its addresses (isolator/missing.py).
    """

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    CONFLICT = "conflict"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One interface of one container, as the journal knows it.

    ips: IPv4 before IPv6; one of each at most, unless they were allocated.
    host_ifname: the node's end, ``mrg`` + hash of the key.
    mac: the container end's MAC.
    since: wall clock, seconds, when the ADD was accepted.
    engine_network: as in AttachSpec; "" also if the ADD is older than the field.
    next_hop: number of the one inside its container (ipam/next_hops.py).
    pools: of its network, in the families of its addresses: what its container has routes to.
    lost: names of fields that nobody could say after the journal was lost; they hold defaults.
    """

    key: EndpointKey
    state: EndpointState
    request_id: str
    asked: Asked
    engine: str
    network: str
    driver: str
    netns: str
    ips: tuple[IPAddress, ...]
    host_ifname: str
    mac: str
    mtu: int
    netgroups: tuple[Netgroup, ...] = ()
    labels: tuple[Label, ...] = ()
    default_route: bool = False
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    since: float = 0.0
    port_mappings: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = UNLIMITED
    engine_network: str = ""
    next_hop: int = 1
    pools: tuple[IPNetwork, ...] = ()
    lost: tuple[str, ...] = ()

    def gateway(self, family: Family) -> IPAddress:
        """What its container sends packets of a family by."""
        return next_hop(self.next_hop, family)


@dataclass(frozen=True, slots=True)
class ValidAttachments:
    """All that an engine has on one of its networks; whatever else it had there is garbage.

    engine_network: what the engine calls the network; one network may be several of an engine's.
    asked: when it said so; of what was attached later it could not know.
    """

    engine: str
    engine_network: str
    keys: frozenset[EndpointKey]
    asked: Asked

    def lacks(self, endpoint: Endpoint) -> bool:
        """Whether it is the engine's, on that very network, and not among what it has."""
        return (
            (endpoint.engine, endpoint.engine_network) == (self.engine, self.engine_network)
            and endpoint.asked.boot_id == self.asked.boot_id
            and endpoint.key not in self.keys
        )
