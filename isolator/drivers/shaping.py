"""How an endpoint's bandwidth is limited: on the node's end of its veth, where the container cannot undo it.

      container                     node
      eth0  <------- veth ------->  mrgk2j…   root qdisc: tbf              limits what goes to the container
                                       | ingress qdisc, u32: everything
                                       v
                                    mrg-k2j…  (ifb) root qdisc: tbf        limits what comes from it
                                       |
                                       v      and back to mrgk2j…, as if it had come in just now

So the firewall, routing and conntrack see each packet once, with the interface it came by. The ifb is there only
where a limit on what comes from the container is; it outlives the veth, and is removed together with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ipam.rates import rate_text
from isolator.drivers.base import Wiring
from isolator.drivers.naming import shaper_ifname
from isolator.model import Limit
from isolator.netlink import messages, traffic
from isolator.netlink.codec import Request
from isolator.netlink.inventory import HostLink, our_links
from isolator.netlink.node import Node
from isolator.netlink.seal import Ends, Seal
from isolator.netlink.socket import NetlinkSocket
from isolator.netlink.traffic import Bucket, Discipline

_ETHERNET_HEADER = 14
_FEWEST_PACKETS = 10
"""Packets that may leave at once, at least: fewer, and a slow link's timers would cost it its rate."""
_BURST_TIME = 0.01
"""Seconds at its rate that make a burst when none was asked for."""
_LONGEST_BURST = 1.0
"""Seconds at its rate that a burst may last: engines ask for gigabytes when they mean to ask for nothing."""
_WAIT = 0.05
"""Seconds that a packet may wait in the queue, at the rate."""
_FEWEST_WAITING = 32
_LARGEST_QUEUE = 16 << 20
"""Packets, and bytes: room for one large segment of TCP, and no more of the node's memory than that."""


def bucket(limit: Limit, mtu: int) -> Bucket:
    """The token bucket that keeps to a limit."""
    rate = limit.rate // 8
    packet = mtu + _ETHERNET_HEADER
    burst = min(limit.burst // 8, round(rate * _LONGEST_BURST)) or round(rate * _BURST_TIME)
    queue = max(round(rate * _WAIT), _FEWEST_WAITING * packet)
    return Bucket(rate, max(burst, _FEWEST_PACKETS * packet), min(queue, _LARGEST_QUEUE))


def shaper_index(index: int) -> int:
    """The ifb's index, by that of the node's end; above those of both ends (routed_layout.peer_index)."""
    return index + (1 << 30)


def ingress_requests(wiring: Wiring, index: int) -> list[Request]:
    """What limits the traffic to the container; index: of the node's end."""
    limit = wiring.bandwidth.ingress
    return [] if limit is None else [traffic.set_bucket(index, wiring.host_ifname, bucket(limit, wiring.mtu))]


def egress_requests(wiring: Wiring, index: int, seal: Seal) -> list[Request]:
    """What limits the traffic from the container, in place of what is left of it."""
    limit = wiring.bandwidth.egress
    if limit is None:
        return []
    name, target = shaper_ifname(wiring.host_ifname), shaper_index(index)
    return [
        traffic.delete_ingress(index, wiring.host_ifname),
        messages.delete_link(name),
        traffic.create_ifb(name, target, wiring.mtu),
        messages.no_link_local(target, name),
        traffic.set_bucket(target, name, bucket(limit, wiring.mtu)),
        messages.link_up(target, name),
        messages.set_alias(target, name, seal.write(Ends(target, target, None), name)),
        *traffic.redirect_ingress(index, wiring.host_ifname, target),
    ]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the kernel has: our links by name, disciplines by (link, parent)."""

    links: Mapping[str, HostLink]
    disciplines: Mapping[tuple[int, int], Discipline]


def look(node: Node) -> Seen:
    """Read it."""
    links = our_links(node)
    ours = {link.index for link in links.values()}
    found = (
        traffic.parse_discipline(message)
        for message in node.route.dump(traffic.dump_disciplines())
        if traffic.link_of(message) in ours
    )
    return Seen(links, {(discipline.index, discipline.parent): discipline for discipline in found})


def differences(node: Node, wirings: Sequence[Wiring]) -> dict[str, list[str]]:
    """Sentences by the node's end, for endpoints whose limits are not in place.

    One whose node's end is gone has none to speak of.
    """
    limited = [wiring for wiring in wirings if wiring.bandwidth.ingress or wiring.bandwidth.egress]
    if not limited:
        return {}
    seen = look(node)
    found = {wiring.host_ifname: list(_differences(node.route, seen, wiring)) for wiring in limited}
    return {name: sentences for name, sentences in found.items() if sentences}


def restore(node: Node, wiring: Wiring) -> None:
    """Put in place what is not. Raises KernelRefused."""
    seen = look(node)
    link = seen.links.get(wiring.host_ifname)
    if link is None:
        return
    if any(_ingress_differences(seen, wiring, link.index)):
        node.route.execute(ingress_requests(wiring, link.index))
    if any(_egress_differences(node.route, seen, wiring, link.index)):
        node.route.execute(egress_requests(wiring, link.index, node.seal))


def _differences(route: NetlinkSocket, seen: Seen, wiring: Wiring) -> Iterator[str]:
    link = seen.links.get(wiring.host_ifname)
    if link is not None:
        yield from _ingress_differences(seen, wiring, link.index)
        yield from _egress_differences(route, seen, wiring, link.index)


def _ingress_differences(seen: Seen, wiring: Wiring, index: int) -> Iterator[str]:
    limit = wiring.bandwidth.ingress
    if limit is not None and not _limits(seen, index, bucket(limit, wiring.mtu)):
        yield f"the node lacks the limit of {rate_text(limit.rate)} on what leaves {wiring.host_ifname}"


def _egress_differences(route: NetlinkSocket, seen: Seen, wiring: Wiring, index: int) -> Iterator[str]:
    limit = wiring.bandwidth.egress
    if limit is None:
        return
    name = shaper_ifname(wiring.host_ifname)
    shaper = seen.links.get(name)
    if shaper is None or not shaper.up:
        yield f"the node has no link {name} that is up"
        return
    if not _limits(seen, shaper.index, bucket(limit, wiring.mtu)):
        yield f"the node lacks the limit of {rate_text(limit.rate)} on what leaves {name}"
    filters = (
        route.dump(traffic.dump_ingress_filters(index))
        if (index, traffic.INGRESS) in seen.disciplines
        else []
    )
    if shaper.index not in map(traffic.redirects_to, filters):
        yield f"the node does not redirect what comes in on {wiring.host_ifname} to {name}"


def _limits(seen: Seen, index: int, wanted: Bucket) -> bool:
    there = seen.disciplines.get((index, traffic.ROOT))
    return there is not None and there.is_bucket(wanted)
