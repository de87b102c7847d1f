"""The isolator: this node's networking as one object, with typed values in and out.

    isolator = Isolator(settings, store)
    await isolator.start()          journal, store, kernel made to agree
    serving = asyncio.create_task(isolator.run())
    endpoint = await isolator.attach(spec)

Everything that goes on beside the calls runs in ``run``: the store is written, followed and answered,
removed interfaces are reaped, vanished namespaces collected, the firewall watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from ipam import keys
from ipam.catalogue import Catalogue
from ipam.cluster import Cluster
from ipam.continuity import PAUSE
from ipam.errors import Fenced, InvalidInput, StoreError, TryAgain
from ipam.holder import COOLDOWN, Holder
from ipam.holdings import Conflict
from ipam.intents import IntentServer
from ipam.keys import IPAddress
from ipam.membership import Membership
from ipam.namesakes import Identity, Namesakes
from ipam.node_addresses import NodeAddresses
from ipam.pool_collisions import colliding_address, colliding_pools
from ipam.records import Address, AddressState, Fence, Node
from ipam.schema import FEATURE, VERSION, SchemaMismatch, ensure_schema
from ipam.store.base import Store
from ipam.supervision import Job, Supervision
from ipam.taken import aggregated, lines
from isolator.alias_key import alias_key
from isolator.allocated import UNUSED_FOR, Allocated
from isolator.answers import Answers
from isolator.conflicts import Conflicts
from isolator.connections import Connections
from isolator.endpoints import Endpoints
from isolator.errors import JournalUnwritable, KernelRefused
from isolator.every import Every
from isolator.fabric import VXLAN_DEVICE, VXLAN_PORT, Fabric, mac_of
from isolator.foreign_firewalls import ForeignFirewalls
from isolator.forwarding import Forwarding
from isolator.identity import boot_id, machine_id
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.mending import Mending
from isolator.missing import Missing, missing
from isolator.model import Asked, AttachSpec, Endpoint, EndpointKey, EndpointState, ValidAttachments, Work
from isolator.neighbours import Neighbours
from isolator.netlink import HostLink
from isolator.netlink.monitor import ChangeMonitor, LinkMonitor
from isolator.netlink.seal import Seal
from isolator.node_name import settle
from isolator.pool_routes import PoolRoutes
from isolator.recovery import adopted_endpoint, carries, of_boot, owner_of, recall, recover, routed_to
from isolator.store_addresses import StoreAddresses
from isolator.surrounds import kept
from isolator.underlay import DEFAULT_MTU, Underlay
from isolator.underlay import told as told_underlay
from isolator.window import blind, enter, window

log = structlog.get_logger(__name__)

SYNC_PATIENCE = 5.0
"""Seconds that a start waits for the store before it goes on with what the journal knows."""

RETURN_WINDOW = 30.0
"""Seconds in which a hook may come back for an ADD that a killed agent had begun (docs/design.md, section 7)."""

HEAL_ELEMENTS_EVERY = 5.0
"""Seconds between looks at what the firewall's sets hold, which take longer."""

COLLECT_EVERY = 5.0
"""Seconds between looks for endpoints whose namespace is gone; the link monitor is faster."""

FENCE_EVERY = 5.0
"""Seconds between looks at the node's fence; who writes is told sooner. Well within grace.SECONDS."""

FENCE_AGAIN = 1.0
"""The same after one that was not answered."""

HEAL_EVERY = 1.0
"""Seconds between looks at the firewall."""

LIMITS_EVERY = 2.0
"""Seconds between looks at the limits on endpoints' traffic."""

JOURNAL_EVERY = 2.0
"""Seconds between looks whether the journal's file is where it was."""

UNDERLAY_EVERY = 10.0
"""Seconds between looks at the underlay; the kernel tells of changes sooner."""

UNDERLAY_SETTLE = 0.1
"""Seconds in which changes of the underlay gather: an address that is replaced is gone for a moment."""

GRACE_EVERY = 0.25
"""Seconds between looks whether all nodes have asserted what they hold, while that is waited for."""

KNOWN_INSTANCES = 16
"""Agents that are remembered to have written for the node: one, and as many as may have died since without."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an isolator is told.

    node: the name, if the journal has none yet. node_given: whether somebody chose it; else it is the host's.
    state_dir: holds the journal. underlay: the interface, address or network towards other nodes, None for the
    interface with the default route. vxlan_port: UDP. gateway: no containers, only the way to those of other nodes.
    store_endpoints: (name or IP, TCP port) of the store's servers. ending_certificates: a sentence for each of the
    store's that ends soon. cooldown: seconds. unused_for: seconds that allocated addresses may stay without a
    container. manage_docker_user: whether Docker's chain of that name may be opened for
    containers. asks_mesos: whether ``tell_mesos_agent`` will be called.
    """

    node: str
    state_dir: Path
    version: str
    underlay: str | None = None
    vxlan_port: int = VXLAN_PORT
    gateway: bool = False
    store_endpoints: tuple[tuple[str, int], ...] = ()
    ending_certificates: Callable[[], list[str]] = list
    cooldown: float = COOLDOWN
    unused_for: float = UNUSED_FOR
    manage_docker_user: bool = True
    asks_mesos: bool = False
    node_given: bool = True


class Isolator:
    """See the module's docstring. allocated: for engines that ask for addresses before they have a container."""

    def __init__(self, settings: Settings, store: Store, supervision: Supervision | None = None) -> None:
        """Opens the journal. Raises JournalUnwritable, InvalidInput if it is another node's.

        supervision: of what ``run`` starts, shared with whoever has tasks beside it; one of its own without.
        """
        self._supervision = supervision or Supervision()
        self.instance = uuid.uuid4().hex
        self._store = store
        self._boot_id = boot_id()
        self._journal = Journal(settings.state_dir / "journal.db", self._boot_id)
        name = settle(self._journal, settings.node, given=settings.node_given, state_dir=settings.state_dir)
        self._host_name = settings.node
        self._settings = settings = replace(settings, node=name)
        self._window = window(self._boot_id)
        self._namesakes = Namesakes(
            store,
            name,
            Identity(
                machine_id(),
                self._journal.state_id,
                self._boot_id,
                self.instance,
                self._journal.instances,
                self._journal.machine_id,
            ),
            lambda: [str(ip) for ip in self._underlay.addresses],
        )
        self._kernel = Kernel(Seal(alias_key(settings.state_dir)))
        self._catalogue = Catalogue(
            store, self._journal, self._catalogue_changed, self._store_rewound, node=settings.node
        )
        self._holder = Holder(
            settings.node,
            store,
            self._catalogue,
            self._journal,
            instance=self.instance,
            boot_id=self._boot_id,
            is_live=self._is_live,
            on_conflict=self._on_conflict,
            cooldown=settings.cooldown,
            preloads=not settings.gateway,
            others_away=lambda: bool(self._cluster.away - {settings.node}),
            yields_to=self._yields_to,
            on_asserted=self._agree,
            nodes=lambda: self._catalogue.nodes() | self._cluster.nodes().keys(),
            namesakes=self._namesakes,
            state_id=self._journal.state_id,
        )
        self._continuity = self._holder.continuity
        store.verify_with(self._continuity.verify)
        self._addresses = NodeAddresses(settings.node, VXLAN_DEVICE, self._holder, self._catalogue)
        self._store_addresses = StoreAddresses(settings.store_endpoints)
        self._neighbours = Neighbours(settings.node, self._kernel, self._catalogue, self._holder.assigned)
        self._cluster = Cluster(
            store,
            self._catalogue,
            self._topology_changed,
            self._neighbours.on_members,
            self._continuity.note,
        )
        self._fabric = Fabric(
            settings.node,
            settings.vxlan_port,
            self._cluster,
            self._catalogue,
            self._addresses,
            on_addresses=self._describe,
            is_leaving=lambda: self._holder.drain.is_on and not self._endpoints.all(),
        )
        self._endpoints = Endpoints(
            self._boot_id,
            self._kernel,
            self._journal,
            self._catalogue,
            self._holder,
            self._fabric.mtu,
            settings.vxlan_port,
            prepare=self._prepare,
            around=lambda: self._neighbours.around(self._cluster),
        )
        self._pool_routes = PoolRoutes(self._endpoints)
        self.allocated = Allocated(
            self._kernel,
            self._journal,
            self._catalogue,
            self._holder,
            self._endpoints,
            self._refuse_on_gateway,
            settings.unused_for,
        )
        self._mending = Mending(self._kernel, self._endpoints)
        self._missing = Missing(self._kernel, self._endpoints)
        self._conflicts = Conflicts(
            store, self._journal, self._catalogue, self._holder, self._endpoints, self._namesakes, name
        )
        self._answers = Answers(
            settings.node,
            self._kernel,
            self._endpoints,
            self._mending,
            self._holder,
            self._fabric,
            self._neighbours,
            self._tell,
            lambda: self._firewalls.obstacles,
        )
        self._firewalls = ForeignFirewalls(
            self._kernel,
            lambda: bool(self._endpoints.all()),
            # A gateway has none of the interfaces that are let pass.
            manages=settings.manage_docker_user and not settings.gateway,
        )
        self._forwarding = Forwarding(self._kernel, lambda: self._underlay.links)
        self._connections = Connections(self._kernel, self._endpoints, self._neighbours.on_catalogue)
        self._membership: Membership | None = None
        self._underlay = Underlay((), DEFAULT_MTU, ())
        self._underlay_changed = asyncio.Event()
        self._links: dict[str, HostLink] = {}
        self._routed: dict[int, set[IPAddress]] = {}
        self._macs: dict[str, str] = {}
        self._vanished: asyncio.Queue[list[str] | None] = asyncio.Queue()
        self._recovered = asyncio.Event()
        self._begun_before: list[Endpoint] = []
        self._mesos_agent: str | None = None if settings.asks_mesos else ""

    # -- life

    async def start(self) -> None:
        """Recover; returns when ADD and DEL can be served. Raises KernelRefused, and InvalidInput where the journal's
        endpoints would not be seen."""
        enter(self._journal, self._window, self._settings.state_dir)
        self._catalogue.load()
        await self._look_around()
        self._holder.load()
        if left := self._continuity.grace.left:
            log.warning(
                "store was in doubt before the restart; nothing new is taken yet", seconds=round(left)
            )
            self._cluster.start_over(left)
            self._fabric.rewound(left)
        self._endpoints.load()
        self._links = await self._kernel.links()
        if self._namesakes.elsewhere:
            # A copy of another machine's journal: what is of an earlier boot there may live.
            self._endpoints.miss([of_boot(e, self._boot_id) for e in self._endpoints.all()])
        self._endpoints.miss(missing(self._endpoints.all(), self._links, self._boot_id))
        self._macs = await self._kernel.macs()
        self._routed = routed_to(await self._kernel.routes())
        await recall(
            self._kernel,
            self._endpoints,
            self._holder,
            self._catalogue,
            self._boot_id,
            self._links,
            self._routed,
        )
        self._underlay = await self._find_underlay()
        self._fabric.underlay_changed(self._underlay)
        self._membership = Membership(
            self._store,
            self._facts(),
            self.instance,
            self._boot_id,
            self._holder.fenced,
            self._holder.drain,
            has_claimed=lambda: self._holder.has_claimed,
            state_id=self._journal.state_id,
        )
        if not self._continuity.doubted:
            self._membership.agree(self._continuity.incarnation)
        self._remember_instances([*self._journal.instances[-KNOWN_INSTANCES + 1 :], self.instance])
        try:
            async with asyncio.timeout(SYNC_PATIENCE):
                await ensure_schema(self._store)
                await self._holder.sync()
                if not self._continuity.doubted:
                    self._agree()
                if not self._underlay.addresses:
                    self._underlay = self._told_underlay()
                    self._fabric.underlay_changed(self._underlay)
                self._membership.describe(self._facts())
                await self._membership.register()
        except SchemaMismatch:
            raise
        except (StoreError, TryAgain, TimeoutError) as error:
            log.warning("store is not in sync; serving what the journal knows", why=str(error) or "no answer")
        await self._recover()
        self._begun_before = [e for e in self._endpoints.all() if e.state is EndpointState.ATTACHING]

    async def _recover(self) -> None:
        in_sync = not self._holder.problem
        await self._kernel.enable_forwarding()
        await recover(
            self._kernel,
            self._endpoints,
            self._holder,
            self._catalogue,
            self._boot_id,
            in_sync=in_sync,
            keep_others=not self._cluster.listed.is_set(),
        )
        if in_sync:
            self._recovered.set()
            self._remember_instances([self.instance])
            self._remember_machine()

    def _remember_machine(self) -> None:
        if (here := machine_id()) != self._journal.machine_id:
            try:
                self._journal.save_machine_id(here)
            except JournalUnwritable as error:
                log.warning("a copy of the journal on another machine cannot be told", why=str(error))

    def _remember_instances(self, instances: list[str]) -> None:
        try:
            self._journal.save_instances(instances)
        except JournalUnwritable as error:
            log.warning("the next start cannot tell this agent from a copy", why=str(error))

    async def run(self) -> None:
        """Everything that goes on beside the calls, until cancelled."""
        assert self._membership is not None, "start() comes first"
        intents = IntentServer(self._store, self._settings.node, self._answers.answer)
        works: dict[str, Job] = {
            "addresses": self._holder.serve,
            "catalogue": self._catalogue.follow,
            "incarnation": self._continuity.follow,
            "continuity": self._continuity.keep,
            "grace": self._end_grace,
            "membership": self._membership.keep,
            "takeover": self._membership.follow,
            "fence": self._look_at_fence,
            "intents": intents.run,
            "reaper": self._endpoints.reap,
            "collector": self._collect,
            "links": self._watch_links,
            "conflicts": self._conflicts.run,
            "reconnections": self._conflicts.bring_back,
            "allocated": self.allocated.run,
            "firewall": self._heal,
            "firewalls": self._firewalls.run,
            "forwarding": self._forwarding.keep,
            "neighbours": lambda: self._neighbours.tell(self._cluster),
            "connections": self._neighbours.forget,
            "limits": self._keep_limits,
            "fullness": self._connections.watch,
            "pool routes": self._pool_routes.keep,
            "mending": self._mending.run,
            "journal": self._keep_journal,
            "cluster": self._cluster.follow,
            "fabric": self._fabric.keep_kernel,
            "fabric addresses": self._fabric.keep_addresses,
            "underlay": self._follow_underlay,
            "changes": self._watch_changes,
        }
        tasks = [self._supervision.start(name, work) for name, work in works.items()]
        tasks.append(self._supervision.start("unfinished", self._undo_unfinished, ends=True))
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_links(self) -> None:
        monitor = LinkMonitor(
            lambda names: self._vanished.put_nowait(sorted(names)), lambda: self._vanished.put_nowait(None)
        )
        await monitor.run()

    async def _watch_changes(self) -> None:
        await ChangeMonitor(self._underlay_changed.set, self._fabric.port).run()

    async def stop(self) -> None:
        """End in order; endpoints stay as they are. ``run`` has been cancelled before."""
        if self._membership is not None:
            await self._membership.leave()
        self._continuity.save()
        self._fabric.close()
        self._kernel.close()
        self._journal.close()

    # -- what engines call

    async def attach(self, spec: AttachSpec) -> Endpoint:
        """See Endpoints.attach. Raises InvalidInput on a gateway."""
        self._refuse_on_gateway()
        return await self._endpoints.attach(spec)

    def _refuse_on_gateway(self) -> None:
        if self._settings.gateway:
            raise InvalidInput(
                f"node {self.node} is a gateway, whose agent wires no containers; start the container on another node, "
                "or this agent without --gateway"
            )

    async def detach(self, key: EndpointKey, asked: Asked) -> None:
        """See Endpoints.detach."""
        await self._endpoints.detach(key, asked)

    async def check(self, key: EndpointKey, netns: str = "") -> Endpoint:
        """See Endpoints.check."""
        return await self._endpoints.check(key, netns)

    async def collect_garbage(self, valid: ValidAttachments) -> None:
        """See Endpoints.collect_garbage."""
        await self._endpoints.collect_garbage(valid)

    # -- what an engine's facts are told to

    def work_of(self, endpoint: Endpoint) -> Work | None:
        """See Endpoints.work_of."""
        return self._endpoints.work_of(endpoint)

    def tell_work(self, endpoint: Endpoint, work: Work) -> None:
        """See Endpoints.tell_work."""
        self._endpoints.tell_work(endpoint, work)

    def tell_mesos_agent(self, agent: str) -> None:
        """The id of this node's Mesos agent, for who has to know which node a Mesos master speaks of."""
        if agent != self._mesos_agent:
            self._mesos_agent = agent
            self._describe()

    async def end_if_gone(self, key: EndpointKey) -> bool:
        """End an endpoint that no process is left on; says whether it is gone now. Raises TimeoutError."""
        return await self._endpoints.end(key, only_if_gone=True)

    # -- what an operator says of endpoints that are missing

    def missing(self) -> list[Endpoint]:
        """See missing.py."""
        return self._missing.all()

    async def release_missing(self, keys: list[EndpointKey]) -> list[Endpoint]:
        """See Missing.release."""
        return await self._missing.release(keys)

    def keep_missing(self, keys: list[EndpointKey]) -> list[Endpoint]:
        """See Missing.keep."""
        return self._missing.keep(keys)

    async def ready(self, network: str | None = None) -> None:
        """Raises what an ADD on ``network`` would be refused with now: InvalidInput on a gateway, NotFound,
        JournalUnwritable, TryAgain if it would get no address, Fenced if others may have this node's."""
        self._refuse_on_gateway()
        if network is not None:
            await self._catalogue.network(network)
        self._journal.check_writable()
        self._holder.check_ready(network)

    @property
    def node(self) -> str:
        return self._settings.node

    def known_networks(self) -> list[str]:
        return self._catalogue.names()

    def endpoints(self) -> list[Endpoint]:
        return self._endpoints.all()

    def status(self) -> dict[str, Any]:
        """Numbers and states for `moorage status`."""
        states = Counter(endpoint.state.value for endpoint in self._endpoints.all())
        return {
            "node": self._settings.node,
            "instance": self.instance,
            "version": self._settings.version,
            "boot_id": self._boot_id,
            "mtu": self._underlay.mtu,
            "own_addresses": [
                str(ip) for ip in (*self._underlay.addresses, *self._addresses.current().values())
            ],
            "gateway": self._settings.gateway,
            "endpoints": dict(sorted(states.items())),
            "name": self._other_name(),
            "identity": self._identity(),
            "conflicts": [str(e.key) for e in self._endpoints.all() if e.state is EndpointState.CONFLICT],
            "cut_off": self._conflicts.problems(),
            "missing": self._missing.question(),
            "not_known_to_other_nodes_yet": [
                f"{key} ({', '.join(map(str, ips))})"
                for key, ips in self._endpoints.unknown_to_others().items()
            ],
            "journal": self._unwritable(),
            "journal_rebuilt": (
                self._journal.rebuilt or self._namesakes.lost_journal or self._holder.journal_was_behind
            ),
            "lost": self._endpoints.incomplete(),
            **self._holder.status(),
            "fabric": {
                **self._fabric.status(),
                "tunnel": self._neighbours.tunnel_status(self._underlay.addresses),
            },
            "connections": self._connections.status(),
            "collisions": self._collisions(),
            "failing": self._supervision.failing(),
            "certificates": self._settings.ending_certificates(),
            "damage": [
                *self._forwarding.problems(),
                *self._mending.problems(),
                *self._endpoints.not_admitted(),
            ],
            **self._firewalls.status(),
        }

    def _unwritable(self) -> str:
        """A sentence, if the journal cannot be written now; every ADD is refused with it."""
        try:
            self._journal.check_writable()
        except JournalUnwritable as error:
            return str(error)
        return ""

    def _other_name(self) -> str:
        """A sentence, if the host is called otherwise than its node."""
        if self._host_name == self.node:
            return ""
        host = self._host_name or "nothing"
        return f"the host is called {host} and stays node {self.node}, as its state directory says"

    def _identity(self) -> list[str]:
        """Sentences about whose the node's name is, and what the agent does not see of the machine."""
        found = list(self._namesakes.told)
        if why := blind(self._window):
            found.append(
                f"the agent does not see all processes of the machine, because {why}; a container whose processes have "
                "ended keeps its addresses until its DEL"
            )
        return found

    def _collisions(self) -> list[str]:
        """Sentences about pools, and addresses assigned here, that nodes' own networks use, too."""
        around = self._catalogue.around
        found = colliding_pools(self._catalogue.drawn(), around)
        for ip, held in self._holder.assigned().items():
            pool = self._catalogue.pool_of(ip)
            if pool is not None and held.record is not None and not pool.usable(ip):
                whose = f"container {held.record.container_id} ({held.record.ifname})"
                found.append(colliding_address(ip, pool, around, whose))
        if left := aggregated(lines(around.taken_by(self.node))):
            found.append(
                f"the node's networks use more than a record has room for, so {left} entries are told to other nodes "
                "as wider ones, or not at all; see `moorage node show`"
            )
        return [sentence for sentence in found if sentence]

    # -- what goes on beside

    def _catalogue_changed(self) -> None:
        self._holder.catalogue_changed()
        self._cluster.pools_changed()
        self._neighbours.on_catalogue()
        self._fabric.networks_changed()
        self._pool_routes.catalogue_changed()

    def _store_rewound(self) -> None:
        self._cluster.start_over()
        self._fabric.rewound()

    def _agree(self) -> None:
        if self._membership is not None:
            self._membership.agree(self._continuity.incarnation)

    def _yields_to(self, node: str) -> bool:
        """Whether another node's claim to an address that is used here is certain: it has looked at the store as it is
        now, or is a node of an earlier version and had the time to."""
        if self._cluster.have_asserted([node], self._continuity.incarnation):
            return True
        return node in self._cluster.alive and not self._continuity.grace.left

    async def _end_grace(self) -> None:
        """Ends a grace as soon as all nodes that were ever heard of have said that they asserted what they hold."""
        if self._continuity.is_new:
            # Those that the store forgot, and that this node cannot know of, come back meanwhile.
            await asyncio.sleep(PAUSE)
        while True:
            await asyncio.sleep(GRACE_EVERY)
            grace = self._continuity.grace
            if grace.left and grace.awaited is not None and self._cluster.listed.is_set():
                awaited = grace.awaited | self._cluster.nodes().keys()
                if self._cluster.have_asserted(awaited, self._continuity.incarnation):
                    log.info("all nodes have asserted what they hold; what is new is taken again")
                    self._holder.end_grace()

    def _topology_changed(self, nodes: set[str]) -> None:
        self._fabric.topology_changed(nodes)
        self._neighbours.on_topology(nodes)

    def _facts(self) -> Node:
        """What the other nodes have to know of this one."""
        underlay = self._underlay
        link_local = () if underlay.link_local is None else (underlay.link_local,)
        return Node(
            name=self.node,
            version=self._settings.version,
            underlay=[str(ip) for ip in (*underlay.addresses, *link_local)],
            mtu=underlay.mtu,
            mac=mac_of(self.node),
            vxlan_port=self._settings.vxlan_port,
            vtep=[str(ip) for ip in self._addresses.current().values()],
            gateway=self._settings.gateway,
            mesos_agent=self._told_mesos_agent() if self._mesos_agent is None else self._mesos_agent,
            surroundings=lines(self._catalogue.around.taken_by(self.node)),
            machine_id=machine_id(),
            state_id=self._journal.state_id,
            features=["routed", "hostgw", "vxlan", f"{FEATURE}{VERSION}"],
        )

    async def _find_underlay(self) -> Underlay:
        """The underlay as it is, or if that is nothing now, as other nodes were told: a machine that starts, or a DHCP
        client, has moments without a default route. Raises InvalidInput if it was never there."""
        told = self._told_underlay()
        try:
            found = await self._kernel.underlay(self._settings.underlay)
        except InvalidInput as error:
            if not told.addresses:
                raise
            log.warning("underlay is not there; what it was is kept", why=str(error))
            return told
        if told.addresses and not found.addresses:
            log.warning(
                "underlay has no address; what it was is kept", addresses=[str(ip) for ip in told.addresses]
            )
            return told
        return found

    def _told_underlay(self) -> Underlay:
        record = self._catalogue.own_record
        return told_underlay(record.underlay, record.mtu) if record else Underlay((), DEFAULT_MTU, ())

    def _told_mesos_agent(self) -> str:
        record = self._catalogue.own_record
        return record.mesos_agent if record else ""

    def _describe(self) -> None:
        if self._membership is not None:
            self._membership.describe(self._facts())

    async def _tell(self) -> None:
        assert self._membership is not None, "start() comes first"
        await self._membership.tell()

    async def _prepare(self, network: str) -> None:
        """Have the kernel told of a network that is new or different, before one of its containers is wired. Raises
        KernelRefused."""
        self._firewalls.containers_came()
        await self._neighbours.tell_of_networks(self._cluster)
        for known in self._catalogue.networks():
            if known.name == network:
                await self._fabric.carry(known)

    async def _look_around(self) -> None:
        """What the node's own networks use is no container's, from now on. What cannot be read stays as it was."""
        known = self._catalogue.around.taken_by(self.node)
        try:
            found, links = await self._kernel.surroundings()
            here = kept(known, found, links)
            stores = await self._store_addresses.look(known, here)
            self._catalogue.tell_own((*here, *stores))
            # Even while the store does not answer: perhaps because of them.
            await self._fabric.release()
        except KernelRefused as error:
            log.warning("the node's own networks are not known; what they were is kept", why=str(error))

    async def _follow_underlay(self) -> None:
        """Other nodes and the fabric are told when the node's own network changes."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UNDERLAY_EVERY):
                    await self._underlay_changed.wait()
            await asyncio.sleep(UNDERLAY_SETTLE)
            told = self._underlay_changed.is_set()
            self._underlay_changed.clear()
            await self._look_around()
            try:
                found = await self._kernel.underlay(self._settings.underlay)
            except InvalidInput as error:
                log.warning("underlay is gone; what it was is kept", why=str(error))
                self._describe()
                continue
            if self._underlay.addresses and not found.addresses:
                # Between two of a link's states, or of a DHCP client's: no reason to cut containers off.
                log.warning("underlay has no address; what it was is kept", links=found.links)
                self._fabric.kernel_changed()
            elif found != self._underlay:
                log.info(
                    "underlay changed",
                    links=found.links,
                    addresses=[str(ip) for ip in found.addresses],
                    mtu=found.mtu,
                )
                if set(self._underlay.addresses) - set(found.addresses):
                    # Waiting for the old connections to fail would take longer than others may be told later.
                    self._store.reconnect()
                self._underlay = found
                self._fabric.underlay_changed(found)
            elif told:
                self._fabric.kernel_changed()
            self._describe()  # after a reconnect: an old connection would keep it

    def _is_live(self, ip: IPAddress, record: Address) -> bool:
        if record.state is AddressState.ALLOCATED:
            return True
        if record.state is not AddressState.ASSIGNED:
            return False
        if record.is_nodes_own:
            return True
        key = EndpointKey(record.container_id, record.ifname)
        known = self._endpoints.of_ip(ip)
        if known is not None and (known.key != key or not known.lost):
            return True
        link = owner_of(self._links, record)
        is_here = link is not None and carries(link, ip, self._routed)
        if not is_here and not self._may_be_unseen():
            return False
        network = next((n for n in self._catalogue.networks() if n.name == record.network), None)
        before = self._endpoints.get(key)
        if link is None or not is_here:
            adopted = adopted_endpoint(before, ip, record, self._underlay.mtu, network, self._boot_id)
            self._endpoints.miss([adopted])
            return True
        mac = self._macs.get(link.own_name)
        adopted = adopted_endpoint(before, ip, record, link.mtu, network, self._boot_id, mac)
        if adopted != before:
            log.warning(
                "endpoint adopted: the journal had lost it", endpoint=str(key), ip=str(ip), lost=adopted.lost
            )
            self._endpoints.adopt(adopted)
        return True

    def _may_be_unseen(self) -> bool:
        """Whether containers that the store has here, and this agent has not, may live all the same: on a machine that
        had the name before; or in a network namespace that this agent does not see, nor any other container of theirs,
        and its journal is too new to say so."""
        return self._namesakes.elsewhere or (self._namesakes.lost_in_this_boot and not self._links)

    def _on_conflict(self, conflict: Conflict) -> None:
        self._conflicts.note(conflict)
        self._fabric.addresses_changed()

    async def _look_at_fence(self) -> None:
        """Notices a store that is away, or went back in time, also where nothing is written: before others take what it
        forgot."""
        pause = FENCE_EVERY
        while True:
            await asyncio.sleep(pause)
            before = self._journal.confirmed_seq
            if not self._holder.agrees:
                continue
            try:
                kv = await self._store.get(keys.WRITERS + self.node)
            except StoreError as error:
                log.info("fence was not looked at", why=str(error))
                self._holder.unread(str(error))
                # Who finds nothing warm is refused until it answers.
                pause = FENCE_AGAIN
                continue
            self._holder.read()
            self._continuity.touch()
            pause = FENCE_EVERY
            try:
                stood = 0 if kv is None else Fence.decode(kv.key, kv.value).seq
            except StoreError as error:
                log.info("fence cannot be read", why=str(error))
                continue
            # A sync that ended meanwhile has settled it, and left a lower number.
            if stood < min(before, self._journal.confirmed_seq):
                self._holder.fenced(
                    Fenced(
                        f"the store was restored from a backup, or node {self.node} was removed from it; "
                        "what this node holds is asserted anew"
                    )
                )

    async def _collect(self) -> None:
        """Ends endpoints whose namespace is gone: at once when told, and regularly, however much is told."""
        every = Every(COLLECT_EVERY)
        while True:
            names: list[str] | None = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every.left()):
                    names = await self._vanished.get()
            due = every.is_due()
            if names is not None:
                await self._endpoints.collect(names)
            if due or names is None:
                await self._endpoints.collect()
            if due:
                await self._missing.look()

    async def _restore_policy(self) -> None:
        await self._endpoints.restore_policy(keep_endpoints=not self._recovered.is_set())

    async def _heal(self) -> None:
        """Keeps the firewall as it should be, and catches up on recovery when the store came back."""
        every = Every(HEAL_ELEMENTS_EVERY)
        while True:
            await asyncio.sleep(HEAL_EVERY)
            if chains := await self._kernel.wrong_chains():
                await self._restore_policy()
                log.warning(
                    "firewall table inet moorage was missing or changed; restored",
                    chains=[chain for chain in chains if chain],
                )
            if every.is_due():
                await self._restore_elements()
                if self._endpoints.not_admitted():
                    await self._restore_policy()
            if not self._recovered.is_set() and not self._holder.problem:
                await self._recover()

    async def _restore_elements(self) -> None:
        """Somebody may have flushed a set and left the table as it is."""
        if wrong := await self._kernel.wrong_sets():
            await self._restore_policy()
            log.warning("firewall sets did not hold what they should; restored", sets=sorted(wrong))

    async def _keep_limits(self) -> None:
        while True:
            await asyncio.sleep(LIMITS_EVERY)
            await self._endpoints.restore_limits()

    async def _keep_journal(self) -> None:
        """Notices also where nothing is written that the journal is not the file any more that a start finds."""
        while True:
            await asyncio.sleep(JOURNAL_EVERY)
            self._journal.keep_in_place()

    async def _undo_unfinished(self) -> None:
        """An ADD that a killed agent had begun waits for its hook to come back, but not for ever."""
        await asyncio.sleep(RETURN_WINDOW)
        # The journal may be older than it looks: only the store tells.
        await self._recovered.wait()
        for endpoint in self._begun_before:
            await self._endpoints.undo_unfinished(endpoint.key, endpoint.request_id)
