"""The endpoints of this node: attach, detach, check. The walk of an ADD, in one sitting:

    attach(spec)
      1. authorise it by the network's rules          isolator/authorise.py
      2. take warm addresses, or allocated ones       ipam/holder.py, ipam/allocations.py
         and look whose the ports are that it maps    isolator/hostports.py
      3. journal: endpoint 'attaching' + addresses    isolator/journal.py, one commit
      4. admit it in the policy                       isolator/policy/, before the links go up
      5. wire the namespace                           isolator/drivers/, links up last
      6. journal: endpoint 'attached'
    and one undo path for all of them.

DEL goes the other way: isolator/removal.py.

Calls for one endpoint run one after the other, calls for different ones side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import structlog

from ipam.boottime import boottime
from ipam.catalogue import Catalogue
from ipam.coming_back import Asker
from ipam.errors import InvalidInput, TryAgain
from ipam.holder import Holder, Owner
from ipam.holdings import Conflict
from ipam.journal import AddressRow
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.named import AddressRequest
from ipam.netgroups import Netgroup
from ipam.networks import MTU
from ipam.records import Network
from ipam.shelf import Held
from isolator.authorise import authorise, authorise_netgroups, netgroups_of
from isolator.drivers.naming import host_ifname, mac_for
from isolator.errors import (
    EndpointExists,
    JournalUnwritable,
    KernelRefused,
    NotAttached,
    Superseded,
)
from isolator.fabric import VXLAN_PORT
from isolator.hostports import refuse_claimed, refuse_families, refuse_tunnel, unclaimed
from isolator.journal import Journal
from isolator.kernel import Kernel, admission
from isolator.locks import KeyedLocks
from isolator.model import (
    UNLIMITED,
    Asked,
    AttachSpec,
    Endpoint,
    EndpointKey,
    EndpointState,
    ValidAttachments,
    Work,
)
from isolator.netlink import HostLink
from isolator.policy import NETGROUPS, Isolation, Surroundings, isolation_of
from isolator.removal import Removal
from isolator.steps import reached
from isolator.vacancy import may_be_vacant
from isolator.written import for_record

log = structlog.get_logger(__name__)

TOMBSTONE_TTL = 120 * 10**9
"""Nanoseconds in which an ADD that was asked for before a DEL is refused (docs/design.md, section 7)."""

KNOWN_WITHIN = 1.0
"""Seconds from an ADD in which other nodes have usually heard of it; what they have not is told then."""

LOG_BEHIND = 0.002
"""Seconds by which the line of an ADD that succeeded is put off: formatting it takes longer than its reply."""

WIRE_ATTEMPTS = 5
"""Times that an ADD is tried while somebody else changes the firewall's table."""

WIRE_PAUSE = 0.1
"""Seconds before it is restored once more."""

ADMITTED = (EndpointState.ATTACHED, EndpointState.ATTACHING)
"""States whose traffic the firewall lets pass."""

COLLECTED = (EndpointState.ATTACHED, EndpointState.CONFLICT)
"""States that end when the interface, and so the namespace, is gone."""

ENDED_BY_GC = (*COLLECTED, EndpointState.MISSING)
"""States that end when an engine has the container no more."""


def owner(endpoint: Endpoint) -> Owner:
    """Whom its addresses are assigned to."""
    return Owner(
        container_id=endpoint.key.container_id,
        ifname=endpoint.key.ifname,
        engine=endpoint.engine,
        netgroups=endpoint.netgroups,
        labels=endpoint.labels,
        endpoint=for_record(endpoint),
    )


class Endpoints:
    """See the module's docstring.

    mtu_of: bytes, of networks that do not set their own. tunnel_port: UDP, of this node; no container gets it.
    prepare: has the kernel told of a network, by its name, if it was not told yet. around: what the policy has to know
    of networks, and of containers in what nodes use.
    """

    def __init__(
        self,
        boot_id: str,
        kernel: Kernel,
        journal: Journal,
        catalogue: Catalogue,
        holder: Holder,
        mtu_of: Callable[[Network], int],
        tunnel_port: int = VXLAN_PORT,
        *,
        prepare: Callable[[str], Awaitable[None]],
        around: Callable[[], Surroundings],
    ) -> None:
        self._boot_id = boot_id
        self._kernel = kernel
        self._journal = journal
        self._catalogue = catalogue
        self._holder = holder
        self._mtu_of = mtu_of
        self._tunnel_port = tunnel_port
        self._prepare = prepare
        self._around = around
        self._endpoints: dict[EndpointKey, Endpoint] = {}
        self._tombstones: dict[EndpointKey, Asked] = {}
        self._locks: KeyedLocks[EndpointKey] = KeyedLocks()
        self._attached_at: dict[EndpointKey, int] = {}
        self._not_admitted: dict[str, str] = {}
        self._without: dict[EndpointKey, tuple[str, list[str]]] = {}
        self._removal = Removal(kernel, journal, holder, self._endpoints, self._forgotten)

    def _forgotten(self, key: EndpointKey) -> None:
        self._attached_at.pop(key, None)
        self._without.pop(key, None)

    def load(self) -> None:
        """Start from the journal."""
        self._endpoints.update((endpoint.key, endpoint) for endpoint in self._journal.load_endpoints())
        buried = self._journal.load_tombstones()
        # Another boot's clock says nothing about this one's calls.
        self._tombstones = {key: asked for key, asked in buried.items() if asked.boot_id == self._boot_id}
        if over := buried.keys() - self._tombstones.keys():
            try:
                self._journal.drop_tombstones(over)
            except JournalUnwritable as error:
                log.warning(
                    "tombstones of an earlier boot stay in the journal", count=len(over), why=str(error)
                )

    # -- looking in

    def all(self) -> list[Endpoint]:
        return list(self._endpoints.values())

    def get(self, key: EndpointKey) -> Endpoint | None:
        return self._endpoints.get(key)

    def of_ip(self, ip: IPAddress) -> Endpoint | None:
        return next((e for e in self._endpoints.values() if ip in e.ips), None)

    def unknown_to_others(self) -> dict[EndpointKey, list[IPAddress]]:
        """Endpoints' addresses that other nodes do not know by all their netgroups yet; Holder.unknown_to_others.

        Not those of open networks: there nobody asks for netgroups.
        """
        found: dict[EndpointKey, list[IPAddress]] = {}
        for held in self._holder.unknown_to_others():
            endpoint = self.of_ip(held.ip)
            if endpoint is None or endpoint.state not in ADMITTED or self._isolation(endpoint.network).open:
                continue
            found.setdefault(endpoint.key, []).append(held.ip)
        return found

    def unknown_where(self, dst: IPAddress, endpoint: Endpoint) -> list[IPAddress]:
        """The addresses of ``endpoint`` that the node of ``dst`` may not know by netgroups, if it asks for these."""
        pool = self._catalogue.pool_of(dst)
        is_open = pool is not None and self._isolation(pool.network).open
        return [] if is_open or self.of_ip(dst) is not None else self._unknown(endpoint)

    # -- ADD

    async def attach(self, spec: AttachSpec) -> Endpoint:
        """Give a container an interface with addresses; the same request again gets the same answer.

        Raises NotFound (network), InvalidInput, Refused, NamespaceGone, NotANamespace, EndpointExists, Superseded,
        AddressTaken, PortTaken, TryAgain, KernelRefused, JournalUnwritable; nothing is left behind then.
        """
        reached("attach:begun")
        begun = time.monotonic()
        async with self._locks.of(spec.key):
            self.refuse_superseded(spec.key, spec.asked)
            known = await self._known(spec)
            if known is not None and known.state is EndpointState.ATTACHED:
                return known
            network = await self._catalogue.network(spec.network)
            if known is None:
                await self._authorise(spec, network)
            self._check_mtu(spec, network)
            self._kernel.check_namespace(spec.netns)
            if known is None:
                known = await self._begin(spec, network)
            attached = await self._connect(known, without_cooldown=spec.reservation is not None)
        loop = asyncio.get_running_loop()
        loop.call_later(LOG_BEHIND, self._tell, attached, time.monotonic() - begun)
        if self._unknown(attached) and not isolation_of(network).open:
            loop.call_later(KNOWN_WITHIN, self._tell_unknown, attached)
        return attached

    def _unknown(self, endpoint: Endpoint) -> list[IPAddress]:
        return [ip for ip in endpoint.ips if self._holder.is_unknown_to_others(ip)]

    def _tell_unknown(self, endpoint: Endpoint) -> None:
        """Only while it is so: usually the store has confirmed by now."""
        if self._endpoints.get(endpoint.key) is endpoint and (unknown := self._unknown(endpoint)):
            log.warning(
                "endpoint is not known to other nodes yet by all of its netgroups; members there of none but those "
                "neither reach it nor are reached",
                endpoint=str(endpoint.key),
                ips=[str(ip) for ip in unknown],
                netgroups=endpoint.netgroups,
                why=self._holder.problem or "the store has not confirmed it",
            )

    @staticmethod
    def _tell(endpoint: Endpoint, seconds: float) -> None:
        log.info(
            "endpoint attached",
            endpoint=str(endpoint.key),
            ips=[str(ip) for ip in endpoint.ips],
            network=endpoint.network,
            ms=round(seconds * 1000, 1),
        )

    def refuse_superseded(self, key: EndpointKey, asked: Asked) -> None:
        """Raises Superseded when the endpoint's DEL was asked for after this."""
        buried = self._tombstones.get(key)
        if buried is not None and buried.boot_id == asked.boot_id and buried.at > asked.at:
            raise Superseded(
                f"the ADD of {key} was asked for before its DEL, which came first; nothing needs to be done"
            )

    async def _authorise(self, spec: AttachSpec, network: Network) -> None:
        """Step 1. What was allowed when it was asked for first stays so."""
        # So were allocated addresses, when they were allocated.
        reserved = set(spec.ips) if spec.allocated else set()
        if spec.ips and not spec.allocated and spec.reservation is not None:
            if not self._catalogue.reserved_under(spec.reservation, network.name):
                await self._catalogue.look_again(f"the reservation {spec.reservation!r}")
            reserved = {r.ip for r in self._catalogue.reserved_under(spec.reservation, network.name)}
        # What it had a moment ago it does not choose.
        reserved |= self._holder.coming_back(_asker(spec), network.name)
        authorise(spec, network, self._catalogue.pools_of(network), reserved)

    def _check_mtu(self, spec: AttachSpec, network: Network) -> None:
        if spec.mtu is not None and spec.mtu < MTU[0] and self._catalogue.pools_of(network, 6):
            raise InvalidInput(
                f"an MTU of {spec.mtu} is too small for IPv6, which network {network.name} has; at least {MTU[0]} is"
            )

    async def _known(self, spec: AttachSpec) -> Endpoint | None:
        """The endpoint as this same request left it, None to begin anew. Raises EndpointExists."""
        known = self._endpoints.get(spec.key)
        if known is None:
            return None
        if known.request_id == spec.request_id and known.state in (
            EndpointState.ATTACHED,
            EndpointState.ATTACHING,
        ):
            return known
        if known.state is EndpointState.ATTACHED and known.host_ifname in await self._kernel.links():
            raise EndpointExists(
                f"{spec.key} is attached already with {', '.join(map(str, known.ips))}; "
                "send its DEL first, or use another container id or interface name"
            )
        # Its namespace is gone, or its end has begun: complete that first.
        await self._removal.begin(known)
        try:
            await self._removal.ended(known.key)
        except TimeoutError as error:
            raise TryAgain(
                f"the interface of an earlier {known.key} is not removed yet; see the agent's log, then try again"
            ) from error
        return None

    async def _begin(self, spec: AttachSpec, network: Network) -> Endpoint:
        """Steps 2 and 3. An ADD that is resumed does not come here: it has its ports already."""
        lent = await self._lend(spec, network)
        reached("attach:lent")
        try:
            if spec.port_mappings:
                await self._check_ports(spec, lent)
        except BaseException:
            self._holder.put_back(lent)
            raise
        endpoint = self._endpoint(spec, network, lent)
        rows = self._holder.plan_assign(lent, replace(owner(endpoint), reservation=spec.reservation or ""))
        endpoint = replace(endpoint, since=rows[0].record.since)
        try:
            with self._journal.transaction():
                self._journal.save_endpoint(endpoint)
                self._journal.save_addresses(rows)
        except BaseException:
            self._holder.put_back(lent)
            raise
        self._holder.accept(rows)
        self._endpoints[endpoint.key] = endpoint
        reached("attach:journalled")
        return endpoint

    async def _lend(self, spec: AttachSpec, network: Network) -> list[Held]:
        if spec.allocated:
            return self._holder.allocations.lend(spec.ips)
        return await self._holder.take(
            AddressRequest(
                network=network,
                ips=spec.ips,
                reservation=spec.reservation,
                pool=spec.pool,
                netgroups=netgroups_of(spec),
                asker=_asker(spec),
            )
        )

    async def _check_ports(self, spec: AttachSpec, lent: Sequence[Held]) -> None:
        """Raises InvalidInput for a mapping that would be dead, PortTaken naming who has a port of the node."""
        families = {held.ip.version for held in lent}
        refuse_families(spec, families)
        refuse_tunnel(spec, self._tunnel_port)
        await self._kernel.check_ports(spec, families)
        # Last, and nothing is waited for from here to the journal: else two ADDs may both find the port free.
        refuse_claimed(spec, (e for e in self._endpoints.values() if e.state in ADMITTED))

    def _endpoint(self, spec: AttachSpec, network: Network, lent: Sequence[Held]) -> Endpoint:
        ips = tuple(held.ip for held in lent)
        return Endpoint(
            key=spec.key,
            state=EndpointState.ATTACHING,
            request_id=spec.request_id,
            asked=spec.asked,
            engine=spec.engine,
            network=network.name,
            driver=network.driver,
            netns=spec.netns,
            ips=ips,
            host_ifname=host_ifname(spec.key),
            mac=spec.mac or mac_for(ips),
            mtu=spec.mtu or network.mtu or self._mtu_of(network),
            netgroups=netgroups_of(spec),
            labels=spec.labels,
            default_route=spec.default_route,
            nameservers=tuple(network.dns),
            search=tuple(network.search),
            since=time.time(),
            port_mappings=spec.port_mappings,
            bandwidth=spec.bandwidth.within(network.max_bandwidth),
            engine_network=spec.engine_network,
            next_hop=network.next_hop,
            pools=self._catalogue.cidrs_of(network, {ip.version for ip in ips}),
        )

    async def _connect(self, endpoint: Endpoint, *, without_cooldown: bool = False) -> Endpoint:
        """Steps 4 to 6, and the one undo path."""
        try:
            if without_cooldown:
                # The address may come from another node, and what its last owner had is not forgotten here yet.
                await self._kernel.forget_connections(endpoint.ips)
            await self._wire(endpoint)
            attached = replace(endpoint, state=EndpointState.ATTACHED)
            self._journal.save_endpoint(attached)
        except BaseException:
            await self._removal.begin(endpoint)
            with contextlib.suppress(TimeoutError):
                await self._removal.ended(endpoint.key)
            raise
        self._endpoints[endpoint.key] = attached
        self._attached_at[endpoint.key] = boottime()
        reached("attach:attached")
        if any(mapping.protocol == "udp" for mapping in endpoint.port_mappings):
            await self._kernel.forget_ports(endpoint.port_mappings)
        return attached

    async def _wire(self, endpoint: Endpoint) -> None:
        """Raises KernelRefused, also if somebody changes the firewall as often as it is restored."""
        for attempts_left in reversed(range(WIRE_ATTEMPTS)):
            try:
                await self._prepare(endpoint.network)
                await self._kernel.connect(endpoint, self._isolation(endpoint.network))
            except KernelRefused as error:
                if not attempts_left or error.errno != errno.ENOENT or await self._policy_is_whole():
                    raise
                # Somebody flushed the ruleset, or a set, a moment ago, and may not have come to an end yet.
                if attempts_left < WIRE_ATTEMPTS - 1:
                    await asyncio.sleep(WIRE_PAUSE)
                await self.restore_policy()
                log.warning(
                    "firewall table inet moorage was missing or changed; restored", met_by=str(endpoint.key)
                )
            else:
                return

    async def _policy_is_whole(self) -> bool:
        return not await self._kernel.wrong_chains() and not await self._kernel.wrong_sets()

    async def restore_policy(self, *, keep_endpoints: bool = False, keep_others: bool = False) -> None:
        """Put the firewall's table in place for what is attached; see Policy.restore for what may be kept."""
        around = self._around()
        admitted = [
            admission(endpoint, around.isolation.get(endpoint.network, NETGROUPS))
            for endpoint in self._endpoints.values()
            if endpoint.state in ADMITTED
        ]
        refused = await self._kernel.restore_policy(
            admitted, around, keep_endpoints=keep_endpoints, keep_others=keep_others
        )
        for name, why in refused.items():
            if self._not_admitted.get(name) != why:
                log.error("endpoint is not admitted by the firewall", interface=name, why=why)
        self._not_admitted = refused

    def _isolation(self, name: str) -> Isolation:
        """A network's; that of one that is not known allows netgroups only."""
        return next((isolation_of(n) for n in self._catalogue.networks() if n.name == name), NETGROUPS)

    # -- DEL

    async def detach(self, key: EndpointKey, asked: Asked) -> None:
        """Take a container's interface away and release its addresses; succeeds always and repeatedly.

        Returns when nothing can reach the container any more; the rest follows within moments. A DEL
        that was asked for before the endpoint's ADD, or in another boot, concerns an earlier endpoint of
        that name and changes nothing.
        """
        reached("detach:begun")
        async with self._locks.of(key):
            self._bury(key, asked)
            endpoint = self._endpoints.get(key)
            if endpoint is None:
                await self._removal.remove_stray(key)
            elif asked.boot_id == endpoint.asked.boot_id and asked.at >= endpoint.asked.at:
                await self._removal.begin(endpoint)

    async def undo_unfinished(self, key: EndpointKey, request_id: str) -> None:
        """Undo an ADD that a killed agent had begun and whose caller did not come back for it."""
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            unfinished = endpoint is not None and endpoint.state is EndpointState.ATTACHING
            if endpoint is not None and unfinished and endpoint.request_id == request_id:
                log.warning("ADD undone: its caller went away", endpoint=str(key))
                await self._removal.begin(endpoint)

    async def end(
        self, key: EndpointKey, *, only_if_gone: bool = False, request_id: str | None = None
    ) -> bool:
        """Detach what is there under that key, and wait until it is gone; says whether it is.

        only_if_gone: leave it if its interface is there, in a namespace with a process. request_id: leave it if it
        is another ADD's. Raises TimeoutError.
        """
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is None or request_id not in (None, endpoint.request_id):
                return True
            if only_if_gone and not await self._is_gone(endpoint):
                return False
            await self._removal.begin(endpoint)
            await self._removal.ended(key)
            return True

    async def end_missing(self, endpoint: Endpoint) -> bool:
        """End one that was missing, and wait until it is gone; says whether it is. Not one that is seen again, whether
        or not it is connected yet. Raises KernelRefused, TimeoutError."""
        async with self._locks.of(endpoint.key):
            current = self._endpoints.get(endpoint.key)
            if current is None or current.request_id != endpoint.request_id:
                return True
            if current.state is EndpointState.MISSING:
                if current.host_ifname in await self._kernel.links():
                    return False
                await self._removal.begin(current)
            elif current.state is not EndpointState.DETACHING:
                return False
            await self._removal.ended(current.key)
            return True

    async def collect_garbage(self, valid: ValidAttachments) -> None:
        """Detach what an engine has no more; returns when it is gone. Raises TryAgain naming all that is still there.

        What was not attached yet when the engine was asked stays: the engine could not know of it. After a restart
        the moment of its ADD has to do for that.
        """
        garbage = [
            endpoint
            for endpoint in self._endpoints.values()
            if endpoint.state in ENDED_BY_GC
            and valid.lacks(endpoint)
            and self._attached_at.get(endpoint.key, endpoint.asked.at) < valid.asked.at
        ]
        for endpoint in garbage:
            log.info("endpoint collected: its engine has it no more", endpoint=str(endpoint.key))
        ends = await asyncio.gather(
            *(self.end(endpoint.key, request_id=endpoint.request_id) for endpoint in garbage),
            return_exceptions=True,
        )
        left = [
            f"{endpoint.key} ({str(end) or 'the kernel does not let go of it'})"
            for endpoint, end in zip(garbage, ends, strict=True)
            if isinstance(end, BaseException)
        ]
        if left:
            raise TryAgain(
                f"{len(left)} of {len(garbage)} endpoints that were left over are not removed yet: "
                f"{', '.join(left)}; the agent goes on, and its log says what hinders it"
            )

    async def _is_gone(self, endpoint: Endpoint) -> bool:
        if endpoint.state is EndpointState.MISSING:
            return False  # that is what nobody knows
        if (
            endpoint.state is EndpointState.DETACHING
            or endpoint.host_ifname not in await self._kernel.links()
        ):
            return True
        return may_be_vacant(endpoint) and await self._kernel.is_vacant(endpoint)

    def _bury(self, key: EndpointKey, asked: Asked) -> None:
        newest = self._tombstones.get(key)
        if asked.boot_id != self._boot_id or (newest is not None and newest.at >= asked.at):
            return
        self._tombstones[key] = asked
        expired = [k for k, a in self._tombstones.items() if a.at < boottime() - TOMBSTONE_TTL]
        for other in expired:
            del self._tombstones[other]
        try:
            with self._journal.transaction():
                self._journal.save_tombstone(key, asked)
                self._journal.drop_tombstones(expired)
        except JournalUnwritable as error:
            log.warning("DEL goes on without its tombstone", endpoint=str(key), why=str(error))

    async def reap(self) -> None:
        """Remove what was cut off, in batches, until cancelled."""
        await self._removal.run()

    # -- what it is for

    def work_of(self, endpoint: Endpoint) -> Work | None:
        """What an endpoint is for, None if nobody has told yet."""
        for ip in endpoint.ips:
            held = self._holder.held(ip)
            record = held.record if held is not None else None
            if record is not None and (record.container_id, record.ifname) == tuple(endpoint.key):
                return Work(record.framework, record.task, record.app) if record.framework else None
        return None

    def tell_work(self, endpoint: Endpoint, work: Work) -> None:
        """Record with its addresses what an endpoint is for. Raises JournalUnwritable."""
        rows = self._holder.plan_change(
            endpoint.ips, endpoint.key, framework=work.framework, task=work.task, app=work.app
        )
        self._journal.save_addresses(rows)
        self._holder.accept(rows)

    # -- netgroups of a live endpoint

    async def set_netgroups(self, key: EndpointKey, netgroups: Sequence[Netgroup]) -> bool:
        """Give an attached endpoint other netgroups without a restart; returns whether it left one.

        Raises NotAttached, Refused, JournalUnwritable, KernelRefused; it has those from before then. Whoever it left
        has to be cut off: the caller forgets its connections.
        """
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is None or endpoint.state is not EndpointState.ATTACHED:
                raise NotAttached(
                    f"{key} is not attached on this node (any more); see `moorage endpoint list`"
                )
            network = await self._catalogue.network(endpoint.network)
            wanted = tuple(netgroups) or (Netgroup(network.name),)
            authorise_netgroups(str(key), wanted, network)
            changed = replace(endpoint, netgroups=wanted)
            self._keep_netgroups(changed)
            try:
                await self._kernel.readmit(changed, isolation_of(network))
            except KernelRefused:
                # A start would take those that the interface says.
                self._keep_netgroups(endpoint)
                with contextlib.suppress(KernelRefused):
                    await self._kernel.readmit(endpoint, isolation_of(network))
                raise
            log.info("netgroups changed", endpoint=str(key), before=endpoint.netgroups, now=wanted)
            return not set(endpoint.netgroups) <= set(wanted)

    def _keep_netgroups(self, endpoint: Endpoint) -> None:
        """In the journal, and to be told to the store. Raises JournalUnwritable."""
        rows = self._holder.plan_change(endpoint.ips, endpoint.key, netgroups=list(endpoint.netgroups))
        with self._journal.transaction():
            self._journal.save_endpoint(endpoint)
            self._journal.save_addresses(rows)
        self._endpoints[endpoint.key] = endpoint
        self._holder.accept(rows)

    # -- CHECK and what happens by itself

    async def check(self, key: EndpointKey, netns: str = "") -> Endpoint:
        """The endpoint, if kernel and IPAM are as it says. Raises NotAttached naming every difference.

        netns: where the caller says it is; believed if the journal lost it.
        """
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is None or endpoint.state is not EndpointState.ATTACHED:
                state = "unknown" if endpoint is None else endpoint.state.value
                raise NotAttached(f"{key} is {state} on this node; it needs an ADD")
            if not endpoint.netns and netns:
                self._kernel.check_namespace(netns)
                endpoint = replace(endpoint, netns=netns)
                self.adopt(endpoint)
            wrong = await self._kernel.differences(endpoint)
            assigned = self._holder.assigned()
            wrong.extend(f"{ip} is not assigned to it" for ip in endpoint.ips if ip not in assigned)
            if wrong:
                raise NotAttached(
                    f"{key} is not as it was attached: {'; '.join(wrong)}; the agent puts back what it can, "
                    "so send DEL and ADD if a CHECK says the same after 10 s"
                )
            return endpoint

    async def collect(self, names: Sequence[str] | None = None) -> None:
        """Detach endpoints whose interface is gone, because their namespace is.

        names: of node ends that were seen to vanish, or to be renamed, which is undone; None looks at all. A link that
        has the name of one that vanished is another one, unless this node sealed what it says.
        """
        if names is not None and not any(
            e.host_ifname in names and e.state in COLLECTED for e in self._endpoints.values()
        ):
            return
        links = await self._kernel.links()
        for endpoint in self.all():
            suspect = names is None or endpoint.host_ifname in names
            if suspect and endpoint.state in COLLECTED and not _is_there(endpoint, links, names):
                async with self._locks.of(endpoint.key):
                    unchanged = self._endpoints.get(endpoint.key) is endpoint
                    # Looked at again: it may have been wired after the first look.
                    if unchanged and not _is_there(endpoint, await self._kernel.links(), names):
                        log.info(
                            "endpoint collected: its interface is gone, with its namespace or by itself",
                            endpoint=str(endpoint.key),
                            interface=endpoint.host_ifname,
                        )
                        await self._removal.begin(endpoint)

    @contextlib.asynccontextmanager
    async def unchanged(self, endpoint: Endpoint) -> AsyncIterator[bool]:
        """Whether nothing happened to it since it was looked up; nothing does while the block runs."""
        async with self._locks.of(endpoint.key):
            yield self._endpoints.get(endpoint.key) is endpoint

    def moved(self, endpoint: Endpoint, netns: str) -> Endpoint:
        """Another path leads to its namespace now. For who has it ``unchanged``."""
        changed = replace(endpoint, netns=netns)
        self._endpoints[endpoint.key] = changed
        try:
            self._journal.save_endpoint(changed)
        except JournalUnwritable as error:
            log.warning(
                "path is not journalled; it is looked for again after a restart",
                endpoint=str(endpoint.key),
                why=str(error),
            )
        return changed

    def misrouted(self) -> list[Endpoint]:
        """Attached endpoints whose containers do not have routes to the pools that their networks have now.

        Those of containers with several first: to them it matters. One whose namespace is not known, or whose
        network is not wholly known, is left as it is.
        """
        wanted: dict[tuple[str, frozenset[Family]], tuple[IPNetwork, ...] | None] = {}
        found = [
            endpoint
            for endpoint in self._endpoints.values()
            if endpoint.state is EndpointState.ATTACHED
            and endpoint.netns
            and self._pools_for(endpoint, wanted) not in (None, endpoint.pools)
        ]
        shared = Counter(key.container_id for key in self._endpoints)
        return sorted(found, key=lambda endpoint: shared[endpoint.key.container_id] == 1)

    def _pools_for(
        self,
        endpoint: Endpoint,
        known: dict[tuple[str, frozenset[Family]], tuple[IPNetwork, ...] | None],
    ) -> tuple[IPNetwork, ...] | None:
        """Its network's pools now; None while they are not known. known: what was found for others."""
        families = frozenset(ip.version for ip in endpoint.ips)
        if (endpoint.network, families) not in known:
            network = self._catalogue.wholly_known(endpoint.network)
            known[endpoint.network, families] = (
                self._catalogue.cidrs_of(network, families) if network is not None else None
            )
        return known[endpoint.network, families]

    async def reroute(self, endpoint: Endpoint) -> bool:
        """Have its container's routes follow its network's pools; says whether they do.

        Raises KernelRefused, NamespaceGone, NotANamespace, JournalUnwritable.
        """
        async with self._locks.of(endpoint.key):
            pools = self._pools_for(endpoint, {})
            if self._endpoints.get(endpoint.key) is not endpoint or pools is None:
                return False
            if not await self._kernel.reroute(endpoint, pools):
                return False
            changed = replace(endpoint, pools=pools)
            self._journal.save_endpoint(changed)
            self._endpoints[endpoint.key] = changed
            return True

    async def restore_limits(self) -> None:
        """Put back what somebody took away of the limits on endpoints' traffic."""
        limited = [e for e in self.all() if e.state is EndpointState.ATTACHED and e.bandwidth != UNLIMITED]
        missing = await self._kernel.limit_differences(limited) if limited else {}
        for endpoint in limited:
            if endpoint.host_ifname not in missing:
                continue
            async with self._locks.of(endpoint.key):
                # Not of one that is on its way out: what is made now would be left behind.
                if self._endpoints.get(endpoint.key) is not endpoint:
                    continue
                why = "; ".join(missing[endpoint.host_ifname])
                try:
                    await self._kernel.restore_limits(endpoint)
                except KernelRefused as error:
                    log.error("limits are missing", endpoint=str(endpoint.key), missing=why, why=str(error))
                else:
                    log.warning("limits were missing; restored", endpoint=str(endpoint.key), missing=why)

    async def cut_off(self, conflict: Conflict) -> bool:
        """The store gave an address of ours to somebody else: its endpoint must not answer for it. One that is missing
        stays so, until it is known what became of it.

        Returns whether that is so now; if not, the caller tries again.
        """
        endpoint = self.of_ip(conflict.ip)
        if endpoint is None:
            return True
        async with self._locks.of(endpoint.key):
            current = self._endpoints.get(endpoint.key)
            if current is None or current.state is EndpointState.DETACHING:
                return True
            log.error(
                "CONFLICT: endpoint is cut off, its address belongs to another",
                endpoint=str(current.key),
                ip=str(conflict.ip),
                holder_node=conflict.holder.node,
                holder_container=conflict.holder.container_id,
            )
            is_missing = current.state is EndpointState.MISSING
            cut = current if is_missing else replace(current, state=EndpointState.CONFLICT)
            self._endpoints[current.key] = cut
            try:
                await self._kernel.disconnect(cut)
            except Exception as error:
                log.error(
                    "endpoint in conflict is not cut off yet", endpoint=str(current.key), why=repr(error)
                )
                return False
            try:
                self._journal.save_endpoint(cut)
            except JournalUnwritable as error:
                # A restart asks the store again, and learns the same.
                log.warning("conflict is not journalled", endpoint=str(current.key), why=str(error))
            return True

    async def reconnect(self, endpoint: Endpoint) -> bool:
        """Let traffic flow again to one that was cut off, or was missing, and is as it should be; says whether it does.

        One whose interface is not there stays as it is. One that was missing, and has not all of its addresses any
        more, is cut off from now on. A port of the node that another endpoint has by now is not its own any more.
        Raises KernelRefused, JournalUnwritable, NotFound (network).
        """
        async with self._locks.of(endpoint.key):
            stopped = (EndpointState.CONFLICT, EndpointState.MISSING)
            if self._endpoints.get(endpoint.key) is not endpoint or endpoint.state not in stopped:
                return False
            if endpoint.host_ifname not in await self._kernel.links():
                return False
            if endpoint.state is EndpointState.MISSING and not self._has_all(endpoint):
                cut = replace(endpoint, state=EndpointState.CONFLICT)
                await self._kernel.disconnect(cut)
                self._journal.save_endpoint(cut)
                self._endpoints[cut.key] = cut
                log.error(
                    "CONFLICT: endpoint is seen again and stays cut off, an address of it belongs to another",
                    endpoint=str(cut.key),
                    ips=[str(ip) for ip in cut.ips],
                )
                return False
            ports, taken = unclaimed(
                endpoint.port_mappings, (e for e in self._endpoints.values() if e.state in ADMITTED)
            )
            back = replace(endpoint, state=EndpointState.ATTACHED, port_mappings=ports)
            # What another container had by these addresses meanwhile.
            await self._kernel.forget_connections(back.ips)
            await self._prepare(back.network)
            await self._kernel.readmit(back, self._isolation(back.network))
            await self._kernel.repair(back)
            rows = self._untold(back)
            with self._journal.transaction():
                self._journal.save_endpoint(back)
                self._journal.save_addresses(rows)
            self._endpoints[back.key] = back
            self._holder.accept(rows)
            log.info("endpoint is connected again", endpoint=str(back.key), ips=[str(ip) for ip in back.ips])
            if taken:
                self._without[back.key] = (back.request_id, taken)
                log.warning("endpoint has lost ports of the node", endpoint=str(back.key), ports=taken)
            return True

    def _has_all(self, endpoint: Endpoint) -> bool:
        """Whether its addresses are all assigned to it."""
        assigned = self._holder.assigned()
        records = [assigned[ip].record for ip in endpoint.ips if ip in assigned]
        owners = [(record.container_id, record.ifname) for record in records if record is not None]
        return owners == [endpoint.key] * len(endpoint.ips)

    def miss(self, endpoints: Sequence[Endpoint]) -> None:
        """Nobody knows whether these have ended: they keep what they have. Nothing else is going on yet."""
        missing = [replace(endpoint, state=EndpointState.MISSING) for endpoint in endpoints]
        self._endpoints.update((endpoint.key, endpoint) for endpoint in missing)
        try:
            with self._journal.transaction():
                for endpoint in missing:
                    self._journal.save_endpoint(endpoint)
        except JournalUnwritable as error:
            log.warning("the next start asks again which endpoints have ended", why=str(error))

    # -- for recovery

    def adopt(self, endpoint: Endpoint) -> None:
        """An endpoint of which kernel or store know more than the journal."""
        self._endpoints[endpoint.key] = endpoint
        try:
            self._journal.save_endpoint(endpoint)
        except JournalUnwritable as error:
            log.warning(
                "adopted endpoint is not journalled; a restart adopts it once more",
                endpoint=str(endpoint.key),
                why=str(error),
            )

    def trust_attaching(self, links: Mapping[str, HostLink]) -> None:
        """The journal is older than the store: what it calls attaching, and what has an interface that is up, was
        attached since."""
        for endpoint in self.all():
            link = links.get(endpoint.host_ifname)
            if endpoint.state is EndpointState.ATTACHING and link is not None and link.up:
                self.adopt(replace(endpoint, state=EndpointState.ATTACHED))

    def tell_store(self) -> None:
        """Have the address records say what the endpoints are, where they do not: of an earlier version, or of an
        agent that had lost its journal."""
        rows = [row for e in self.all() if e.state is EndpointState.ATTACHED for row in self._untold(e)]
        if not rows:
            return
        try:
            self._journal.save_addresses(rows)
        except JournalUnwritable as error:
            log.warning(
                "address records do not say what their endpoints are", count=len(rows), why=str(error)
            )
            return
        self._holder.accept(rows)

    def _untold(self, endpoint: Endpoint) -> list[AddressRow]:
        rows = []
        told = for_record(endpoint)
        for ip in endpoint.ips:
            held = self._holder.held(ip)
            record = held.record if held is not None else None
            if record is None:
                continue
            wanted = told if told and ip == endpoint.ips[0] else record.endpoint
            if (record.endpoint, tuple(record.netgroups)) != (wanted, endpoint.netgroups):
                rows += self._holder.plan_change(
                    [ip], endpoint.key, endpoint=wanted, netgroups=list(endpoint.netgroups)
                )
        return rows

    def not_admitted(self) -> list[str]:
        """Sentences about endpoints that the kernel did not take into the firewall's table when it was restored."""
        return [
            f"{endpoint.key} is not admitted by the firewall: {self._not_admitted[endpoint.host_ifname]}"
            for endpoint in self.all()
            if endpoint.state in ADMITTED and endpoint.host_ifname in self._not_admitted
        ]

    def incomplete(self) -> list[str]:
        """Sentences about endpoints that were found or connected again without all that they were."""
        found = {
            endpoint.key: f"was found again after the journal was lost, but not {', '.join(endpoint.lost)}"
            for endpoint in self.all()
            if endpoint.lost
        }
        for key, (request_id, ports) in self._without.items():
            if (endpoint := self.get(key)) is not None and endpoint.request_id == request_id:
                found[key] = f"was connected again without {'; without '.join(ports)}"
        return [f"{key} {what}; start its container anew to have that again" for key, what in found.items()]

    def forget(self, endpoint: Endpoint) -> None:
        """An endpoint of which nothing can be left in the kernel: its boot is over."""
        self._removal.forget(endpoint)

    async def resume_end(self, endpoint: Endpoint) -> None:
        """Go on where a killed agent stopped."""
        async with self._locks.of(endpoint.key):
            if self._endpoints.get(endpoint.key) is endpoint:
                await self._removal.begin(endpoint)


def _is_there(endpoint: Endpoint, links: Mapping[str, HostLink], vanished: Sequence[str] | None) -> bool:
    link = links.get(endpoint.host_ifname)
    return link is not None and (vanished is None or bool(link.marked))


def _asker(spec: AttachSpec) -> Asker:
    return Asker(container_id=spec.key.container_id, ifname=spec.key.ifname)
