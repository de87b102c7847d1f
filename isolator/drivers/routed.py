"""The ``routed`` driver: a veth pair and host routes; no bridge, no ARP, no neighbour discovery.

What is laid out at both ends, and why, is told in routed_layout.py; here it is carried out: the pair is
created straight into the container's namespace, each end is configured in one netlink batch, and a setup
that fails anywhere is undone in one place.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence

import structlog

from isolator import sysctl
from isolator.drivers import shaping
from isolator.drivers.base import Wiring
from isolator.drivers.naming import route_table, shaper_ifname
from isolator.drivers.routed_check import IPV6_MTU, damage, differences, smallest_mtu
from isolator.drivers.routed_layout import (
    HOST_MAC,
    RULE_PRIORITY,
    container_requests,
    host_requests,
    peer_index,
    reroute_requests,
)
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink import messages
from isolator.netlink.codec import Request
from isolator.netlink.far_end import FarEnd, far_end
from isolator.netlink.inventory import HostLink, delete_links, link_by_name, name_back, our_links, say
from isolator.netlink.node import Namespace, Node
from isolator.netlink.socket import NetlinkSocket

log = structlog.get_logger(__name__)

_ATTEMPTS = 3


class Routed:
    """See the module's docstring; implements ``Driver``."""

    name = "routed"

    def __init__(self, node: Node) -> None:
        self._node = node

    def setup(self, wiring: Wiring) -> None:
        """See Driver.setup."""
        if wiring.netns is None:
            raise NamespaceGone(
                f"the network namespace of {wiring.ifname} is not known; the container has ended"
            )
        with self._node.open_namespace(wiring.netns) as container:
            try:
                index = self._create(wiring, container)
                if _has_ipv6(wiring):
                    _allow_ipv6(wiring.host_ifname)
                self._node.route.execute(
                    [
                        *shaping.ingress_requests(wiring, index),
                        *shaping.egress_requests(wiring, index, self._node.seal),
                        *host_requests(wiring, index),
                    ]
                )
                with container.inside():
                    if _has_ipv6(wiring):
                        _allow_ipv6("lo", wiring.ifname)
                        _expect_no_duplicates(wiring.ifname)
                    with NetlinkSocket() as route:
                        route.execute(container_requests(wiring, peer_index(index)))
                link = self._verified_mac(wiring, index)
                self._node.route.execute([say(self._node, link, wiring.host_ifname, wiring.alias)])
            except BaseException:
                self._undo(wiring, container)
                raise

    def withdraw(self, wiring: Wiring, *, for_good: bool = False) -> None:
        """See Driver.withdraw.

        Link down is all it takes: the kernel drops the link's routes and neighbours with it, in both
        families, and only those of this very link. About 0.05 ms; it does not wait for a grace period.
        """
        requests = [messages.link_down(wiring.host_ifname)]
        if for_good:
            requests.append(messages.set_group(wiring.host_ifname, messages.DOOMED))
        self._node.route.execute(requests)

    def remove(self, wirings: Sequence[Wiring]) -> None:
        """See Driver.remove.

        The links go by name: whoever wires an endpoint of the same key anew must wait until this is done.
        """
        if any(link_by_name(self._node.route, wiring.host_ifname) is None for wiring in wirings):
            # It is gone, or somebody renamed it, and its container may live.
            links = our_links(self._node).values()
            for error in name_back(self._node, (link for link in links if link.name != link.own_name)):
                log.warning("an interface that somebody renamed is left", why=str(error))
        delete_links(self._node, [name for wiring in wirings for name in _links(wiring)])
        by_netns: defaultdict[str, list[Wiring]] = defaultdict(list)
        for wiring in wirings:
            if wiring.netns is not None:
                by_netns[wiring.netns].append(wiring)
        for netns, gone in by_netns.items():
            try:
                with self._node.open_namespace(netns) as container:
                    _delete_rules(container, gone)
            except (NamespaceGone, NotANamespace):
                continue
            except (KernelRefused, OSError) as error:
                # The interfaces are gone, which is what counts; a rule without its interface leads nowhere.
                log.warning("source rules are left in a namespace", netns=netns, why=str(error))

    def check(self, wiring: Wiring) -> list[str]:
        """See Driver.check."""
        limits = self.limit_differences([wiring]).get(wiring.host_ifname, [])
        return differences(self._node, wiring) + limits

    def damage(self, wiring: Wiring) -> list[str]:
        """See Driver.damage."""
        return damage(self._node, wiring)

    def repair(self, wiring: Wiring) -> list[str]:
        """See Driver.repair: the batches of ``setup`` may be repeated."""
        link = link_by_name(self._node.route, wiring.host_ifname)
        if link is None:
            return []
        refused = self._repair_host(wiring, link)
        if wiring.netns is not None:
            refused += self._repair_container(wiring)
        return refused

    def _repair_host(self, wiring: Wiring, link: HostLink) -> list[str]:
        """What the kernel refused, as sentences."""
        # Before anything of IPv6: without the MTU that it needs the kernel knows none on the link.
        first = _link_repairs(link, HOST_MAC, wiring.mtu, wiring.mtu)
        refused = [str(error) for error in self._node.route.attempt(first)]
        if _has_ipv6(wiring):
            refused += _refusals(_allow_ipv6, wiring.host_ifname)
        return refused + [str(error) for error in self._node.route.attempt(host_requests(wiring, link.index))]

    def _repair_container(self, wiring: Wiring) -> list[str]:
        """What the kernel refused, as sentences; nothing is done where the path leads to somebody else."""
        assert wiring.netns is not None
        try:
            with (
                self._node.open_namespace(wiring.netns) as container,
                far_end(self._node, container, wiring.host_ifname) as end,
            ):
                return _repair_inside(end, wiring)
        except (NamespaceGone, NotANamespace, KernelRefused):
            return []  # what is different after says so

    def reroute(self, before: Wiring, now: Wiring) -> bool:
        """See Driver.reroute."""
        if before.netns is None:
            return False
        with (
            self._node.open_namespace(before.netns) as container,
            far_end(self._node, container, before.host_ifname) as end,
        ):
            if not end.link.up:
                return False  # it takes no routes
            end.route.execute(reroute_requests(before, now, end.link.index))
        return True

    def limit_differences(self, wirings: Sequence[Wiring]) -> dict[str, list[str]]:
        """See Driver.limit_differences."""
        return shaping.differences(self._node, wirings)

    def restore_limits(self, wiring: Wiring) -> None:
        """See Driver.restore_limits."""
        shaping.restore(self._node, wiring)

    def _create(self, wiring: Wiring, container: Namespace) -> int:
        """Make the pair, both ends down; the index of the node's end.

        Indexes are ours to choose, so that later requests need not read them back. They lie far above
        those the kernel hands out; another of ours in the way is met by choosing again. What exists already,
        index or name, the kernel does not say.
        """
        for attempt in range(_ATTEMPTS):
            index = random.randrange(1 << 29, 1 << 30)
            create = messages.create_veth(
                name=wiring.host_ifname,
                index=index,
                mac=HOST_MAC,
                peer=wiring.ifname,
                peer_index=peer_index(index),
                peer_mac=wiring.mac,
                peer_netns=container.fd,
                mtu=wiring.mtu,
            )
            try:
                self._node.route.execute(
                    [
                        messages.delete_link(wiring.host_ifname),
                        create,
                        messages.no_link_local(index, wiring.host_ifname),
                    ]
                )
            except KernelRefused as error:
                if error.errno in (errno.EBUSY, errno.EEXIST) and attempt + 1 < _ATTEMPTS:
                    continue  # by the index if chance has it, else it will be so again
                if error.errno == errno.EEXIST:
                    raise KernelRefused(
                        f"the container {container.path} already has an interface {wiring.ifname} that is not ours; "
                        "remove it or ask for another name",
                        errno=errno.EEXIST,
                    ) from error
                raise
            return index
        raise AssertionError("the last attempt returns or raises")

    def _verified_mac(self, wiring: Wiring, index: int) -> HostLink:
        """udev may set a new link's MAC behind our back, and setting it can silently fail: read it back."""
        for _ in range(_ATTEMPTS):
            link = link_by_name(self._node.route, wiring.host_ifname)
            if link is None:
                raise KernelRefused(f"the link {wiring.host_ifname} vanished while it was set up; try again")
            if link.mac == HOST_MAC:
                return link
            self._node.route.execute([messages.set_mac(index, wiring.host_ifname, HOST_MAC)])
        raise KernelRefused(
            f"something on the node keeps changing the MAC of {wiring.host_ifname}; "
            "exclude mrg* from udev's MACAddressPolicy"
        )

    def _undo(self, wiring: Wiring, container: Namespace) -> None:
        """Leave nothing of a setup that failed: routes, addresses and neighbours go with the link."""
        with contextlib.suppress(KernelRefused):
            self._node.route.execute([messages.delete_link(name) for name in _links(wiring)])
        with contextlib.suppress(KernelRefused):
            _delete_rules(container, [wiring])


def _links(wiring: Wiring) -> list[str]:
    """Every link on the node that is, or may be, the endpoint's: what limits it may be left from an earlier one."""
    return [wiring.host_ifname, shaper_ifname(wiring.host_ifname)]


def _has_ipv6(wiring: Wiring) -> bool:
    return any(ip.version == 6 for ip in wiring.ips)


def _allow_ipv6(*names: str) -> None:
    """Runtimes like to turn IPv6 off in fresh namespaces, where ``lo`` carries what a container sends itself."""
    for name in names:
        sysctl.ensure(f"net/ipv6/conf/{name}/disable_ipv6", "0")


def _expect_no_duplicates(ifname: str) -> None:
    sysctl.ensure(f"net/ipv6/conf/{ifname}/accept_dad", "0")


def _refusals(work: Callable[..., None], *names: str) -> list[str]:
    """What the kernel said against it, as sentences."""
    try:
        work(*names)
    except KernelRefused as error:
        return [str(error)]
    return []


def _repair_inside(end: FarEnd, wiring: Wiring) -> list[str]:
    """What the kernel refused, as sentences. A link that the container gave another name is its own affair."""
    if end.link.name != wiring.ifname:
        return []
    first = _link_repairs(end.link, wiring.mac, smallest_mtu(wiring), wiring.mtu)
    refused = [str(error) for error in end.route.attempt(first)]
    if _has_ipv6(wiring):
        refused += _refusals(_allow_ipv6, "lo", wiring.ifname)
        refused += _refusals(_expect_no_duplicates, wiring.ifname)
    requests = container_requests(wiring, end.link.index)
    local = [messages.add_local_route(end.link.index, end.link.name, ip) for ip in wiring.ips]
    again = [*end.route.attempt(requests), *end.route.attempt(local)]
    # A route names a source, which has to be local before.
    left = end.route.attempt(requests) if again else []
    return refused + [str(error) for error in left]


def _link_repairs(link: HostLink, mac: str, smallest_mtu: int, mtu: int) -> list[Request]:
    todo = []
    if link.mac != mac:
        todo.append(messages.set_mac(link.index, link.name, mac))
    if not smallest_mtu <= link.mtu <= mtu:
        if link.mtu < IPV6_MTU <= mtu:
            # The kernel forgets all of IPv6 on such a link, and when it begins anew on one that is up it makes a
            # link-local address at once.
            todo.append(messages.link_down(link.name))
        todo.append(messages.set_mtu(link.index, link.name, mtu))
        todo.append(messages.no_link_local(link.index, link.name))
    return todo


def _delete_rules(container: Namespace, wirings: Sequence[Wiring]) -> None:
    """Routes and addresses went with the link, rules did not.

    An interface that is (again) there by the same name is somebody else's: the path may lead to another
    container by now, whose rules look the same.
    """
    requests: list[Request] = []
    with container.inside():
        present = {name for _, name in socket.if_nameindex()}
        for wiring in wirings:
            if wiring.ifname not in present:
                table = route_table(wiring.ifname)
                requests += [messages.delete_source_rule(ip, table, RULE_PRIORITY) for ip in wiring.ips]
        if requests:
            with NetlinkSocket() as route:
                route.execute(requests)
