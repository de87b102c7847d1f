"""What the ``routed`` driver lays out at an endpoint's two ends. Pure: a wiring in, netlink requests out.

      container                                             node
      eth0  10.0.0.5/32, fd00::5/128        <--- veth --->  mrgk2j…   no address, no ARP, MAC ee:ee:ee:ee:ee:ee
      10.0.0.0/16 via 169.254.1.7 src 10.0.0.5              10.0.0.5 dev mrgk2j… proto 157 scope link
      fd00::/64   via fe80::7     src fd00::5               fd00::5  dev mrgk2j… proto 157
      default     via 169.254.1.7, via fe80::7              10.0.0.5 -> the container's MAC, permanent
      169.254.1.7 -> ee:ee:ee:ee:ee:ee permanent            fd00::5  -> the container's MAC, permanent
      fe80::7     -> ee:ee:ee:ee:ee:ee permanent

The gateways exist nowhere: the container only needs a next hop to build an Ethernet header from, and the
permanent neighbour entries answer for them. So no proxy_arp is needed, and no packet can fool either side. Which they
are is the network's to say (ipam/next_hops.py).

A container may join several networks. Each interface has a routing table of its own, and a rule sends
packets *from* its address there; otherwise answers would leave by whichever interface holds the main
default route and be dropped by the strict source check. What has no source yet, because nobody bound it, is routed
by the main table: to its network's pools by the interface that is on that network and from its address, whatever else
is there; everywhere else by a default route. Which one is decided by metrics that
follow from the names (``naming.route_metric``), not by the order in which parallel ADDs finish.
"""

from __future__ import annotations

from collections.abc import Iterator

from ipam.keys import IPNetwork
from ipam.next_hops import next_hop
from isolator.drivers.base import Wiring
from isolator.drivers.naming import route_metric, route_table
from isolator.model import IPAddress
from isolator.netlink import messages
from isolator.netlink.codec import Request

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
    metric = metric_of(wiring)
    requests = [messages.link_up(_LOOPBACK, "lo"), messages.no_link_local(index, name)]
    for ip in wiring.ips:
        requests.append(messages.add_address(index, name, ip))
        requests.append(messages.add_neighbour(index, name, gateway_for(wiring, ip), HOST_MAC))
        requests.append(messages.add_source_rule(ip, table, RULE_PRIORITY))
    requests.append(messages.link_up(index, name))
    for ip in wiring.ips:
        gateway = gateway_for(wiring, ip)
        if ip.version == 6:
            requests.append(messages.add_local_route(index, name, ip))
        requests.append(messages.add_default_route(index, name, gateway, table=table))
        requests.append(messages.add_default_route(index, name, gateway, metric=metric))
    return requests + _pool_requests(wiring, index)


def reroute_requests(before: Wiring, now: Wiring, index: int) -> list[Request]:
    """What takes the container's routes from the pools that it had to those that it shall have."""
    metric = metric_of(before)
    gone = [pool for pool, _ in pool_sources(before) if pool not in now.pools]
    return [
        *_pool_requests(now, index),
        *(messages.delete_pool_route(index, before.ifname, pool, metric) for pool in gone),
    ]


def _pool_requests(wiring: Wiring, index: int) -> list[Request]:
    metric = metric_of(wiring)
    return [
        messages.add_pool_route(index, wiring.ifname, pool, gateway_for(wiring, source), source, metric)
        for pool, source in pool_sources(wiring)
    ]


def pool_sources(wiring: Wiring) -> Iterator[tuple[IPNetwork, IPAddress]]:
    """Its network's pools, and which of its addresses they are reached from: the first of that family."""
    for pool in wiring.pools:
        source = next((ip for ip in wiring.ips if ip.version == pool.version), None)
        if source is not None:
            yield pool, source


def gateway_for(wiring: Wiring, ip: IPAddress) -> IPAddress:
    """The next hop of an address's family."""
    return next_hop(wiring.next_hop, ip.version)


def metric_of(wiring: Wiring) -> int:
    """Of its routes in the main table."""
    return route_metric(wiring.ifname, default_route=wiring.default_route)
