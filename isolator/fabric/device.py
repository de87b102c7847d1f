"""A VXLAN device of this node: one for all networks and for each family that tunnels run over, its MAC pinned, learning
nothing. What the kernel refuses of it stops nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address

from ipam.keys import IPAddress
from isolator import sysctl
from isolator.errors import KernelRefused
from isolator.fabric.plan import VNI, VXLAN_DEVICE
from isolator.netlink import codec, messages
from isolator.netlink.codec import Request
from isolator.netlink.node import Node


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What the device has to be. local: what its packets come from. port: UDP. mtu: bytes.

    addresses: for the node's own packets to other nodes' containers, at most one a family. name: the link's.
    """

    mac: str
    local: IPAddress
    port: int
    mtu: int
    addresses: tuple[IPAddress, ...] = ()
    name: str = VXLAN_DEVICE


@dataclass(frozen=True, slots=True)
class Made:
    """What there is now. index: the link's. addresses: of the wanted ones, those that it has. refused: by the kernel.

    new: whether it has none of the routes and tunnels that it may have had.
    """

    index: int
    new: bool
    addresses: tuple[IPAddress, ...]
    refused: tuple[KernelRefused, ...] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    """The link of the device's name, whatever it is.

    arp: whether it speaks ARP. local: None if it is no VXLAN device.
    """

    index: int
    up: bool
    mac: str
    mtu: int
    arp: bool = True
    kind: str = ""
    vni: int = 0
    port: int = 0
    learning: bool = True
    local: IPAddress | None = None


def ensure_device(node: Node, spec: DeviceSpec) -> Made:
    """Make the device what it has to be.

    One that spoke ARP has lost its neighbours with that, and counts as new. Raises KernelRefused if there is none.
    """
    found = _find(node, spec.name)
    new = found is None or not _can_become(found, spec)
    if new:
        node.route.execute(
            [
                messages.delete_link(spec.name),
                messages.create_vxlan(
                    name=spec.name, mac=spec.mac, vni=VNI, port=spec.port, local=spec.local, mtu=spec.mtu
                ),
            ]
        )
        found = _find(node, spec.name)
    if found is None:
        raise KernelRefused(f"the device {spec.name} was deleted while it was made; it is made again")
    refused = node.route.attempt(_adjustments(found, spec))
    try:
        # Hosts turn IPv6 off for new links; here next hops are IPv6 ones in both families.
        sysctl.ensure(f"net/ipv6/conf/{spec.name}/disable_ipv6", "0")
        sysctl.ensure(f"net/ipv4/conf/{spec.name}/forwarding", "1")
    except KernelRefused as error:
        refused.append(error)
    addresses, refused_addresses = _ensure_addresses(node, found.index, spec)
    return Made(found.index, new or found.arp, addresses, (*refused, *refused_addresses))


def remove_device(node: Node, name: str) -> bool:
    """Delete a device; whether there was one. Raises KernelRefused."""
    if _find(node, name) is None:
        return False
    node.route.execute([messages.delete_link(name)])
    return True


def _can_become(found: _Found, spec: DeviceSpec) -> bool:
    return (
        (found.kind, found.vni, found.port, found.learning) == ("vxlan", VNI, spec.port, False)
        and found.local is not None
        and found.local.version == spec.local.version
    )


def _adjustments(found: _Found, spec: DeviceSpec) -> list[Request]:
    todo = []
    if found.local != spec.local:
        todo.append(messages.set_vxlan_local(found.index, spec.name, spec.local))
    if found.mac != spec.mac:  # udev's MACAddressPolicy, for one
        todo.append(messages.set_mac(found.index, spec.name, spec.mac))
    if found.mtu != spec.mtu:
        todo.append(messages.set_mtu(found.index, spec.name, spec.mtu))
    if not found.up:
        todo.append(messages.no_link_local(found.index, spec.name))
    if not found.up or found.arp:
        # All that it needs to know of its neighbours is told by us; whoever can send into the tunnel tells it nothing.
        todo.append(messages.link_up_without_arp(found.index, spec.name))
    return todo


def _ensure_addresses(
    node: Node, index: int, spec: DeviceSpec
) -> tuple[tuple[IPAddress, ...], list[KernelRefused]]:
    """Of the wanted addresses those that the device has then; routes may name no others."""
    there: dict[IPAddress, int] = {}
    for message in node.route.dump(messages.dump_addresses(index=index)):
        _, prefixlen, _, _, _ = messages.ADDRESS.unpack_from(message.body)
        values = codec.attributes(message.body, messages.ADDRESS.size)
        there[ip_address(bytes(values.get(messages.IFA_LOCAL, values[messages.IFA_ADDRESS])))] = prefixlen
    had, refused = [], []
    for ip in spec.addresses:
        missed = [] if ip in there else node.route.attempt([messages.add_address(index, spec.name, ip)])
        refused += missed
        if not missed:
            had.append(ip)
    too_many = [
        messages.delete_address(index, spec.name, ip, prefixlen)
        for ip, prefixlen in there.items()
        if ip not in spec.addresses
    ]
    return tuple(had), refused + node.route.attempt(too_many)


def _find(node: Node, name: str) -> _Found | None:
    message = node.route.get(messages.get_link(name))
    if message is None:
        return None
    _, _, index, flags, _ = messages.LINK.unpack_from(message.body)
    values = codec.attributes(message.body, messages.LINK.size)
    info = codec.attributes(values.get(messages.IFLA_LINKINFO, memoryview(b"")))
    found = _Found(
        index=index,
        up=bool(flags & messages.IFF_UP),
        mac=bytes(values.get(messages.IFLA_ADDRESS, b"")).hex(":"),
        mtu=codec.as_u32(values.get(messages.IFLA_MTU)),
        arp=not flags & messages.IFF_NOARP,
        kind=codec.as_text(info.get(messages.IFLA_INFO_KIND)),
    )
    if found.kind != "vxlan" or messages.IFLA_INFO_DATA not in info:
        return found
    data = codec.attributes(info[messages.IFLA_INFO_DATA])
    local = data.get(messages.IFLA_VXLAN_LOCAL, data.get(messages.IFLA_VXLAN_LOCAL6))
    return replace(
        found,
        vni=codec.as_u32(data.get(messages.IFLA_VXLAN_ID)),
        port=int.from_bytes(data.get(messages.IFLA_VXLAN_PORT, b""), "big"),
        learning=bytes(data.get(messages.IFLA_VXLAN_LEARNING, b"\1")) != b"\0",
        local=ip_address(bytes(local)) if local is not None else None,
    )
