"""The agent's two kernel threads: where everything that touches the kernel happens, one thing at a time.

The *wiring* thread serves ADD and DEL: policy elements and driver, about a millisecond each. The
*reaping* thread removes interfaces, which the kernel makes it wait for (about 16 ms whatever their
number), so nobody else waits behind it. Each has its own netlink socket; both stay in the agent's
network namespace but for the moments when they open a socket inside a container's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import structlog

from ipam.keys import Family, IPNetwork
from ipam.ranges import Ranges
from isolator import sysctl
from isolator.drivers import Driver, Repair, Wiring, load_driver
from isolator.drivers.naming import shaper_ifname
from isolator.errors import KernelRefused
from isolator.hostports import first_collision, taken_by, who_listens
from isolator.model import AttachSpec, Endpoint, EndpointState, IPAddress, PortMapping
from isolator.netlink import (
    HostLink,
    HostRoute,
    connections_of,
    delete_links,
    delete_routes,
    endpoint_routes,
    flush_conntrack,
    flush_ports,
    forget,
    name_back,
    our_links,
    pinned,
    say,
    shaper_links,
    sources,
)
from isolator.netlink.inventory import link_by_name
from isolator.netlink.lookup import Lookup, look_up, look_up_inside, neighbour_state
from isolator.netlink.messages import SHAPER_PREFIX
from isolator.netlink.seal import Seal
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.netlink.whereabouts import find_namespace, look_inside
from isolator.policy import Admission, Hosts, Isolation, Policy, Surroundings, Verdict
from isolator.policy.adopted import let_go
from isolator.policy.look import Look, look
from isolator.policy.sending import Packet, at_limit
from isolator.policy.table import wrong_in
from isolator.steps import reached
from isolator.surrounds import Found, surroundings
from isolator.sysctl import enable_forwarding
from isolator.thread import KernelThread
from isolator.tracking import Table, connection_table, fair_share
from isolator.underlay import Underlay, underlay
from isolator.vacancy import is_vacant
from isolator.written import for_alias

log = structlog.get_logger(__name__)


def wiring(endpoint: Endpoint) -> Wiring:
    """What a driver needs to know of an endpoint."""
    return Wiring(
        host_ifname=endpoint.host_ifname,
        ifname=endpoint.key.ifname,
        netns=endpoint.netns or None,
        ips=endpoint.ips,
        mac=endpoint.mac,
        mtu=endpoint.mtu,
        default_route=endpoint.default_route,
        bandwidth=endpoint.bandwidth,
        next_hop=endpoint.next_hop,
        pools=endpoint.pools,
        alias=for_alias(endpoint),
    )


def admission(endpoint: Endpoint, isolation: Isolation) -> Admission:
    """What the policy needs to know of an endpoint."""
    return Admission(
        host_ifname=endpoint.host_ifname,
        mac=endpoint.mac,
        ips=endpoint.ips,
        network=endpoint.network,
        netgroups=endpoint.netgroups or (endpoint.network,),
        isolation=isolation,
        ports=endpoint.port_mappings,
    )


def _settings(endpoint: Endpoint) -> dict[str, str]:
    """Settings that have to be 1 -> what is wrong where they are not."""
    conf, found = f"net/ipv4/conf/{endpoint.host_ifname}", {}
    if any(ip.version == 4 for ip in endpoint.ips):
        # Of each link its own; that of all, and of links to come, is ip_forward.
        found[f"{conf}/forwarding"] = f"the node does not forward IPv4 from {endpoint.host_ifname}"
        if endpoint.port_mappings:
            # The policy keeps the container from 127/8.
            found[f"{conf}/route_localnet"] = "the node does not reach its mapped ports by 127.0.0.1"
    return found


def _wrong_settings(endpoint: Endpoint) -> list[str]:
    return [says for name, says in _settings(endpoint).items() if sysctl.read(name) == "0"]


class _DriverThread(KernelThread):
    """A kernel thread with drivers of its own."""

    def __init__(self, name: str, seal: Seal) -> None:
        super().__init__(name, seal)
        self._drivers: dict[str, Driver] = {}

    def driver(self, name: str) -> Driver:
        """The driver ``name``, for use on this thread. Raises InvalidInput."""
        if name not in self._drivers:
            self._drivers[name] = load_driver(name, self.node)
        return self._drivers[name]


class Kernel:
    """See the module's docstring. Every method is atomic towards the others of its thread.

    seal: of what this node's interfaces say.
    """

    def __init__(self, seal: Seal) -> None:
        self._wiring = _DriverThread("moorage-wiring", seal)
        self._reaping = _DriverThread("moorage-reaping", seal)
        self._policy = self._wiring.call(Policy)
        self._reaping_netfilter = self._reaping.call(lambda: NetlinkSocket(NETLINK_NETFILTER))
        self._renamed: dict[str, str] = {}

    def close(self) -> None:
        self._wiring.call(self._policy.close)
        self._reaping.call(self._reaping_netfilter.close)
        self._wiring.close()
        self._reaping.close()

    # -- ADD, DEL and CHECK

    def check_namespace(self, path: str) -> None:
        """Raises NamespaceGone, NotANamespace. On the caller's thread: it only opens and looks."""
        with self._wiring.node.open_namespace(path):
            pass

    @contextlib.contextmanager
    def namespace_of(self, pid: int) -> Iterator[str]:
        """The path of a process's namespace, which does not go away inside; it stays good for as long as that is there.

        Raises NamespaceGone, NotANamespace. On the caller's thread, and at once: the number may be another's soon.
        """
        with self._wiring.node.open_namespace(f"/proc/{pid}/ns/net") as namespace:
            yield pinned(namespace)

    async def check_ports(self, spec: AttachSpec, families: Collection[int]) -> None:
        """Raises InvalidInput for a hostIP that is not the node's, PortTaken naming who of the node listens there."""
        found = await self._wiring.run(first_collision, self._wiring.node, spec, families)
        if found is not None:
            # It looks at every process: on the thread that no ADD waits for.
            who = await self._reaping.run(who_listens, self._reaping.node, found.listener)
            raise taken_by(spec, found, who)

    async def connect(self, endpoint: Endpoint, isolation: Isolation) -> None:
        """Admit the endpoint in the policy, then wire it; neither if either fails. isolation: its network's."""
        await self._wiring.run(self._connect, endpoint, isolation)

    def _connect(self, endpoint: Endpoint, isolation: Isolation) -> None:
        self._policy.admit(admission(endpoint, isolation))
        reached("attach:admitted")
        try:
            self._policy.verify(endpoint.host_ifname)
            self._wiring.driver(endpoint.driver).setup(wiring(endpoint))
            for name in _settings(endpoint):
                sysctl.ensure(name, "1")
        except BaseException:
            self._policy.revoke([endpoint.host_ifname])
            raise
        reached("attach:wired")

    async def disconnect(self, endpoint: Endpoint) -> None:
        """Stop all its traffic: withdraw it, then revoke it in the policy. The interface stays."""
        await self._wiring.run(self._disconnect, endpoint)

    def _disconnect(self, endpoint: Endpoint) -> None:
        try:
            ends = endpoint.state is EndpointState.DETACHING
            self._wiring.driver(endpoint.driver).withdraw(wiring(endpoint), for_good=ends)
        finally:
            self._policy.revoke([endpoint.host_ifname])

    async def readmit(self, endpoint: Endpoint, isolation: Isolation) -> None:
        """The endpoint's netgroups are different: who may call it, and what it is a member of.

        Raises KernelRefused, also when its interface does not say so: a start would take up what that says.
        """
        await self._wiring.run(self._policy.admit, admission(endpoint, isolation))
        if refused := await self.mark([endpoint]):
            raise refused[0]

    async def mark(self, endpoints: Sequence[Endpoint]) -> list[KernelRefused]:
        """Have the interfaces say what their endpoints are, for an agent that has lost its journal; what the kernel
        refused."""
        return await self._wiring.run(self._mark, endpoints)

    def _mark(self, endpoints: Sequence[Endpoint]) -> list[KernelRefused]:
        node = self._wiring.node
        links = {name: link_by_name(node.route, name) for name in (e.host_ifname for e in endpoints)}
        said = {e.host_ifname: for_alias(e) for e in endpoints}
        return node.route.attempt(
            [say(node, link, name, said[name]) for name, link in links.items() if link is not None]
        )

    async def remove(self, endpoints: Sequence[Endpoint]) -> None:
        """Remove disconnected endpoints' interfaces, and every connection of their addresses."""
        await self._reaping.run(self._remove, endpoints)
        # Once more: when they were disconnected the firewall may have been in nobody's state.
        await self._wiring.run(self._policy.revoke, [endpoint.host_ifname for endpoint in endpoints])

    def _remove(self, endpoints: Sequence[Endpoint]) -> None:
        for name in {endpoint.driver for endpoint in endpoints}:
            mine = [wiring(endpoint) for endpoint in endpoints if endpoint.driver == name]
            self._reaping.driver(name).remove(mine)
        flush_conntrack([ip for endpoint in endpoints for ip in endpoint.ips])

    async def look_up(self, dst: IPAddress, src: IPAddress | None, iif: str) -> Lookup:
        """Where the kernel would send a packet; see netlink/lookup.py."""
        return await self._wiring.run(look_up, self._wiring.node, dst, src, iif)

    async def look_up_inside(self, endpoint: Endpoint, dst: IPAddress) -> Lookup:
        """Where the kernel would send what nobody has bound in an endpoint's container; see netlink/lookup.py."""
        return await self._reaping.run(
            look_up_inside, self._reaping.node, endpoint.netns, endpoint.host_ifname, dst
        )

    async def neighbour_state(self, ip: IPAddress, device: str) -> str:
        """What the kernel knows of a neighbour; see netlink/lookup.py."""
        return await self._wiring.run(neighbour_state, self._wiring.node, ip, device)

    async def setting(self, name: str) -> str | None:
        """The value of a sysctl of the node, such as ``net/ipv4/ip_forward``."""
        return await self._wiring.run(sysctl.read, name)

    async def differences(self, endpoint: Endpoint) -> list[str]:
        """Sentences, one per difference between an endpoint and the kernel."""
        found = await self._reaping.run(self._check, endpoint)
        wrong = await self.wrong_sets()
        return found + await self._wiring.run(self._policy.differences, endpoint.host_ifname, wrong)

    def _check(self, endpoint: Endpoint) -> list[str]:
        return self._reaping.driver(endpoint.driver).check(wiring(endpoint)) + _wrong_settings(endpoint)

    async def damage(self, endpoint: Endpoint) -> list[str]:
        """What somebody took of its wiring, as sentences.

        On the reaping thread: it takes some 0.8 ms, most of the time there is nothing, and it changes nothing.
        """
        return await self._reaping.run(self._damage, endpoint)

    def _damage(self, endpoint: Endpoint) -> list[str]:
        return self._reaping.driver(endpoint.driver).damage(wiring(endpoint)) + _wrong_settings(endpoint)

    async def find_namespace(self, endpoint: Endpoint) -> str | None:
        """Where its namespace is, if the path to it is lost; see netlink/whereabouts.py."""
        return await self._reaping.run(find_namespace, self._reaping.node, endpoint.host_ifname)

    async def inside(self, host_ifname: str) -> tuple[str, str] | None:
        """The namespace that an interface leads to, and its name there; None if it is not found."""
        return await self._reaping.run(look_inside, self._reaping.node, host_ifname)

    async def repair(self, endpoint: Endpoint) -> Repair:
        """Put back what somebody took of its wiring. Raises KernelRefused."""
        before = await self.damage(endpoint)
        refused = await self._wiring.run(self._repair, endpoint) if before else []
        after = await self.damage(endpoint) if before else []
        return Repair(tuple(before), (*after, *refused))

    def _repair(self, endpoint: Endpoint) -> list[str]:
        refused = self._wiring.driver(endpoint.driver).repair(wiring(endpoint))
        for name in _settings(endpoint):
            if sysctl.read(name) == "0":
                sysctl.ensure(name, "1")
        return refused

    async def reroute(self, endpoint: Endpoint, pools: tuple[IPNetwork, ...]) -> bool:
        """Have its container's routes follow its network's pools; see Driver.reroute. On the thread that ADDs do not
        wait for."""
        return await self._reaping.run(self._reroute, endpoint, pools)

    def _reroute(self, endpoint: Endpoint, pools: tuple[IPNetwork, ...]) -> bool:
        before = wiring(endpoint)
        return self._reaping.driver(endpoint.driver).reroute(before, replace(before, pools=pools))

    async def limit_differences(self, endpoints: Sequence[Endpoint]) -> dict[str, list[str]]:
        """Sentences by host_ifname, for endpoints whose limits on traffic are not in place.

        On the reaping thread: it takes long where there are many, and changes nothing.
        """
        return await self._reaping.run(self._limit_differences, endpoints)

    def _limit_differences(self, endpoints: Sequence[Endpoint]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in {endpoint.driver for endpoint in endpoints}:
            mine = [wiring(endpoint) for endpoint in endpoints if endpoint.driver == name]
            found |= self._reaping.driver(name).limit_differences(mine)
        return found

    async def restore_limits(self, endpoint: Endpoint) -> None:
        """Put in place what is missing of its limits."""
        await self._wiring.run(self._restore_limits, endpoint)

    def _restore_limits(self, endpoint: Endpoint) -> None:
        self._wiring.driver(endpoint.driver).restore_limits(wiring(endpoint))

    async def is_vacant(self, endpoint: Endpoint) -> bool:
        """Whether no process is left in its namespace; see vacancy.py. On the thread that ADDs do not wait for."""
        return await self._reaping.run(is_vacant, self._reaping.node, endpoint)

    # -- the node as a whole

    async def underlay(self, link: str | None) -> Underlay:
        """What the node reaches the world through: ``link``, or the one with the default route."""
        # It reads all of the main table, where the fabric has thousands of routes.
        return await self._reaping.run(underlay, self._reaping.node, link)

    async def surroundings(self) -> Found:
        """What the node's own networks use; see surrounds.py."""
        return await self._reaping.run(surroundings, self._reaping.node)

    async def enable_forwarding(self) -> list[str]:
        """See sysctl.enable_forwarding."""
        return await self._wiring.run(enable_forwarding, self._wiring.node)

    async def links(self) -> dict[str, HostLink]:
        """Every endpoint interface of this node, by the name that it got from us, which one that somebody renamed has
        again."""
        return await self._wiring.run(self._links)

    def _links(self) -> dict[str, HostLink]:
        links = our_links(self._wiring.node)
        renamed = [link for link in links.values() if link.name != link.own_name]
        refused = name_back(self._wiring.node, renamed)
        names = {link.own_name: link.name for link in renamed}
        if names and names != self._renamed:
            log.warning(
                "interfaces were renamed by somebody; they are named as before",
                were=names,
                refused=[str(error) for error in refused],
            )
        self._renamed = names
        return {name: link for name, link in links.items() if not name.startswith(SHAPER_PREFIX)}

    async def mark_links(self, names: Collection[str]) -> None:
        """Have links of ours say their names, also those that an earlier version made, or whose seal's key was lost.
        names: of endpoints' interfaces; others may be anybody's."""
        await self._wiring.run(self._mark_links, {*names, *map(shaper_ifname, names)})

    def _mark_links(self, names: Collection[str]) -> None:
        node = self._wiring.node
        links = our_links(node).values()
        unmarked = [
            say(node, link, link.name) for link in links if not link.marked and link.own_name in names
        ]
        if refused := self._wiring.node.route.attempt(unmarked):
            log.warning("interfaces are known by name alone", why=str(refused[0]), count=len(refused))

    async def shapers(self) -> set[str]:
        """Names of all links of this node that limit endpoints' traffic."""
        return await self._wiring.run(shaper_links, self._wiring.node)

    async def routes(self) -> list[HostRoute]:
        """Every route to an endpoint on this node."""
        return await self._wiring.run(endpoint_routes, self._wiring.node)

    async def elements(self) -> set[tuple[str, IPAddress]]:
        """(interface, ip) of every element in the policy."""
        return await self._wiring.run(self._policy.elements)

    async def delete_links(self, names: Iterable[str]) -> None:
        await self._reaping.run(delete_links, self._reaping.node, list(names))

    async def delete_routes(self, routes: Iterable[HostRoute]) -> None:
        await self._wiring.run(delete_routes, self._wiring.node, list(routes))

    # -- policy

    async def restore_policy(
        self,
        admissions: Iterable[Admission],
        surroundings: Surroundings,
        *,
        keep_endpoints: bool = False,
        keep_others: bool = False,
    ) -> dict[str, str]:
        """Put the whole table in place, in one transaction; see Policy.restore."""
        return await self._wiring.run(
            self._restore_policy, list(admissions), surroundings, keep_endpoints, keep_others
        )

    def _restore_policy(
        self, admissions: list[Admission], surroundings: Surroundings, keep_endpoints: bool, keep_others: bool
    ) -> dict[str, str]:
        return self._policy.restore(
            admissions,
            replace(surroundings, connections=fair_share()),
            keep_endpoints=keep_endpoints,
            keep_others=keep_others,
        )

    async def macs(self) -> dict[str, str]:
        """Interface -> the MAC that the policy knows its container by."""
        return await self._wiring.run(self._policy.macs)

    async def adopt_policy(self, closed: Mapping[Family, Ranges]) -> list[str]:
        """Leave the table as it is, but for what no pool may have; see policy/adopted.py. Returns changed sets."""
        await self._wiring.run(self._policy.adopt)
        return await self._wiring.run(let_go, closed)

    async def set_surroundings(self, surroundings: Surroundings) -> list[IPAddress]:
        """Pools or networks changed; returns the addresses of endpoints that others may call now than before."""
        return await self._wiring.run(self._set_surroundings, surroundings)

    def _set_surroundings(self, surroundings: Surroundings) -> list[IPAddress]:
        return self._policy.set_surroundings(replace(surroundings, connections=fair_share()))

    async def hosts(self) -> Hosts:
        """What the policy knows of the machines under the containers."""
        return await self._wiring.run(lambda: self._policy.hosts)

    async def set_hosts(self, hosts: Hosts) -> None:
        await self._wiring.run(self._policy.set_hosts, hosts)

    async def set_others(self, changes: Sequence[tuple[IPAddress, tuple[str, ...]]]) -> list[IPAddress]:
        """Endpoints of other nodes changed; returns those that left a netgroup."""
        return await self._wiring.run(self._policy.set_others, changes)

    async def replace_others(self, known: Mapping[IPAddress, tuple[str, ...]]) -> None:
        await self._wiring.run(self._policy.replace_others, known)

    async def may_call(self, source: IPAddress, host_ifname: str) -> Verdict | None:
        """Whether an address may call an endpoint of this node; see Policy.may_call."""
        return await self._wiring.run(self._policy.may_call, source, host_ifname)

    async def may_send(self, source: IPAddress, target: IPAddress, packet: Packet) -> Verdict:
        """Whether an endpoint of this node may send such a packet; see Policy.may_send."""
        return await self._wiring.run(self._policy.may_send, source, target, packet)

    async def may_tunnel(self, source: IPAddress) -> Verdict:
        """Whether another node's address may send to this node's tunnel; see Policy.may_tunnel."""
        return await self._wiring.run(self._policy.may_tunnel, source)

    async def may_begin(self, host_ifname: str, ips: Sequence[IPAddress]) -> Verdict:
        """Whether an endpoint with these addresses has room for another connection."""
        limits = await self.connection_limits()
        found = await self._reaping.run(connections_of, ips)
        count = sum(connection.source in ips for connection in found)
        return at_limit(count, limits.get(host_ifname, count + 1))

    async def wrong_chains(self) -> list[str]:
        """The policy's chains that are not as they should be; see Policy.wrong_chains."""
        return await self._wiring.run(self._policy.wrong_chains)

    async def changes_of_others(self) -> int:
        """Another number as soon as somebody else changed any table; see Policy.changes_of_others."""
        return await self._wiring.run(self._policy.changes_of_others)

    async def look_at_firewalls(self, *, wants_accepts: bool) -> Look:
        """What other firewalls do to containers' traffic, once Docker's chain is as it should be; see policy/look.py.

        On the reaping thread: it takes as long as there are rules that forwarding passes.
        """
        return await self._reaping.run(look, wants_accepts=wants_accepts)

    async def wrong_sets(self) -> dict[str, set[str]]:
        """The policy's sets that do not hold what they should, as far as somebody else changed any rule of the node,
        and which of their elements differ.

        They are read on the reaping thread, since that takes as long as they are large. What differs may be a change
        of our own that came in between; what is so in two looks is not.
        """
        wrong: dict[str, set[str]] = {}
        for is_second in (False, True):
            snapshot = await self._wiring.run(self._policy.snapshot)
            if snapshot is None:
                return {}
            found = await self._reaping.run(wrong_in, self._reaping_netfilter, snapshot)
            if is_second:
                found = {
                    name: found[name] & wrong[name]
                    for name in found.keys() & wrong.keys()
                    if found[name] & wrong[name] or not found[name]
                }
            if not found:
                await self._wiring.run(self._policy.trust_sets, snapshot)
                return {}
            if await self._wiring.run(self._policy.is_still, snapshot):
                return found
            wrong = found
        return wrong

    # -- connections

    async def connection_table(self) -> Table:
        """How full the node's connection table is."""
        return await self._reaping.run(connection_table)

    async def connection_sources(self) -> Counter[IPAddress]:
        """How many tracked connections each address began."""
        return await self._reaping.run(sources)

    async def connection_limits(self) -> dict[str, int]:
        """Interface -> connections that its endpoint may have tracked."""
        return await self._wiring.run(self._policy.connection_limits)

    async def halt(self, host_ifnames: Sequence[str]) -> None:
        """Let these endpoints, and no others, begin no connections."""
        await self._wiring.run(self._policy.halt, host_ifnames)

    async def forget_connections(self, ips: Iterable[IPAddress]) -> None:
        """Delete every tracked connection of addresses."""
        await self._reaping.run(flush_conntrack, list(ips))

    async def forget_forbidden(self, ips: Iterable[IPAddress]) -> None:
        """Of those, only the TCP ones to endpoints of this node that the policy would not let begin now."""
        found = await self._reaping.run(connections_of, list(ips))
        if found and (doomed := await self._wiring.run(self._policy.forbidden, found)):
            await self._reaping.run(forget, doomed)

    async def forget_ports(self, mappings: Iterable[PortMapping]) -> None:
        """Delete the tracked UDP connections to ports that are mapped from now on."""
        ports = [m.host_port for m in mappings if m.protocol == "udp"]
        await self._reaping.run(flush_ports, self._reaping.node, ports)
