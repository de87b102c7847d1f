"""The endpoints of this node: attach, detach, check. The walk of an ADD, in one sitting:

    attach(spec)
      1. take warm addresses                          ipam/holder.py
      2. journal: endpoint 'attaching' + addresses    isolator/journal.py, one commit
      3. admit it in the policy                       isolator/policy/, before the links go up
      4. wire the namespace                           isolator/drivers/, links up last
      5. journal: endpoint 'attached'
    and one undo path for all of them.

DEL goes the other way: journal 'detaching', routes withdrawn and policy revoked, answer; then, off the
caller's path and in batches, interface and connections removed, journal row and address released.

Calls for one endpoint run one after the other, calls for different ones side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from ipam.catalogue import Catalogue
from ipam.errors import MoorageError, TryAgain
from ipam.holder import AddressRequest, Holder, Owner
from ipam.holdings import Conflict
from ipam.keys import IPAddress
from ipam.records import Network
from ipam.shelf import Held
from isolator.drivers.naming import host_ifname, mac_for
from isolator.errors import EndpointExists, JournalUnwritable, NotAttached, Superseded
from isolator.identity import boottime
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.locks import KeyedLocks
from isolator.model import Asked, AttachSpec, Endpoint, EndpointKey, EndpointState
from isolator.steps import reached

log = structlog.get_logger(__name__)

TOMBSTONE_TTL = 120 * 10**9
"""Nanoseconds in which an ADD that was asked for before a DEL is refused (docs/design.md, section 7)."""

REAP_TOGETHER = 0.03
"""Seconds in which removals gather: one batch costs the kernel about as much as one interface, and holds up
whoever attaches meanwhile."""

REMOVE_RETRY = 1.0
"""Seconds before interfaces are removed again after the kernel refused it."""

END_PATIENCE = 5.0
"""Seconds that whoever needs an endpoint to be gone waits for it; removing takes some 20 ms."""


class Endpoints:
    """See the module's docstring. underlay_mtu: bytes, for networks that do not set their own."""

    def __init__(
        self,
        boot_id: str,
        kernel: Kernel,
        journal: Journal,
        catalogue: Catalogue,
        holder: Holder,
        underlay_mtu: Callable[[], int],
    ) -> None:
        self._boot_id = boot_id
        self._kernel = kernel
        self._journal = journal
        self._catalogue = catalogue
        self._holder = holder
        self._underlay_mtu = underlay_mtu
        self._endpoints: dict[EndpointKey, Endpoint] = {}
        self._tombstones: dict[EndpointKey, Asked] = {}
        self._locks: KeyedLocks[EndpointKey] = KeyedLocks()
        self._doomed: dict[EndpointKey, Endpoint] = {}
        self._reap = asyncio.Event()
        self._gone: dict[EndpointKey, asyncio.Event] = {}

    def load(self) -> None:
        """Start from the journal."""
        self._endpoints = {endpoint.key: endpoint for endpoint in self._journal.load_endpoints()}
        self._tombstones = self._journal.load_tombstones()

    # -- looking in

    def all(self) -> list[Endpoint]:
        return list(self._endpoints.values())

    def get(self, key: EndpointKey) -> Endpoint | None:
        return self._endpoints.get(key)

    def of_link(self, name: str) -> Endpoint | None:
        """The endpoint whose node end is called ``name``."""
        return next((e for e in self._endpoints.values() if e.host_ifname == name), None)

    def of_ip(self, ip: IPAddress) -> Endpoint | None:
        return next((e for e in self._endpoints.values() if ip in e.ips), None)

    # -- ADD

    async def attach(self, spec: AttachSpec) -> Endpoint:
        """Give a container an interface with addresses; the same request again gets the same answer.

        Raises NotFound (network), NamespaceGone, NotANamespace, EndpointExists, Superseded, AddressTaken,
        TryAgain, KernelRefused, JournalUnwritable; nothing is left behind then.
        """
        reached("attach:begun")
        async with self._locks.of(spec.key):
            self._refuse_superseded(spec)
            known = await self._known(spec)
            if known is not None and known.state is EndpointState.ATTACHED:
                return known
            network = await self._catalogue.network(spec.network)
            self._kernel.check_namespace(spec.netns)
            if known is None:
                known = await self._begin(spec, network)
            return await self._connect(known)

    def _refuse_superseded(self, spec: AttachSpec) -> None:
        buried = self._tombstones.get(spec.key)
        if buried is not None and buried.boot_id == spec.asked.boot_id and buried.at > spec.asked.at:
            raise Superseded(
                f"the ADD of {spec.key} was asked for before its DEL, which came first; nothing needs to be done"
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
        await self._begin_end(known)
        try:
            await self._ended(known.key)
        except TimeoutError as error:
            raise TryAgain(
                f"the interface of an earlier {known.key} is not removed yet; see the agent's log, then try again"
            ) from error
        return None

    async def _begin(self, spec: AttachSpec, network: Network) -> Endpoint:
        """Steps 1 and 2."""
        lent = await self._holder.take(
            AddressRequest(network=network, ips=spec.ips, reservation=spec.reservation, pool=spec.pool)
        )
        reached("attach:lent")
        endpoint = self._endpoint(spec, network, lent)
        owner = Owner(
            container_id=spec.key.container_id,
            ifname=spec.key.ifname,
            engine=spec.engine,
            netgroups=endpoint.netgroups,
            labels=spec.labels,
            reservation=spec.reservation or "",
        )
        rows = self._holder.plan_assign(lent, owner)
        try:
            with self._journal.transaction():
                self._journal.save_endpoint(endpoint)
                self._journal.save_addresses(rows)
        except JournalUnwritable:
            self._holder.put_back(lent)
            raise
        self._holder.accept(rows)
        self._endpoints[endpoint.key] = endpoint
        reached("attach:journalled")
        return endpoint

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
            mtu=spec.mtu or network.mtu or self._underlay_mtu(),
            netgroups=spec.netgroups or (network.name,),
            labels=spec.labels,
            default_route=spec.default_route,
            nameservers=tuple(network.dns),
            search=tuple(network.search),
            since=time.time(),
        )

    async def _connect(self, endpoint: Endpoint) -> Endpoint:
        """Steps 3 to 5, and the one undo path."""
        try:
            await self._kernel.connect(endpoint)
            attached = replace(endpoint, state=EndpointState.ATTACHED)
            self._journal.save_endpoint(attached)
        except BaseException:
            await self._begin_end(endpoint)
            with contextlib.suppress(TimeoutError):
                await self._ended(endpoint.key)
            raise
        self._endpoints[endpoint.key] = attached
        reached("attach:attached")
        return attached

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
                await self._remove_stray(key)
            elif asked.boot_id == endpoint.asked.boot_id and asked.at >= endpoint.asked.at:
                await self._begin_end(endpoint)

    async def abandon(self, key: EndpointKey, request_id: str) -> None:
        """The caller of that ADD went away for good: undo it, unless a newer one took its place."""
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is not None and endpoint.request_id == request_id:
                log.warning("ADD undone: its caller went away", endpoint=str(key))
                await self._begin_end(endpoint)

    async def end(self, key: EndpointKey) -> None:
        """Detach whatever is there under that key now, and wait until it is gone. Raises TimeoutError."""
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is not None:
                await self._begin_end(endpoint)
                await self._ended(key)

    def _bury(self, key: EndpointKey, asked: Asked) -> None:
        if asked.boot_id != self._boot_id:
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

    async def _remove_stray(self, key: EndpointKey) -> None:
        """The journal does not know it; its name is enough to find what may be left of it."""
        name = host_ifname(key)
        if name in await self._kernel.links():
            await self._kernel.delete_links([name])

    async def _begin_end(self, endpoint: Endpoint) -> None:
        """Journal 'detaching', cut it off, and leave the rest to ``reap``. Never fails."""
        if endpoint.key in self._doomed:
            return
        doomed = replace(endpoint, state=EndpointState.DETACHING)
        self._endpoints[endpoint.key] = doomed
        try:
            self._journal.save_endpoint(doomed)
        except JournalUnwritable as error:
            # A restart finds it again from kernel and store.
            log.warning("DEL goes on without the journal", endpoint=str(endpoint.key), why=str(error))
        reached("detach:journalled")
        try:
            await self._kernel.disconnect(doomed)
        except MoorageError as error:
            log.error(
                "endpoint is not cut off; its interface is removed",
                endpoint=str(endpoint.key),
                why=str(error),
            )
        reached("detach:withdrawn")
        self._doomed[endpoint.key] = doomed
        self._gone.setdefault(endpoint.key, asyncio.Event())
        self._reap.set()

    async def _ended(self, key: EndpointKey) -> None:
        """Wait until nothing is left of it. Raises TimeoutError."""
        event = self._gone.get(key)
        if event is not None:
            async with asyncio.timeout(END_PATIENCE):
                await event.wait()

    async def reap(self) -> None:
        """Remove what was cut off, in batches, until cancelled."""
        self._reap.set()
        while True:
            await self._reap.wait()
            await asyncio.sleep(REAP_TOGETHER)
            self._reap.clear()
            batch = list(self._doomed.values())
            if not batch:
                continue
            try:
                await self._kernel.remove(batch)
            except MoorageError as error:
                log.error("interfaces are not removed; tried again", count=len(batch), why=str(error))
                await asyncio.sleep(REMOVE_RETRY)
                self._reap.set()
                continue
            reached("detach:removed")
            self._release(batch)

    def _release(self, batch: Sequence[Endpoint]) -> None:
        rows = [row for e in batch for row in self._holder.plan_release(e.ips, e.key)]
        try:
            with self._journal.transaction():
                for endpoint in batch:
                    self._journal.drop_endpoint(endpoint.key)
                self._journal.save_addresses(rows)
        except JournalUnwritable as error:
            # The store is told all the same. A restart with the old journal finds the interface gone and
            # releases once more.
            log.warning("release is not journalled", count=len(batch), why=str(error))
        self._holder.accept(rows)
        for endpoint in batch:
            del self._endpoints[endpoint.key]
            del self._doomed[endpoint.key]
            self._gone.pop(endpoint.key).set()
        reached("detach:released")

    # -- CHECK and what happens by itself

    async def check(self, key: EndpointKey) -> Endpoint:
        """The endpoint, if kernel and IPAM are as it says. Raises NotAttached naming every difference."""
        async with self._locks.of(key):
            endpoint = self._endpoints.get(key)
            if endpoint is None or endpoint.state is not EndpointState.ATTACHED:
                state = "unknown" if endpoint is None else endpoint.state.value
                raise NotAttached(f"{key} is {state} on this node; it needs an ADD")
            wrong = await self._kernel.differences(endpoint)
            assigned = self._holder.assigned()
            wrong.extend(f"{ip} is not assigned to it" for ip in endpoint.ips if ip not in assigned)
            if wrong:
                raise NotAttached(f"{key} is not as it was attached: {'; '.join(wrong)}; send DEL and ADD")
            return endpoint

    async def collect(self, names: Sequence[str] | None = None) -> None:
        """Detach endpoints whose interface is gone, because their namespace is.

        names: of node ends that were seen to vanish; None looks at all.
        """
        if names is not None and not any(
            e.host_ifname in names and e.state is EndpointState.ATTACHED for e in self._endpoints.values()
        ):
            return
        links = await self._kernel.links()
        for endpoint in self.all():
            suspect = names is None or endpoint.host_ifname in names
            if suspect and endpoint.state is EndpointState.ATTACHED and endpoint.host_ifname not in links:
                async with self._locks.of(endpoint.key):
                    unchanged = self._endpoints.get(endpoint.key) is endpoint
                    # Looked at again: it may have been wired after the first look.
                    if unchanged and endpoint.host_ifname not in await self._kernel.links():
                        log.info("endpoint collected: its namespace is gone", endpoint=str(endpoint.key))
                        await self._begin_end(endpoint)

    async def cut_off(self, conflict: Conflict) -> None:
        """The store gave an address of ours to somebody else: its endpoint must not answer for it."""
        endpoint = self.of_ip(conflict.ip)
        if endpoint is None:
            return
        async with self._locks.of(endpoint.key):
            current = self._endpoints.get(endpoint.key)
            if current is None or current.state in (EndpointState.DETACHING, EndpointState.CONFLICT):
                return
            log.error(
                "CONFLICT: endpoint is cut off, its address belongs to another",
                endpoint=str(current.key),
                ip=str(conflict.ip),
                holder_node=conflict.holder.node,
                holder_container=conflict.holder.container_id,
            )
            cut = replace(current, state=EndpointState.CONFLICT)
            self._endpoints[current.key] = cut
            try:
                self._journal.save_endpoint(cut)
                await self._kernel.disconnect(cut)
            except TryAgain as error:
                log.warning("conflict is not journalled", why=str(error))

    # -- for recovery

    def adopt(self, endpoint: Endpoint) -> None:
        """An endpoint that the journal does not know and kernel and store do."""
        self._endpoints[endpoint.key] = endpoint
        self._journal.save_endpoint(endpoint)

    def forget(self, endpoint: Endpoint) -> None:
        """An endpoint of which nothing can be left in the kernel: its boot is over."""
        self._doomed[endpoint.key] = endpoint
        self._gone.setdefault(endpoint.key, asyncio.Event())
        self._release([endpoint])

    async def resume_end(self, endpoint: Endpoint) -> None:
        """Go on where a killed agent stopped."""
        async with self._locks.of(endpoint.key):
            if self._endpoints.get(endpoint.key) is endpoint:
                await self._begin_end(endpoint)
