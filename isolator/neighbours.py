"""What is around this node's endpoints, told to the policy: the networks, the nodes, and other nodes' endpoints.

    catalogue, cluster  --told-->  here, gathered  --one transaction-->  sets of the table
                                                   --a moment later--->  connections of who left are forgotten

Sets first, connections afterwards, so that no new entry can appear behind. And connections off everybody's path: one
look through the kernel's table for all that left meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import ip_network

import structlog

from ipam import grace
from ipam.catalogue import Catalogue
from ipam.cluster import Cluster, Member
from ipam.errors import MoorageError
from ipam.isolation import STORE
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import Geometry
from ipam.ranges import without
from isolator.kernel import Kernel
from isolator.policy import Hosts, Surroundings, isolation_of
from isolator.registered import Registered

log = structlog.get_logger(__name__)

TUNNEL = "vxlan"
"""The fabric by which packets arrive on a device of its own."""

TELL_TOGETHER = 0.05
"""Seconds in which changes gather before the kernel is told: each transaction costs more than an element in it."""

REMOVED_AFTER = grace.SECONDS
"""Seconds after a node's removal in which it may register again; then the tunnel takes nothing from it any more. In a
store that somebody emptied, whose nodes assert anew what they hold, every one is removed for a moment."""

FORGET_TOGETHER = 1.0
"""Seconds in which addresses gather whose connections are to be forgotten: a look costs some 5 ms for one or many.
Nothing that is forbidden waits for this: the policy judges callers packet by packet."""


def surroundings(catalogue: Catalogue, assigned: Iterable[IPAddress] = ()) -> Surroundings:
    """Pools and networks, as the table needs them: without what nodes' own networks use, so that no packet between
    nodes, their gateways and the store is judged as a container's.

    assigned: addresses of containers. Of those, the ones that had theirs before a node said that it is connected to
    the same prefix stay containers', unless it is a node's very own.
    """
    networks = {network.name: network for network in catalogue.networks()}
    isolation = {name: isolation_of(network) for name, network in networks.items()}
    pools = catalogue.pools()
    parts = {pool.name: without(pool.cidr, catalogue.around.closed_to(pool)) for pool in pools}
    for ip in assigned:
        pool = catalogue.pool_of(ip) if is_inside(catalogue, ip) else None
        if pool is not None and not catalogue.around.is_firm(ip):
            parts[pool.name].append(ip_network(ip))

    def those(chosen: Callable[[Geometry], bool]) -> tuple[IPNetwork, ...]:
        return tuple(part for pool in pools if chosen(pool) for part in parts[pool.name])

    return Surroundings(
        pools=those(lambda _: True),
        nat_pools=those(lambda p: p.network in networks and networks[p.network].nat),
        open_pools=those(lambda p: p.network in isolation and isolation[p.network].open),
        tunnelled_pools=those(lambda p: p.network in networks and networks[p.network].fabric == TUNNEL),
        store_pools=those(lambda p: p.network in networks and STORE in networks[p.network].to_node),
        isolation=isolation,
    )


def is_inside(catalogue: Catalogue, ip: IPAddress) -> bool:
    """Whether an address lies in what nodes' own networks use, and a pool that is not forced must not."""
    pool = catalogue.pool_of(ip)
    forced = pool is not None and pool.forced
    return int(ip) in catalogue.around.closed(ip.version, forced=forced)


class Neighbours:
    """See the module's docstring. Its ``on_...`` are for catalogue and cluster to call.

    assigned_here: addresses of this node's own endpoints.
    """

    def __init__(
        self,
        node: str,
        kernel: Kernel,
        catalogue: Catalogue,
        assigned_here: Callable[[], Iterable[IPAddress]] = lambda: (),
    ) -> None:
        self._node = node
        self._kernel = kernel
        self._catalogue = catalogue
        self._assigned_here = assigned_here
        self._changed = asyncio.Event()
        self._networks_changed = False
        self._nodes_changed = False
        self._members_changed: dict[IPAddress, Member | None] = {}
        self._own_of_nodes: set[IPAddress] = set()
        self._registered = Registered(node)
        self._hosts: Hosts | None = None
        self._removed_at: dict[str, float] = {}
        self._look_again: asyncio.TimerHandle | None = None
        self._heard = False
        self._inherits = False
        self._defaults: dict[str, tuple[str, ...]] = {}
        self._leaving: dict[IPAddress, bool] = {}
        self._forgetting: asyncio.TimerHandle | None = None
        self._forget = asyncio.Event()

    # -- being told

    def on_catalogue(self) -> None:
        """Networks or pools are different."""
        self._networks_changed = True
        self._changed.set()

    def on_topology(self, _: set[str]) -> None:
        """Facts of nodes are different."""
        self._nodes_changed = True
        self._changed.set()

    def on_members(self, changes: Sequence[tuple[IPAddress, Member | None]]) -> None:
        """Addresses were assigned, changed netgroups, or are assigned no more."""
        for ip, member in changes:
            if int(ip) in self._catalogue.around.closed(ip.version, forced=False):
                self._networks_changed = self._networks_changed or is_inside(self._catalogue, ip)
            if self._heard:  # else all are read at once when all are there
                self._members_changed[ip] = member
            is_nodes_own = member is not None and member.own
            if is_nodes_own != (ip in self._own_of_nodes):
                (self._own_of_nodes.add if is_nodes_own else self._own_of_nodes.discard)(ip)
                self._nodes_changed = True
        self._changed.set()

    # -- telling the kernel

    async def tell(self, cluster: Cluster) -> None:
        """Tell the kernel of every change of catalogue and cluster, until cancelled.

        Raises KernelRefused. The policy knows all the same what should be, and is restored as that.
        """
        while True:
            await self._changed.wait()
            await asyncio.sleep(TELL_TOGETHER)
            self._changed.clear()
            try:
                await self.tell_of_networks(cluster)
                if self._heard or cluster.listed.is_set():
                    await self._tell_of_others(cluster)
            except BaseException:
                self._changed.set()  # what was not told yet is told by the next turn, not by the next change
                raise

    async def tell_of_networks(self, cluster: Cluster) -> None:
        """Tell the kernel of changes of the catalogue, if it was not told yet. Raises KernelRefused."""
        if not self._networks_changed:
            return
        self._networks_changed = False
        self._nodes_changed = True  # the tunnel may come into use, or go out of it
        self._changed.set()
        try:
            self.left(await self._kernel.set_surroundings(self.around(cluster)))
        except BaseException:
            self._networks_changed = True
            raise

    def around(self, cluster: Cluster) -> Surroundings:
        """What the policy has to know of pools and networks."""
        return surroundings(self._catalogue, self._inside(cluster))

    def _inside(self, cluster: Cluster) -> set[IPAddress]:
        """Assigned addresses in what nodes' own networks use. All are looked at only if there can be any."""
        around = self._catalogue.around
        if not any(around.closed_to(pool) for pool in self._catalogue.pools()):
            return set()
        assigned = (ip for ip, member in cluster.members() if not member.announced)
        everyone = (*self._assigned_here(), *assigned)
        return {
            ip
            for ip in everyone
            if int(ip) in around.closed(ip.version, forced=False) and is_inside(self._catalogue, ip)
        }

    async def _tell_of_others(self, cluster: Cluster) -> None:
        if self._nodes_changed:
            self._nodes_changed = False
            try:
                await self._tell_of_hosts(cluster)
            except BaseException:
                self._nodes_changed = True
                raise
        changes, self._members_changed = self._members_changed, {}
        if not self._heard or (self._inherits and cluster.is_settled):
            await self._tell_of_all(cluster)
        elif changes:
            left = list(changes)
            try:
                left = await self._kernel.set_others([(ip, self._netgroups(m)) for ip, m in changes.items()])
            finally:
                self._let_go({ip: changes[ip] is None for ip in left})

    async def _tell_of_all(self, cluster: Cluster) -> None:
        """What an earlier agent left in the table may be more than there is now. While the store is in doubt that
        stays: it may be what the store forgot."""
        before, self._heard = self._heard, True
        everyone = {ip: groups for ip, member in cluster.members() if (groups := self._netgroups(member))}
        try:
            if cluster.is_settled:
                await self._kernel.replace_others(everyone)
            else:
                await self._kernel.set_others(list(everyone.items()))
        except BaseException:
            self._heard = before
            raise
        self._inherits = not cluster.is_settled

    def _netgroups(self, member: Member | None) -> tuple[str, ...]:
        """Of another node's endpoint; this node's own speak for themselves, and nodes are no endpoints."""
        if member is None or member.own or member.node == self._node:
            return ()
        # One tuple for all that are equal: there may be a hundred thousand.
        return member.netgroups or self._defaults.setdefault(member.network, (member.network,))

    async def _tell_of_hosts(self, cluster: Cluster) -> None:
        if self._hosts is None:
            self._registered.inherit(await self._kernel.hosts())
        self._registered.hear(cluster.nodes())
        self._end_removed(cluster)
        self._hosts = self._registered.hosts(self._own_of_nodes, tunnelled=self._is_tunnelled())
        await self._kernel.set_hosts(self._hosts)

    def _end_removed(self, cluster: Cluster) -> None:
        """Nodes that were removed, and are not back after a while, are let go."""
        loop = asyncio.get_running_loop()
        self._removed_at = {
            name: self._removed_at.get(name, loop.time()) for name in cluster.removed - cluster.nodes().keys()
        }
        believed = cluster.is_settled and self._node in cluster.nodes()
        due = {name for name, at in self._removed_at.items() if at + REMOVED_AFTER <= loop.time()}
        for name in due if believed else ():
            self._registered.remove(name)
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        waiting = self._removed_at.keys() if not believed else self._removed_at.keys() - due
        if waiting:
            self._look_again = loop.call_later(REMOVED_AFTER, self.on_topology, set(waiting))

    def _is_tunnelled(self) -> bool:
        return any(network.fabric == TUNNEL for network in self._catalogue.networks())

    def tunnel_status(self, own: Collection[IPAddress]) -> dict[str, object]:
        """Who may send to this node's tunnel, for `moorage status`. own: this node's underlay addresses now, which are
        nobody else's while the store has others for its name, or none."""
        hosts = self._hosts
        return {
            "open": self._is_tunnelled() and (hosts is None or not hosts.tunnel),
            "addresses": len(hosts.underlays) if hosts is not None else 0,
            "unnamed": [str(ip) for ip in self._registered.unnamed if ip not in own],
        }

    # -- connections

    def left(self, ips: Sequence[IPAddress]) -> None:
        """These may call, or be called by, fewer than before. What is forbidden now is cut already; TCP connections
        of it are forgotten soon, so that who goes on sending is told."""
        self._let_go(dict.fromkeys(ips, False))

    def _let_go(self, ips: dict[IPAddress, bool]) -> None:
        """ips -> whether the address is nobody's any more."""
        for ip, gone in ips.items():
            self._leaving[ip] = gone or self._leaving.get(ip, False)
        if self._leaving and self._forgetting is None:
            loop = asyncio.get_running_loop()
            self._forgetting = loop.call_later(FORGET_TOGETHER, self._forget.set)

    async def forget(self) -> None:
        """Forget the connections of addresses that left, until cancelled. Raises KernelRefused."""
        while True:
            await self._forget.wait()
            self._forget.clear()
            self._forgetting = None
            leaving, self._leaving = self._leaving, {}
            try:
                await self._kernel.forget_connections([ip for ip, gone in leaving.items() if gone])
                await self._kernel.forget_forbidden([ip for ip, gone in leaving.items() if not gone])
            except MoorageError:
                self._let_go(leaving)
                raise
