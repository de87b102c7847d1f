"""Addresses before there is a container, and the endpoint that they become. For engines that call in this order:

    allocate       addresses for a uid              journal and store: 'allocated'
    isolate        a process's namespace gets them  an endpoint as any other; its addresses keep the uid
    release        the uid gives them up            'allocated' ones cool; one that an endpoint has stays assigned,
                                                    because the interface is still there
    cleanup        the container is over            the endpoint ends, and its addresses cool

Nothing waits for a call that does not come. Who allocated and does not isolate loses the addresses after UNUSED_FOR.
A container that was released and is never cleaned up ends with its last process, one that was never released with its
interface, and both with the boot, as every endpoint does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import structlog

from ipam.allocations import Promise
from ipam.boottime import boottime
from ipam.catalogue import Catalogue
from ipam.coming_back import Asker
from ipam.errors import InvalidInput, NotAllocated
from ipam.holder import Holder
from ipam.keys import Family, IPAddress
from ipam.named import AddressRequest
from ipam.netgroups import Netgroup
from ipam.records import Address, Label, Network
from ipam.shelf import Held
from isolator.authorise import authorise, netgroups_of
from isolator.endpoints import Endpoints
from isolator.engines import NET_MODULES
from isolator.errors import EndpointExists, JournalUnwritable
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.locks import KeyedLocks
from isolator.model import (
    UNLIMITED,
    Asked,
    AttachSpec,
    Bandwidth,
    Endpoint,
    EndpointKey,
    EndpointState,
    PortMapping,
)
from isolator.steps import reached

log = structlog.get_logger(__name__)

UNUSED_FOR = 300.0
"""Seconds in which allocated addresses have to be isolated. Between the two calls a Mesos agent prepares the container:
fetching its files may take minutes, its executor has to register within one (--executor_registration_timeout)."""

LOOK_EVERY = 2.0
"""Seconds between looks for addresses, and containers, that nobody comes for."""


@dataclass(frozen=True, slots=True)
class AllocateSpec:
    """Addresses for a uid, parsed and validated as far as that needs neither store nor kernel.

    call: 32 hex digits, the same on every try of one call. counts: how many of each family, with those in ``ips``.
    ips: addresses asked for by name. netgroups: () means the network's default. mac, bandwidth: what the labels will
    ask for when the container is there, so that what is not allowed is said at once.
    """

    uid: str
    call: str
    network: str
    counts: dict[Family, int]
    ips: tuple[IPAddress, ...] = ()
    reservation: str | None = None
    pool: str | None = None
    netgroups: tuple[Netgroup, ...] = ()
    labels: tuple[Label, ...] = ()
    mac: str | None = None
    bandwidth: Bandwidth = UNLIMITED
    port_mappings: tuple[PortMapping, ...] = ()

    @property
    def who(self) -> str:
        """Who asks, for error messages."""
        return f"the uid {self.uid}"


@dataclass(frozen=True, slots=True)
class IsolateSpec:
    """A container's process and the allocated addresses that its namespace is to have.

    network: where the addresses have to be of, None for wherever they are.
    netgroups: () means those that the addresses were allocated with.
    """

    container_id: str
    request_id: str
    asked: Asked
    pid: int
    ips: tuple[IPAddress, ...]
    network: str | None = None
    netgroups: tuple[Netgroup, ...] = ()
    labels: tuple[Label, ...] = ()
    mac: str | None = None
    default_route: bool = False
    bandwidth: Bandwidth = UNLIMITED


class Allocated:
    """See the module's docstring.

    check_wires: raises InvalidInput on a node that runs no containers. unused_for: seconds.
    """

    def __init__(
        self,
        kernel: Kernel,
        journal: Journal,
        catalogue: Catalogue,
        holder: Holder,
        endpoints: Endpoints,
        check_wires: Callable[[], None],
        unused_for: float = UNUSED_FOR,
    ) -> None:
        self._kernel = kernel
        self._journal = journal
        self._catalogue = catalogue
        self._holder = holder
        self._endpoints = endpoints
        self._check_wires = check_wires
        self._unused_for = unused_for
        self._uids: KeyedLocks[str] = KeyedLocks()
        self._containers: KeyedLocks[str] = KeyedLocks()
        self._deadlines: dict[tuple[IPAddress, str], float] = {}

    # -- before there is a container

    async def allocate(self, spec: AllocateSpec) -> list[IPAddress]:
        """The uid's new addresses; the same call again gets the same ones. All or none.

        Raises NotFound (network), InvalidInput, Refused, AddressTaken, TryAgain, JournalUnwritable.
        """
        self._check_wires()
        reached("allocate:begun")
        async with self._uids.of(spec.uid):
            held = self._holder.allocations.from_call(spec.call)
            if not held:
                network = await self._catalogue.network(spec.network)
                await self._authorise(spec, network)
                held = await self._promise(spec, network)
        return _sorted(entry.ip for entry in held)

    async def _authorise(self, spec: AllocateSpec, network: Network) -> None:
        if spec.reservation is not None and not self._catalogue.reserved_under(
            spec.reservation, network.name
        ):
            await self._catalogue.look_again(f"the reservation {spec.reservation!r}")
        key = spec.reservation
        reserved = set() if key is None else {r.ip for r in self._catalogue.reserved_under(key, network.name)}
        # What it had a moment ago it does not choose.
        reserved |= self._holder.coming_back(Asker(uid=spec.uid), network.name)
        authorise(spec, network, self._catalogue.pools_of(network), reserved)

    async def _promise(self, spec: AllocateSpec, network: Network) -> list[Held]:
        lent = await self._holder.take(
            AddressRequest(
                network=network,
                ips=spec.ips,
                reservation=spec.reservation,
                pool=spec.pool,
                counts=spec.counts,
                netgroups=netgroups_of(spec),
                asker=Asker(uid=spec.uid),
            )
        )
        reached("allocate:lent")
        promise = Promise(
            uid=spec.uid,
            call=spec.call,
            engine=NET_MODULES,
            netgroups=netgroups_of(spec),
            labels=spec.labels,
            reservation=spec.reservation or "",
        )
        rows = self._holder.allocations.plan(lent, promise)
        try:
            self._journal.save_addresses(rows)
        except BaseException:
            self._holder.put_back(lent)
            raise
        self._holder.accept(rows)
        reached("allocate:journalled")
        log.info("addresses allocated", uid=spec.uid, ips=[str(row.ip) for row in rows], network=network.name)
        return lent

    def promised(self, ips: Sequence[IPAddress]) -> tuple[Label, ...]:
        """The labels that addresses were allocated with."""
        for ip in ips:
            held = self._holder.held(ip)
            if held is not None and held.record is not None and held.record.uid:
                return tuple(held.record.labels)
        return ()

    async def take_back(self, call: str, asked: Asked) -> None:
        """Undo an allocate, or an isolate, whose caller is gone."""
        held = self._holder.allocations.from_call(call)
        await self._give_up({entry.record.uid for entry in held if entry.record is not None}, held)
        for endpoint in self._endpoints.all():
            if endpoint.request_id == call and endpoint.engine == NET_MODULES:
                # As a DEL just after it, not now: a later call for that container is not this one's to undo.
                await self._endpoints.detach(endpoint.key, replace(asked, at=asked.at + 1))

    async def release(self, uid: str, ips: Sequence[IPAddress], asked: Asked) -> None:
        """Give up all addresses of a uid, and these; what nobody has is no error.

        Raises NotAllocated for an address that a container of another engine has.
        """
        reached("release:begun")
        held = self._holder.allocations.of(uid)
        for ip in ips:
            entry = self._holder.held(ip)
            if entry is None or entry.record is None or not entry.record.state.is_taken:
                continue
            if entry.record.engine != NET_MODULES:
                raise NotAllocated(
                    f"{ip} was never allocated: it belongs to {entry.record.container_id} ({entry.record.ifname}), "
                    f"which {entry.record.engine} asked for; end that container instead"
                )
            if _is_later(entry.record, asked):
                log.warning("release passed over: the address has changed hands since", ip=str(ip))
            else:
                held.append(entry)
        await self._give_up({entry.record.uid for entry in held if entry.record is not None}, held)
        reached("release:journalled")

    async def _give_up(self, uids: Iterable[str], entries: Sequence[Held]) -> None:
        """Of those entries what is still these uids'."""
        for uid in sorted(filter(None, uids)):
            async with self._uids.of(uid):
                mine = [
                    e for e in entries if self._holder.held(e.ip) is e and e.record and e.record.uid == uid
                ]
                rows = self._holder.allocations.plan_release(mine)
                try:
                    self._journal.save_addresses(rows)
                except JournalUnwritable as error:
                    # The store is told all the same. What a restart finds in the old journal ends by its time.
                    log.warning("release is not journalled", uid=uid, why=str(error))
                self._holder.accept(rows)
                if rows:
                    log.info("addresses released", uid=uid, ips=[str(row.ip) for row in rows])

    # -- the container

    async def isolate(self, spec: IsolateSpec) -> Endpoint:
        """Give a process's namespace an interface with allocated addresses; the same again changes nothing.

        A container that is isolated again with other addresses gets another interface. Raises NamespaceGone,
        NotANamespace, NotAllocated, EndpointExists, and what Endpoints.attach raises.
        """
        self._check_wires()
        with self._kernel.namespace_of(spec.pid) as netns:
            async with self._containers.of(spec.container_id):
                self._endpoints.refuse_superseded(first_interface(spec.container_id), spec.asked)
                known = self._known(spec, netns)
                if known is not None and known.host_ifname in await self._kernel.links():
                    return known
                async with self._uids.of(self._holder.allocations.uid_of(spec.ips[0])):
                    return await self._endpoints.attach(self._attach_spec(spec, netns))

    def _known(self, spec: IsolateSpec, netns: str) -> Endpoint | None:
        """The endpoint that has just these addresses already. Raises EndpointExists if it is in another namespace."""
        for endpoint in self._of(spec.container_id):
            if endpoint.state is not EndpointState.ATTACHED or set(endpoint.ips) != set(spec.ips):
                continue
            if endpoint.netns not in ("", netns):
                raise EndpointExists(
                    f"{endpoint.key} has {', '.join(map(str, endpoint.ips))} in the namespace {endpoint.netns}, and "
                    f"process {spec.pid} is in another; clean that container up first, or allocate other addresses"
                )
            return endpoint
        return None

    def _attach_spec(self, spec: IsolateSpec, netns: str) -> AttachSpec:
        """Raises InvalidInput, NotAllocated."""
        key = self._key(spec)
        if self._endpoints.get(key) is None:
            self._holder.allocations.check(spec.ips)
        held = self._holder.held(spec.ips[0])
        record = held.record if held is not None else None
        network = record.network if record is not None else spec.network
        if spec.network not in (None, network):
            raise InvalidInput(
                f"{spec.ips[0]} was allocated in network {network}, and the call is for network {spec.network}; give "
                "both commands of the isolator module the same --network"
            )
        return AttachSpec(
            key=key,
            request_id=spec.request_id,
            asked=spec.asked,
            engine=NET_MODULES,
            network=network or "",
            netns=netns,
            # In this order, as recovery has them, the MAC that follows from them is always the same.
            ips=tuple(_sorted(spec.ips)),
            allocated=True,
            reservation=(record.reservation or None) if record is not None else None,
            netgroups=spec.netgroups or tuple(map(Netgroup, record.netgroups if record is not None else ())),
            labels=spec.labels,
            mac=spec.mac,
            default_route=spec.default_route,
            bandwidth=spec.bandwidth,
        )

    def _key(self, spec: IsolateSpec) -> EndpointKey:
        """The interface that this call began, else the first that the container does not have."""
        present = {endpoint.key: endpoint for endpoint in self._endpoints.all()}
        number = 0
        while True:
            key = EndpointKey(spec.container_id, f"eth{number}")
            if key not in present or present[key].request_id == spec.request_id:
                return key
            number += 1

    async def cleanup(self, container_id: str, asked: Asked) -> None:
        """End all of a container's endpoints, and with them its addresses; one that is not known is no error."""
        async with self._containers.of(container_id):
            keys = {endpoint.key for endpoint in self._of(container_id)}
            first = first_interface(container_id)
            if self._endpoints.get(first) is None:
                # Whatever may be left of it, and a word to who comes too late.
                keys.add(first)
            for key in sorted(keys):
                await self._endpoints.detach(key, asked)

    def _of(self, container_id: str) -> list[Endpoint]:
        return [
            endpoint
            for endpoint in self._endpoints.all()
            if endpoint.key.container_id == container_id and endpoint.engine == NET_MODULES
        ]

    # -- what nobody comes for

    async def run(self) -> None:
        """Take back what stays unused, and end what was released and has no process left, until cancelled."""
        while True:
            await self._take_back_unused()
            await self._end_vacant()
            await asyncio.sleep(LOOK_EVERY)

    async def _take_back_unused(self) -> None:
        now = asyncio.get_running_loop().time()
        unused = {(h.ip, h.record.id): h for h in self._holder.allocations.all() if h.record is not None}
        self._deadlines = {
            key: self._deadlines.get(key) or now + self._left(held) for key, held in unused.items()
        }
        late = [held for key, held in unused.items() if self._deadlines[key] <= now]
        if late:
            log.warning(
                "addresses were allocated and not used in time; released",
                ips=[str(held.ip) for held in late],
                seconds=self._unused_for,
            )
            await self._give_up({held.record.uid for held in late if held.record is not None}, late)

    def _left(self, held: Held) -> float:
        """Seconds, by the wall clock of when it was allocated, which may have been set since."""
        since = held.record.since if held.record is not None else 0.0
        return min(max(self._unused_for - (time.time() - since), 0.0), self._unused_for)

    async def _end_vacant(self) -> None:
        for endpoint in self._endpoints.all():
            released = not any(self._holder.allocations.uid_of(ip) for ip in endpoint.ips)
            if endpoint.engine == NET_MODULES and endpoint.state is EndpointState.ATTACHED and released:
                try:
                    await self._endpoints.end(endpoint.key, only_if_gone=True)
                except TimeoutError:
                    log.warning("endpoint is cut off, and not removed yet", endpoint=str(endpoint.key))


def first_interface(container_id: str) -> EndpointKey:
    """The key of a container's first endpoint."""
    return EndpointKey(container_id, "eth0")


def _sorted(ips: Iterable[IPAddress]) -> list[IPAddress]:
    return sorted(ips, key=lambda ip: (ip.version, int(ip)))


def _is_later(record: Address, asked: Asked) -> bool:
    """Whether an address got where it is after a call was made: the call means somebody before."""
    return record.since > time.time() - (boottime() - asked.at) / 1e9
