"""What the ``routed`` driver lays out at an endpoint's two ends. Pure: a wiring in, netlink requests out.

      container                                        node
      eth0  10.0.0.5/32, fd00::5/128   <--- veth --->  mrgk2j…   no address, no ARP, MAC ee:ee:ee:ee:ee:ee
      default via 169.254.1.1 onlink                   10.0.0.5 dev mrgk2j… proto 157 scope link
      default via fe80::1     onlink                   fd00::5  dev mrgk2j… proto 157
      169.254.1.1 -> ee:ee:ee:ee:ee:ee permanent       10.0.0.5 -> the container's MAC, permanent
      fe80::1     -> ee:ee:ee:ee:ee:ee permanent       fd00::5  -> the container's MAC, permanent

The gateways exist nowhere: the container only needs a next hop to build an Ethernet header from, and the
permanent neighbour entries answer for them. So no proxy_arp is needed, and no packet can fool either side.

A container may join several networks. Each interface has a routing table of its own, and a rule sends
packets *from* its address there; otherwise answers would leave by whichever interface holds the main
default route and be dropped by the strict source check. Which one holds it is decided by metrics that
follow from the names (``naming.route_metric``), not by the order in which parallel ADDs finish.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from isolator.drivers.base import Wiring
from isolator.drivers.naming import route_metric, route_table
from isolator.model import IPAddress
from isolator.netlink import messages
from isolator.netlink.codec import Request

GATEWAY4 = IPv4Address("169.254.1.1")
GATEWAY6 = IPv6Address("fe80::1")
HOST_MAC = "ee:ee:ee:ee:ee:ee"
RULE_PRIORITY = 15700
"""Between the local table (0) and the main one (32766)."""

_LOOPBACK = 1  # index of ``lo`` in every namespace


def peer_index(index: int) -> int:
    """The container end's index, by the node end's.

    They must differ: the kernel takes a link whose peer has the same index for one without a peer, and
    then tells of its carrier up to a second late.
    """
    return index + (1 << 29)


def host_requests(wiring: Wiring, index: int) -> list[Request]:
    """What makes the node's end: up first, since only a link that is up takes routes.

    It speaks no ARP: the table ``inet moorage`` does not see ARP, and each request with a made-up sender would add an
    entry to the neighbour table, which all namespaces of the machine share.
    """
    name = wiring.host_ifname
    requests = [messages.link_up_without_arp(index, name)]
    for ip in wiring.ips:
        requests.append(messages.add_neighbour(index, name, ip, wiring.mac))
        requests.append(messages.add_host_route(index, name, ip))
    return requests


def container_requests(wiring: Wiring, index: int) -> list[Request]:
    """What makes the container's end. Bringing it up, which lets traffic flow, comes as late as it can."""
    name = wiring.ifname
    table = route_table(name)
    metric = route_metric(name, default_route=wiring.default_route)
    requests = [messages.link_up(_LOOPBACK, "lo"), messages.no_link_local(index, name)]
    for ip in wiring.ips:
        requests.append(messages.add_address(index, name, ip))
        requests.append(messages.add_neighbour(index, name, gateway_for(ip), HOST_MAC))
        requests.append(messages.add_source_rule(ip, table, RULE_PRIORITY))
    requests.append(messages.link_up(index, name))
    for ip in wiring.ips:
        gateway = gateway_for(ip)
        if ip.version == 6:
            requests.append(messages.add_local_route(index, name, ip))
        requests.append(messages.add_default_route(index, name, gateway, table=table))
        requests.append(messages.add_default_route(index, name, gateway, metric=metric))
    return requests


def gateway_for(ip: IPAddress) -> IPAddress:
    """The next hop of an address's family."""
    return GATEWAY4 if ip.version == 4 else GATEWAY6
