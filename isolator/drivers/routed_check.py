"""What a ``routed`` endpoint's two ends hold in the kernel, against what they should: desired minus actual.

Facts are short phrases ("the route to 10.0.0.5 via mrgk2j…"), so a difference reads as a sentence. What
is there beyond them is not our concern: a container may add routes and addresses of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address

from ipam.keys import IPNetwork
from isolator.drivers.base import UNSEEN, Wiring
from isolator.drivers.naming import route_table
from isolator.drivers.routed_layout import HOST_MAC, RULE_PRIORITY, gateway_for, metric_of, pool_sources
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.model import IPAddress
from isolator.netlink import codec, messages
from isolator.netlink.far_end import FarEnd, far_end
from isolator.netlink.inventory import HostLink, link_by_name, parse_route, parse_rule
from isolator.netlink.messages import ROUTE_PROTOCOL, TABLE_LOCAL, TABLE_MAIN
from isolator.netlink.node import Node
from isolator.netlink.socket import NetlinkSocket

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

IPV4_MTU, IPV6_MTU = 68, 1280
"""Bytes; below them the kernel takes a link's addresses of that family away (RFC 791, RFC 8200 section 5)."""


def differences(node: Node, wiring: Wiring) -> list[str]:
    """Sentences, one per difference; empty if all is well."""
    return _differences(node, wiring, smaller_mtu=False)


def damage(node: Node, wiring: Wiring) -> list[str]:
    """The differences that are to be mended: all but an MTU that the container made smaller, which is its own affair
    as long as its addresses bear it."""
    return _differences(node, wiring, smaller_mtu=True)


def _differences(node: Node, wiring: Wiring, *, smaller_mtu: bool) -> list[str]:
    ours = link_by_name(node.route, wiring.host_ifname)
    found = list(_host_differences(node.route, wiring, ours))
    if ours is None:
        return found  # the container's end went with it
    if wiring.netns is None:
        return [*found, f"{UNSEEN}the path of its network namespace is not known"]
    smallest = smallest_mtu(wiring) if smaller_mtu else wiring.mtu
    try:
        with (
            node.open_namespace(wiring.netns) as container,
            far_end(node, container, wiring.host_ifname) as end,
        ):
            return found + list(_container_differences(end, wiring, smallest))
    except (NamespaceGone, NotANamespace, KernelRefused) as error:
        return [*found, f"{UNSEEN}{error}"]


def smallest_mtu(wiring: Wiring) -> int:
    """Bytes that a container may make its MTU without losing an address."""
    needed = IPV6_MTU if any(ip.version == 6 for ip in wiring.ips) else IPV4_MTU
    return min(wiring.mtu, needed)


def _host_differences(route: NetlinkSocket, wiring: Wiring, link: HostLink | None) -> Iterator[str]:
    name = wiring.host_ifname
    yield from _link_differences("the node", name, link, HOST_MAC, range(wiring.mtu, wiring.mtu + 1))
    if link is not None:
        if link.arp:
            yield f"the node's link {name} speaks ARP"
        desired = {fact for ip in wiring.ips for fact in (_route(ip, name), _neighbour(ip, wiring.mac, name))}
        yield from _missing("the node", desired - _host_facts(route, link, wiring))


def _host_facts(route: NetlinkSocket, link: HostLink, wiring: Wiring) -> set[str]:
    facts: set[str] = set()
    for family in _families(wiring):
        dump = messages.dump_routes(family, table=TABLE_MAIN, index=link.index)
        for found in map(parse_route, route.dump(dump)):
            if found.index == link.index and found.destination.num_addresses == 1:
                facts.add(_route(found.destination.network_address, link.name))
    return facts | _neighbours(route, link, wiring)


def _container_differences(end: FarEnd, wiring: Wiring, smallest_mtu: int) -> Iterator[str]:
    name, route, link = wiring.ifname, end.route, end.link
    if link.name != name:
        yield f"the container's link {name} is called {link.name}"
        return
    yield from _link_differences("the container", name, link, wiring.mac, range(smallest_mtu, wiring.mtu + 1))
    loopback = link_by_name(route, "lo")
    if loopback is None or not loopback.up:
        yield "the container's link lo is down"
    table = route_table(name)
    metric = metric_of(wiring)
    desired = {
        _pool_route(pool, gateway_for(wiring, source), source, metric, name)
        for pool, source in pool_sources(wiring)
    }
    for ip in wiring.ips:
        gateway = gateway_for(wiring, ip)
        desired |= {
            _address(ip, name),
            _local(ip, name),
            _rule(ip, table),
            _neighbour(gateway, HOST_MAC, name),
            _default(gateway, table, name),
            f"{_default(gateway, TABLE_MAIN, name)} with metric {metric}",
        }
    yield from _missing("the container", desired - _container_facts(route, link, wiring))


def _container_facts(route: NetlinkSocket, link: HostLink, wiring: Wiring) -> set[str]:
    facts = _neighbours(route, link, wiring)
    for message in route.dump(messages.dump_addresses(index=link.index)):
        values = codec.attributes(message.body, messages.ADDRESS.size)
        packed = values.get(messages.IFA_LOCAL, values.get(messages.IFA_ADDRESS))
        if packed is not None:
            facts.add(_address(ip_address(bytes(packed)), link.name))
    for family in _families(wiring):
        for message in route.dump(messages.dump_rules(family)):
            rule = parse_rule(message)
            if rule is not None and rule.source is not None and rule.priority == RULE_PRIORITY:
                facts.add(_rule(rule.source.network_address, rule.table))
        # Table by table, and ours alone: a container may have as many of its own as it likes.
        dumps = [messages.dump_routes(family, table=TABLE_LOCAL, index=link.index)]
        dumps += [
            messages.dump_routes(family, protocol=ROUTE_PROTOCOL, table=table, index=link.index)
            for table in (TABLE_MAIN, route_table(link.name))
        ]
        for found in (parse_route(message) for dump in dumps for message in route.dump(dump)):
            if found.index != link.index:
                continue
            if (found.table, found.kind) == (TABLE_LOCAL, messages.RTN_LOCAL):
                facts.add(_local(found.destination.network_address, link.name))
            if found.gateway is None:
                continue
            if found.destination.prefixlen == 0:
                fact = _default(found.gateway, found.table, link.name)
                facts |= {fact, f"{fact} with metric {found.metric}"}
            elif found.table == TABLE_MAIN and found.source is not None:
                facts.add(
                    _pool_route(found.destination, found.gateway, found.source, found.metric, link.name)
                )
    return facts


def _neighbours(route: NetlinkSocket, link: HostLink, wiring: Wiring) -> set[str]:
    facts: set[str] = set()
    for family in _families(wiring):
        for message in route.dump(messages.dump_neighbours(family, link.index)):
            _, index, state, _, _ = messages.NEIGHBOUR.unpack_from(message.body)
            values = codec.attributes(message.body, messages.NEIGHBOUR.size)
            if index == link.index and state == messages.NUD_PERMANENT and messages.NDA_LLADDR in values:
                ip = ip_address(bytes(values[messages.NDA_DST]))
                facts.add(_neighbour(ip, bytes(values[messages.NDA_LLADDR]).hex(":"), link.name))
    return facts


def _link_differences(where: str, name: str, link: HostLink | None, mac: str, mtus: range) -> Iterator[str]:
    if link is None:
        yield f"{where} has no link {name}"
        return
    if not link.up:
        yield f"{where}'s link {name} is down"
    if link.mac != mac:
        yield f"{where}'s link {name} has the MAC {link.mac}, not {mac}"
    if link.mtu not in mtus:
        yield f"{where}'s link {name} has an MTU of {link.mtu}, not {mtus[-1]}"


def _missing(where: str, facts: set[str]) -> list[str]:
    return [f"{where} lacks {fact}" for fact in sorted(facts)]


def _families(wiring: Wiring) -> list[int]:
    return [_FAMILIES[version] for version in sorted({ip.version for ip in wiring.ips})]


def _route(ip: IPAddress, name: str) -> str:
    return f"the route to {ip} via {name}"


def _address(ip: IPAddress, name: str) -> str:
    return f"the address {ip} on {name}"


def _local(ip: IPAddress, name: str) -> str:
    return f"the route that delivers {ip} on {name}"


def _rule(ip: IPAddress, table: int) -> str:
    return f"the rule that packets from {ip} use table {table}"


def _neighbour(ip: IPAddress, mac: str, name: str) -> str:
    return f"the permanent neighbour {ip} at {mac} on {name}"


def _pool_route(pool: IPNetwork, gateway: IPAddress, source: IPAddress, metric: int, name: str) -> str:
    return f"the route to {pool} via {gateway} on {name} from {source} with metric {metric}"


def _default(gateway: IPAddress, table: int, name: str) -> str:
    return f"the default route via {gateway} on {name} in table {table}"
