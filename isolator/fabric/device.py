"""The VXLAN device of this node: one for all networks, its MAC pinned, learning nothing."""

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

    addresses: for the node's own packets to other nodes' containers, at most one a family.
    """

    mac: str
    local: IPAddress
    port: int
    mtu: int
    addresses: tuple[IPAddress, ...] = ()


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


def ensure_device(node: Node, spec: DeviceSpec | None) -> tuple[int, bool]:
    """Make the device what it has to be, or be gone; its link index, 0 without one, and whether it is new.

    A new one has none of the routes and tunnels that an old one had. One that spoke ARP has lost its neighbours with
    that, and counts as new. Raises KernelRefused.
    """
    found = _find(node)
    if spec is None:
        if found is not None:
            node.route.execute([messages.delete_link(VXLAN_DEVICE)])
        return 0, found is not None
    new = found is None or not _can_become(found, spec)
    if new:
        node.route.execute(
            [
                messages.delete_link(VXLAN_DEVICE),
                messages.create_vxlan(
                    name=VXLAN_DEVICE, mac=spec.mac, vni=VNI, port=spec.port, local=spec.local, mtu=spec.mtu
                ),
            ]
        )
        found = _find(node)
    if found is None:
        raise KernelRefused(f"the device {VXLAN_DEVICE} was deleted while it was made; it is made again")
    new = new or found.arp
    node.route.execute(_adjustments(found, spec))
    # Hosts turn IPv6 off for new links; here next hops are IPv6 ones in both families.
    sysctl.ensure(f"net/ipv6/conf/{VXLAN_DEVICE}/disable_ipv6", "0")
    node.route.execute(_address_changes(node, found.index, spec))
    return found.index, new


def _can_become(found: _Found, spec: DeviceSpec) -> bool:
    return (
        (found.kind, found.vni, found.port, found.learning) == ("vxlan", VNI, spec.port, False)
        and found.local is not None
        and found.local.version == spec.local.version
    )


def _adjustments(found: _Found, spec: DeviceSpec) -> list[Request]:
    todo = []
    if found.local != spec.local:
        todo.append(messages.set_vxlan_local(found.index, VXLAN_DEVICE, spec.local))
    if found.mac != spec.mac:  # udev's MACAddressPolicy, for one
        todo.append(messages.set_mac(found.index, VXLAN_DEVICE, spec.mac))
    if found.mtu != spec.mtu:
        todo.append(messages.set_mtu(found.index, VXLAN_DEVICE, spec.mtu))
    if not found.up:
        todo.append(messages.no_link_local(found.index, VXLAN_DEVICE))
    if not found.up or found.arp:
        # All that it needs to know of its neighbours is told by us; whoever can send into the tunnel tells it nothing.
        todo.append(messages.link_up_without_arp(found.index, VXLAN_DEVICE))
    return todo


def _address_changes(node: Node, index: int, spec: DeviceSpec) -> list[Request]:
    there: set[IPAddress] = set()
    todo = []
    for message in node.route.dump(messages.dump_addresses(index=index)):
        _, prefixlen, _, _, _ = messages.ADDRESS.unpack_from(message.body)
        values = codec.attributes(message.body, messages.ADDRESS.size)
        ip = ip_address(bytes(values.get(messages.IFA_LOCAL, values[messages.IFA_ADDRESS])))
        there.add(ip)
        if ip not in spec.addresses:
            todo.append(messages.delete_address(index, VXLAN_DEVICE, ip, prefixlen))
    return [messages.add_address(index, VXLAN_DEVICE, ip) for ip in spec.addresses if ip not in there] + todo


def _find(node: Node) -> _Found | None:
    message = node.route.get(messages.get_link(VXLAN_DEVICE))
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
