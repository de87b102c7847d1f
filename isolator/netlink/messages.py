"""The rtnetlink messages we send: what a link, address, neighbour, route or rule looks like as bytes.

Pure: values in, ``Request`` out. Every request names itself for errors and declares which errno answer
it as well as success does, so that doing a thing twice, or undoing what is gone, is no error.
"""

from __future__ import annotations

import errno
import socket
import sys
from struct import Struct

from ipam.keys import IPNetwork
from isolator.model import IPAddress
from isolator.netlink.codec import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Attributes,
    Request,
    attribute,
    attributes,
    nested,
    text,
    u32,
)

ENDPOINT_PREFIX = "mrg"
"""Names of the node's ends of endpoints begin with it: at birth only its name marks a link."""
SHAPER_PREFIX = "mrg-"
"""Of those that limit an endpoint's traffic, which no name of an endpoint begins with."""
DOOMED = 0x6D7267FF
"""The link group that is deleted as one; links only ever join it to go."""
ROUTE_PROTOCOL = 157
"""Marks our routes and rules (``ip route show proto 157``)."""
FABRIC_METRIC = 2048
"""Of the fabric's routes, in both families: a route to an endpoint of this node is better, and neither replaces
the other when an address moves between nodes."""
TABLE_MAIN, TABLE_LOCAL = 254, 255

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_GETNSID = 90

LINK = Struct("=BxHiII")  # family, device type, index, flags, which flags change
ADDRESS = Struct("=BBBBI")  # family, prefix length, flags, scope, index
NEIGHBOUR = Struct("=BxxxiHBB")  # family, index, state, flags, type
ROUTE = Struct("=BBBBBBBBI")  # family, dst length, src length, tos, table, protocol, scope, type, flags
NEXT_HOP = Struct("=Hxxi")  # length, index
RULE = Struct("=BBBBBxxBI")  # family, dst length, src length, tos, table, action, flags

IFF_UP, IFF_NOARP = 0x1, 0x80
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 5, 18, 20
IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_LINK_NETNSID = 26, 27, 28, 37
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFLA_VXLAN_ID, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6 = 1, 4, 7, 15, 17
IFLA_GENEVE_PORT, IFLA_BAREUDP_PORT = 5, 1
IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE = 8, 1

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_SECONDARY, IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x01, 0x02, 0x200
"""The first one stands for temporary addresses in IPv6."""

NETNSA_NSID, NETNSA_FD = 1, 3

NDA_DST, NDA_LLADDR, NDA_PORT = 1, 2, 6
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF = 0x02

(
    RTA_DST,
    RTA_SRC,
    RTA_IIF,
    RTA_OIF,
    RTA_GATEWAY,
    RTA_PRIORITY,
    RTA_PREFSRC,
    RTA_MULTIPATH,
    RTA_TABLE,
    RTA_VIA,
) = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    9,
    15,
    18,
)
RTN_UNSPEC, RTN_UNICAST, RTN_LOCAL, RTN_BLACKHOLE = 0, 1, 2, 6
RTNH_F_ONLINK = 4
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_HOST, SCOPE_NOWHERE = 0, 253, 254, 255

FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL = 2, 6, 15, 21
FR_ACT_TO_TABLE = 1


def family_of(ip: IPAddress | IPNetwork) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6


def mac_bytes(mac: str) -> bytes:
    """``aa:bb:..`` as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def create_veth(
    *, name: str, index: int, mac: str, peer: str, peer_index: int, peer_mac: str, peer_netns: int, mtu: int
) -> Request:
    """A veth pair, its peer born inside another namespace (no move, no name clash on the node).

    index, peer_index: chosen by the caller, so that nothing has to be read back.
    peer_netns: an open file descriptor of the namespace.
    """
    mtu_attribute = u32(IFLA_MTU, mtu)
    peer_body = (
        LINK.pack(0, 0, peer_index, 0, 0)
        + text(IFLA_IFNAME, peer)
        + attribute(IFLA_ADDRESS, mac_bytes(peer_mac))
        + mtu_attribute
        + u32(IFLA_NET_NS_FD, peer_netns)
    )
    body = (
        LINK.pack(0, 0, index, 0, 0)
        + text(IFLA_IFNAME, name)
        + attribute(IFLA_ADDRESS, mac_bytes(mac))
        + mtu_attribute
        + nested(
            IFLA_LINKINFO,
            text(IFLA_INFO_KIND, "veth"),
            nested(IFLA_INFO_DATA, nested(VETH_INFO_PEER, peer_body)),
        )
    )
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create {peer} with {name} on the node")


def create_vxlan(*, name: str, mac: str, vni: int, port: int, local: IPAddress, mtu: int) -> Request:
    """A VXLAN device that learns nothing: who is behind which address is only ever said by us.

    port: UDP, of this node. local: what its packets come from; decides whether it runs over IPv4 or IPv6.
    """
    body = (
        LINK.pack(0, 0, 0, 0, 0)
        + text(IFLA_IFNAME, name)
        + attribute(IFLA_ADDRESS, mac_bytes(mac))
        + u32(IFLA_MTU, mtu)
        + nested(
            IFLA_LINKINFO,
            text(IFLA_INFO_KIND, "vxlan"),
            nested(
                IFLA_INFO_DATA,
                u32(IFLA_VXLAN_ID, vni),
                _vxlan_local(local),
                attribute(IFLA_VXLAN_LEARNING, b"\0"),
                attribute(IFLA_VXLAN_PORT, port.to_bytes(2, "big")),
            ),
        )
    )
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create the VXLAN device {name}")


def set_vxlan_local(index: int, name: str, local: IPAddress) -> Request:
    """Have a VXLAN device send from another address of the same family."""
    info = text(IFLA_INFO_KIND, "vxlan") + nested(IFLA_INFO_DATA, _vxlan_local(local))
    body = LINK.pack(0, 0, index, 0, 0) + nested(IFLA_LINKINFO, info)
    return Request(RTM_NEWLINK, 0, body, f"have {name} send from {local}")


def _vxlan_local(local: IPAddress) -> bytes:
    return attribute(IFLA_VXLAN_LOCAL if local.version == 4 else IFLA_VXLAN_LOCAL6, local.packed)


def delete_link(name: str) -> Request:
    """Remove a link by name."""
    body = LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, name)
    return Request(RTM_DELLINK, 0, body, f"delete the link {name}", (errno.ENODEV,))


def set_group(name: str, group: int) -> Request:
    """Put a link into a group."""
    body = LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, name) + u32(IFLA_GROUP, group)
    return Request(RTM_SETLINK, 0, body, f"move the link {name} to group {group:#x}", (errno.ENODEV,))


def delete_group(group: int) -> Request:
    """Remove all links of a group; they share one wait for the kernel's grace periods."""
    body = LINK.pack(0, 0, 0, 0, 0) + u32(IFLA_GROUP, group)
    return Request(RTM_DELLINK, 0, body, f"delete the links of group {group:#x}", (errno.ENODEV,))


def link_up(index: int, name: str) -> Request:
    """Bring a link up."""
    return Request(RTM_SETLINK, 0, LINK.pack(0, 0, index, IFF_UP, IFF_UP), f"bring {name} up")


def set_alias(index: int, name: str, alias: str) -> Request:
    """Give a link an alias, text that the kernel keeps and does not read, of at most 255 bytes. name: of the link."""
    # Without a final zero, which the kernel would count to the text.
    body = LINK.pack(0, 0, index, 0, 0) + attribute(IFLA_IFALIAS, alias.encode())
    return Request(RTM_SETLINK, 0, body, f"give the link {name} its alias", (errno.ENODEV,))


def get_namespace_number(fd: int) -> Request:
    """The number that the socket's namespace knows another one by. fd: of that, open."""
    body = bytes(4) + u32(NETNSA_FD, fd)
    return Request(RTM_GETNSID, 0, body, "look for a namespace's number")


def rename_link(index: int, name: str) -> Request:
    """Give a link another name. Kernels before 6.2 refuse it while the link is up."""
    return Request(
        RTM_SETLINK, 0, LINK.pack(0, 0, index, 0, 0) + text(IFLA_IFNAME, name), f"name a link {name} again"
    )


def link_down_by_index(index: int, name: str) -> Request:
    """Bring a link down, whatever it is called; its routes and neighbours go with that."""
    return Request(RTM_SETLINK, 0, LINK.pack(0, 0, index, 0, IFF_UP), f"bring {name} down", (errno.ENODEV,))


def link_up_without_arp(index: int, name: str) -> Request:
    """Bring a link up that neither asks nor answers by ARP, and learns nothing from it.

    Turning ARP off drops all of the link's neighbours, permanent ones too: add them afterwards.
    """
    flags = IFF_UP | IFF_NOARP
    return Request(RTM_SETLINK, 0, LINK.pack(0, 0, index, flags, flags), f"bring {name} up without ARP")


def link_down(name: str) -> Request:
    """Bring a link down; its routes and neighbours go with that."""
    body = LINK.pack(0, 0, 0, 0, IFF_UP) + text(IFLA_IFNAME, name)
    return Request(RTM_SETLINK, 0, body, f"bring {name} down", (errno.ENODEV,))


def set_mac(index: int, name: str, mac: str) -> Request:
    """Set a link's MAC."""
    body = LINK.pack(0, 0, index, 0, 0) + attribute(IFLA_ADDRESS, mac_bytes(mac))
    return Request(RTM_SETLINK, 0, body, f"give {name} the MAC {mac}")


def set_mtu(index: int, name: str, mtu: int) -> Request:
    """Set a link's MTU, bytes."""
    return Request(
        RTM_SETLINK, 0, LINK.pack(0, 0, index, 0, 0) + u32(IFLA_MTU, mtu), f"give {name} the MTU {mtu}"
    )


def no_link_local(index: int, name: str) -> Request:
    """No generated fe80 address, so no DAD and no MLD report for it; a kernel without IPv6 has none anyway."""
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([ADDR_GEN_MODE_NONE]))
    body = LINK.pack(0, 0, index, 0, 0) + nested(IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
    doing = f"turn off link-local addresses on {name}"
    return Request(RTM_SETLINK, 0, body, doing, (errno.EAFNOSUPPORT,))


def get_link(name: str) -> Request:
    """Read a link by name.

    Where its carrier came up this instant, kernels since 6.9 also wait until it can really send.
    """
    body = LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, name)
    return Request(RTM_GETLINK, 0, body, f"read the link {name}", (errno.ENODEV,))


def get_link_by_index(index: int) -> Request:
    """Read a link by its index."""
    return Request(RTM_GETLINK, 0, LINK.pack(0, 0, index, 0, 0), f"read the link {index}", (errno.ENODEV,))


def add_address(index: int, name: str, ip: IPAddress) -> Request:
    """A host address (/32, /128), usable at once: no duplicate address detection."""
    flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE if ip.version == 6 else 0
    body = (
        ADDRESS.pack(family_of(ip), ip.max_prefixlen, flags & 0xFF, SCOPE_UNIVERSE, index)
        + attribute(IFA_LOCAL, ip.packed)
        + attribute(IFA_ADDRESS, ip.packed)
        + u32(IFA_FLAGS, flags)
    )
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, f"add the address {ip} to {name}")


def delete_address(index: int, name: str, ip: IPAddress, prefixlen: int) -> Request:
    """Take an address from a link."""
    body = (
        ADDRESS.pack(family_of(ip), prefixlen, 0, 0, index)
        + attribute(IFA_LOCAL, ip.packed)
        + attribute(IFA_ADDRESS, ip.packed)
    )
    return Request(
        RTM_DELADDR, 0, body, f"take the address {ip} from {name}", (errno.EADDRNOTAVAIL, errno.ENODEV)
    )


def add_neighbour(index: int, name: str, ip: IPAddress, mac: str) -> Request:
    """A permanent neighbour: nobody ever has to ask for it."""
    body = (
        NEIGHBOUR.pack(family_of(ip), index, NUD_PERMANENT, 0, 0)
        + attribute(NDA_DST, ip.packed)
        + attribute(NDA_LLADDR, mac_bytes(mac))
    )
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"add the neighbour {ip} to {name}")


def delete_neighbour(index: int, name: str, ip: IPAddress) -> Request:
    """Undo ``add_neighbour``."""
    body = NEIGHBOUR.pack(family_of(ip), index, 0, 0, 0) + attribute(NDA_DST, ip.packed)
    return Request(
        RTM_DELNEIGH, 0, body, f"delete the neighbour {ip} of {name}", (errno.ENOENT, errno.ENODEV)
    )


def add_tunnel(index: int, name: str, mac: str, remote: IPAddress, port: int) -> Request:
    """Frames for a MAC go, by VXLAN, to a remote address and UDP port; 0 is the device's own."""
    body = (
        NEIGHBOUR.pack(socket.AF_BRIDGE, index, NUD_NOARP | NUD_PERMANENT, NTF_SELF, 0)
        + attribute(NDA_LLADDR, mac_bytes(mac))
        + attribute(NDA_DST, remote.packed)
        + (attribute(NDA_PORT, port.to_bytes(2, "big")) if port else b"")
    )
    doing = f"lead {mac} on {name} to {remote}"
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, doing)


def delete_tunnel(index: int, name: str, mac: str) -> Request:
    """Undo ``add_tunnel``."""
    body = NEIGHBOUR.pack(socket.AF_BRIDGE, index, 0, NTF_SELF, 0) + attribute(NDA_LLADDR, mac_bytes(mac))
    return Request(RTM_DELNEIGH, 0, body, f"lead {mac} on {name} nowhere", (errno.ENOENT, errno.ENODEV))


def add_fabric_route(
    destination: IPNetwork, via: IPAddress, *, index: int, onlink: bool, source: IPAddress | None
) -> Request:
    """A route to addresses of another node.

    via: may be IPv6 for an IPv4 destination. index: of the link; 0 lets the kernel find the one that ``via`` is on.
    onlink: ``via`` is on the link although no address says so. source: for the node's own packets.
    """
    family = family_of(destination)
    flags = RTNH_F_ONLINK if onlink else 0
    if via.version == destination.version:
        hop = attribute(RTA_GATEWAY, via.packed)
    else:
        hop = attribute(RTA_VIA, family_of(via).to_bytes(2, sys.byteorder) + via.packed)
    body = (
        _route_header(family, destination.prefixlen, TABLE_MAIN, SCOPE_UNIVERSE, flags)
        + attribute(RTA_DST, destination.network_address.packed)
        + hop
        + (u32(RTA_OIF, index) if index else b"")
        + (attribute(RTA_PREFSRC, source.packed) if source is not None else b"")
        + u32(RTA_PRIORITY, FABRIC_METRIC)
    )
    doing = f"add the route to {destination} via {via}"
    return Request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, doing)


def add_blackhole(destination: IPNetwork) -> Request:
    """What no better route leads anywhere is dropped."""
    body = (
        _route_header(
            family_of(destination), destination.prefixlen, TABLE_MAIN, SCOPE_UNIVERSE, 0, RTN_BLACKHOLE
        )
        + attribute(RTA_DST, destination.network_address.packed)
        + u32(RTA_PRIORITY, FABRIC_METRIC)
    )
    return Request(
        RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, f"drop what no container has of {destination}"
    )


def delete_fabric_route(destination: IPNetwork) -> Request:
    """Undo ``add_fabric_route`` or ``add_blackhole``; whatever is there of that metric and protocol goes."""
    body = (
        _route_header(family_of(destination), destination.prefixlen, TABLE_MAIN, SCOPE_NOWHERE, 0, RTN_UNSPEC)
        + attribute(RTA_DST, destination.network_address.packed)
        + u32(RTA_PRIORITY, FABRIC_METRIC)
    )
    return Request(RTM_DELROUTE, 0, body, f"delete the route to {destination}", (errno.ESRCH, errno.ENODEV))


def add_default_route(
    index: int, name: str, gateway: IPAddress, *, table: int = TABLE_MAIN, metric: int = 0
) -> Request:
    """A default route via a gateway that is on the link although no address says so."""
    body = (
        _route_header(family_of(gateway), 0, table, SCOPE_UNIVERSE, RTNH_F_ONLINK)
        + attribute(RTA_GATEWAY, gateway.packed)
        + u32(RTA_OIF, index)
        + u32(RTA_TABLE, table)
        + (u32(RTA_PRIORITY, metric) if metric else b"")
    )
    doing = f"add the default route via {gateway} on {name}"
    return Request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, doing)


def add_pool_route(
    index: int, name: str, pool: IPNetwork, gateway: IPAddress, source: IPAddress, metric: int
) -> Request:
    """Inside a container: a pool is reached by this link, from this address of it. The gateway is as above."""
    body = (
        _route_header(family_of(pool), pool.prefixlen, TABLE_MAIN, SCOPE_UNIVERSE, RTNH_F_ONLINK)
        + attribute(RTA_DST, pool.network_address.packed)
        + attribute(RTA_GATEWAY, gateway.packed)
        + u32(RTA_OIF, index)
        + attribute(RTA_PREFSRC, source.packed)
        + u32(RTA_PRIORITY, metric)
    )
    doing = f"add the route to {pool} via {gateway} on {name}"
    return Request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, doing)


def delete_pool_route(index: int, name: str, pool: IPNetwork, metric: int) -> Request:
    """Undo ``add_pool_route``."""
    body = (
        _route_header(family_of(pool), pool.prefixlen, TABLE_MAIN, SCOPE_NOWHERE, 0, RTN_UNSPEC)
        + attribute(RTA_DST, pool.network_address.packed)
        + u32(RTA_OIF, index)
        + u32(RTA_PRIORITY, metric)
    )
    doing = f"delete the route to {pool} on {name}"
    return Request(RTM_DELROUTE, 0, body, doing, (errno.ESRCH, errno.ENODEV))


def add_local_route(index: int, name: str, ip: IPAddress) -> Request:
    """Deliver what arrives for an address, where nothing does.

    The kernel adds a route of its own for that; but that of an IPv6 address in the background, and packets are lost
    until then, and not once more for an address that is there when somebody takes its route away.
    """
    scope = SCOPE_HOST if ip.version == 4 else SCOPE_UNIVERSE
    body = (
        _route_header(family_of(ip), ip.max_prefixlen, TABLE_LOCAL, scope, 0, RTN_LOCAL)
        + attribute(RTA_DST, ip.packed)
        + u32(RTA_OIF, index)
        + u32(RTA_TABLE, TABLE_LOCAL)
        + (attribute(RTA_PREFSRC, ip.packed) if ip.version == 4 else b"")
    )
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Request(RTM_NEWROUTE, flags, body, f"deliver {ip} on {name}", (errno.EEXIST,))


def add_host_route(index: int, name: str, ip: IPAddress) -> Request:
    """The node's route to one endpoint's address."""
    return Request(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        _host_route(index, ip, SCOPE_LINK if ip.version == 4 else SCOPE_UNIVERSE),
        f"add the route to {ip} via {name}",
    )


def delete_route(destination: IPNetwork, table: int, index: int, kind: int) -> Request:
    """One of our routes, as the inventory found it. index: 0 if it has no link."""
    body = (
        _route_header(family_of(destination), destination.prefixlen, table, SCOPE_NOWHERE, 0, kind)
        + attribute(RTA_DST, destination.network_address.packed)
        + u32(RTA_TABLE, table)
        + (u32(RTA_OIF, index) if index else b"")
    )
    return Request(RTM_DELROUTE, 0, body, f"delete the route to {destination}", (errno.ESRCH, errno.ENODEV))


def add_source_rule(ip: IPAddress, table: int, priority: int) -> Request:
    """``from <ip> lookup <table>``."""
    body = _source_rule(ip, table, priority)
    return Request(
        RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, body, f"add the rule for packets from {ip}", (errno.EEXIST,)
    )


def delete_source_rule(ip: IPAddress, table: int, priority: int) -> Request:
    """Undo ``add_source_rule``."""
    body = _source_rule(ip, table, priority)
    fine = (errno.ENOENT, errno.EAFNOSUPPORT)
    return Request(RTM_DELRULE, 0, body, f"delete the rule for packets from {ip}", fine)


def get_route(dst: IPAddress, src: IPAddress | None, iif: int) -> Request:
    """What the kernel would do with a packet. iif: index of the link it comes in by; 0 if the node sends it."""
    length = dst.max_prefixlen
    body = (
        ROUTE.pack(family_of(dst), length, length if src is not None else 0, 0, 0, 0, 0, 0, 0)
        + attribute(RTA_DST, dst.packed)
        + (attribute(RTA_SRC, src.packed) if src is not None else b"")
        + (u32(RTA_IIF, iif) if iif else b"")
    )
    return Request(RTM_GETROUTE, 0, body, f"look up the route to {dst}")


def dump_links() -> Request:
    """All links."""
    return Request(RTM_GETLINK, 0, LINK.pack(0, 0, 0, 0, 0), "list the links")


def dump_addresses(family: int = 0, index: int = 0) -> Request:
    """Addresses, of one link if an index is given."""
    return Request(
        RTM_GETADDR, 0, ADDRESS.pack(family, 0, 0, 0, index), "list the addresses", (errno.ENODEV,)
    )


def dump_neighbours(family: int, index: int) -> Request:
    """Neighbours of one link."""
    body = NEIGHBOUR.pack(family, 0, 0, 0, 0) + u32(_NDA_IFINDEX, index)
    return Request(RTM_GETNEIGH, 0, body, "list the neighbours", (errno.ENODEV,))


def dump_tunnels(index: int) -> Request:
    """Where MACs lead on one VXLAN device."""
    body = NEIGHBOUR.pack(socket.AF_BRIDGE, index, 0, 0, 0)
    return Request(RTM_GETNEIGH, 0, body, "list the tunnels", (errno.ENODEV,))


def dump_routes(family: int, *, protocol: int = 0, table: int = 0, index: int = 0) -> Request:
    """Routes of a family, filtered by the kernel."""
    body = (
        ROUTE.pack(family, 0, 0, 0, 0, protocol, 0, 0, 0)
        + (u32(RTA_TABLE, table) if table else b"")
        + (u32(RTA_OIF, index) if index else b"")
    )
    fine = (errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT)
    return Request(RTM_GETROUTE, 0, body, "list the routes", fine)


def dump_rules(family: int) -> Request:
    """Rules of a family."""
    return Request(
        RTM_GETRULE, 0, RULE.pack(family, 0, 0, 0, 0, 0, 0), "list the rules", (errno.EAFNOSUPPORT,)
    )


def next_hop_links(multipath: memoryview | None) -> list[int]:
    """Link indexes of a multipath route's next hops."""
    return [index for index, _ in next_hops(multipath)]


def next_hops(multipath: memoryview | None) -> list[tuple[int, Attributes]]:
    """(link index, attributes) of a multipath route's next hops."""
    hops: list[tuple[int, Attributes]] = []
    offset = 0
    while multipath is not None and offset + NEXT_HOP.size <= len(multipath):
        length, index = NEXT_HOP.unpack_from(multipath, offset)
        hops.append((index, attributes(multipath[: offset + length], offset + NEXT_HOP.size)))
        offset += max(length + (-length & 3), NEXT_HOP.size)
    return hops


_NDA_IFINDEX = 8


def _route_header(
    family: int, dst_len: int, table: int, scope: int, flags: int, kind: int = RTN_UNICAST
) -> bytes:
    short = table if table < 256 else 0  # the full number goes into RTA_TABLE
    return ROUTE.pack(family, dst_len, 0, 0, short, ROUTE_PROTOCOL, scope, kind, flags)


def _host_route(index: int, ip: IPAddress, scope: int) -> bytes:
    return (
        _route_header(family_of(ip), ip.max_prefixlen, TABLE_MAIN, scope, 0)
        + attribute(RTA_DST, ip.packed)
        + u32(RTA_OIF, index)
        + u32(RTA_TABLE, TABLE_MAIN)
    )


def _source_rule(ip: IPAddress, table: int, priority: int) -> bytes:
    return (
        RULE.pack(family_of(ip), 0, ip.max_prefixlen, 0, 0, FR_ACT_TO_TABLE, 0)
        + attribute(FRA_SRC, ip.packed)
        + u32(FRA_PRIORITY, priority)
        + u32(FRA_TABLE, table)
        + attribute(FRA_PROTOCOL, bytes([ROUTE_PROTOCOL]))
    )
