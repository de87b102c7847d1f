"""Simulated hosts: a Mesos agent and a moorage agent each, without their networking, so that thousands of steps fit.

What is simulated are namespaces and processes: ``Life`` says what is really there. The addresses are the agent's own
code on a journal of its own (moorage/lab/simulated.py), and intents are answered by what ``Life`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ipam.errors import MoorageError, StoreError
from ipam.intents import IntentServer
from ipam.journal import AddressRow
from ipam.keys import IPAddress
from ipam.membership import Membership
from ipam.records import AddressState, Intent, IntentKind, Network
from ipam.records import Node as NodeRecord
from ipam.store import Lease, Store
from moorage.lab.simulated import SimulatedNode
from tests.standins.mesos_agent import Agent, Contained
from tests.standins.mesos_master import Master

IFNAME = "eth0"

SHOWS_LIFE = 5.0
"""Seconds for which the sign of life of a moorage agent that is dead still stands."""

LEASE = 60.0
"""Seconds of a living one's lease. Long: it lapses when a history says so, and not because the machine is busy."""

SLOW_END = (0.5, 5.0)
"""Seconds a container may live on after its task's end was reported: it is still being destroyed."""


@dataclass(eq=False)
class Life:
    """A container as it really is.

    ips: carried from ADD on. is_secret: the moorage agent never learns whose it is. ended: monotonic; None while a
    process is inside.
    """

    id: str
    task: str
    framework: str
    host: str
    ips: tuple[IPAddress, ...] = ()
    boot: str = ""
    begun: bool = False
    is_secret: bool = False
    ended: float | None = None

    @property
    def is_live(self) -> bool:
        return self.begun and self.ended is None


@dataclass
class Truth:
    """What is there on all hosts. carried: by address, what lives on it now."""

    lives: dict[str, Life] = field(default_factory=dict)
    carried: dict[IPAddress, Life] = field(default_factory=dict)
    carried_twice: list[str] = field(default_factory=list)
    suspected: set[tuple[str, str]] = field(default_factory=set)
    lost_dels: int = 0

    def begin(self, life: Life, ips: list[IPAddress]) -> None:
        life.ips, life.begun = tuple(ips), True
        for ip in ips:
            other = self.carried.get(ip)
            if other is not None:
                self.carried_twice.append(f"{ip}: {other.id} on {other.host} and {life.id} on {life.host}")
            self.carried[ip] = life

    def end(self, life: Life) -> None:
        life.ended = time.monotonic()
        for ip in life.ips:
            if self.carried.get(ip) is life:
                del self.carried[ip]


class Host(Agent):
    """See the module's docstring.

    loses: share of its DELs that never happen. forgets: share of its containers of which the moorage agent never
    learns whose they are. slow: share that live on after their end was reported. dead_id: the Mesos agent's, when the
    power was last cut. has_to_serve: its moorage agent is not to be killed now.
    """

    def __init__(
        self,
        master: Master,
        name: str,
        *,
        store: Store,
        network: Network,
        directory: Path,
        truth: Truth,
        chance: random.Random,
    ) -> None:
        super().__init__(master, name)
        self.name = name
        self.loses = 0.3
        self.forgets = 0.02
        self.slow = 0.25
        self.is_on = False
        self.up_since: float | None = None
        self._store = store
        self._network = network
        self._truth = truth
        self._chance = chance
        self._boots = 0
        self.dead_id = ""
        self.has_to_serve = False
        self.node = SimulatedNode(directory, store, name, cooldown=0.5)
        self._membership: Membership | None = None
        self._changing = asyncio.Lock()
        self._spool: list[Life] = []
        self._unseen: list[Contained] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def serves(self) -> bool:
        """Whether its moorage agent runs."""
        return self.up_since is not None

    # -- the machine

    async def power_on(self, *, keeps_state: bool = True) -> None:
        """Both agents start. Without its state the Mesos agent is a new one."""
        self._boots += 1
        self.is_on = True
        self.node.boot_id = f"boot-{self._boots}"
        if not keeps_state:
            self.id = ""
            self._unsent.clear()
        dead = list(self.containers.values())
        self.containers.clear()
        before = self.id
        self.start()
        for container in dead if self.id == before else ():
            self.report(container, "TASK_GONE", "Executor terminated", "REASON_EXECUTOR_TERMINATED")
        await self.start_agent()

    async def power_off(self) -> None:
        """All that ran is dead, and nobody is told."""
        self.is_on = False
        self.dead_id = self.id
        self.stop()
        await self.kill_agent()
        for container in self.containers.values():
            life = self._truth.lives.get(container.id)
            if life is not None and life.ended is None:
                self._truth.end(life)
        self._spool.clear()
        self._unseen.clear()

    async def start_agent(self) -> None:
        """The moorage agent: what is of another boot is released, what was spooled is carried out."""
        # One at a time: an agent that is started twice leaves a sign of life that nobody ends.
        async with self._changing:
            if self.is_on and not self.serves:
                await self._start_agent()

    async def _start_agent(self) -> None:
        node = self.node
        while True:
            try:
                await node.start()
                record = NodeRecord(name=self.name, version="1", mesos_agent=self.id)
                membership = Membership(self._store, record, node.instance, node.boot_id, node.holder.fenced)
                # Like the real one it serves nobody before: somebody may be freeing what it held at this moment.
                await membership.register()
                break
            except MoorageError:
                await node.crash()
                await asyncio.sleep(0.1)
        self._membership = membership
        self.describe()
        intents = IntentServer(self._store, self.name, self._answer)
        node.run_beside(membership.keep, intents.run)
        for ip, held in node.holder.assigned().items():
            life = self._truth.lives.get(held.record.container_id) if held.record else None
            if (
                life is None
                or life.host != self.name
                or (life.ended is not None and self._rebooted_since(life))
            ):
                self._release([ip])
        self.up_since = time.monotonic()
        spooled, self._spool = self._spool, []
        for life in spooled:
            self._delete(life)
        for container in self.containers.values():
            self._tell_whose(container, self._truth.lives[container.id])

    def _rebooted_since(self, life: Life) -> bool:
        return life.id not in self.containers and life.boot != self.node.boot_id

    async def kill_agent(self) -> None:
        """kill -9 of the moorage agent; its sign of life stays for SHOWS_LIFE seconds."""
        async with self._changing:
            if self.up_since is None:
                return
            self.up_since = None
            await self.node.crash()
            membership, self._membership = self._membership, None
            if membership is not None and membership._lease is not None:
                await membership._lease.abandon()
                self._spawn(self._expire(membership._lease))

    @staticmethod
    async def _expire(lease: Lease) -> None:
        """As the store does it when nobody renews a lease."""
        await asyncio.sleep(SHOWS_LIFE)
        with contextlib.suppress(StoreError):  # it is closed: the history is over
            await lease.revoke()

    async def lapse(self, seconds: float) -> None:
        """Its moorage agent's sign of life is gone for so long; the agent lives on."""
        membership = self._membership
        if membership is not None and membership._lease is not None:
            async with membership._telling:
                await membership._lease.revoke()
                await asyncio.sleep(seconds)

    def _connect(self) -> None:
        """One that was marked gone is told so, ends, and is started as another agent."""
        super()._connect()
        if not self.id:
            super()._connect()
        self.describe()

    def describe(self) -> None:
        """The Mesos agent's id may be another by now."""
        if self._membership is not None:
            self._membership.describe(NodeRecord(name=self.name, version="1", mesos_agent=self.id))

    # -- the Mesos agent

    def crash(self) -> None:
        """The Mesos agent is dead; its containers go on."""
        self.stop()

    def restart(self) -> None:
        """It is back, and destroys what ended meanwhile."""
        self.start()
        unseen, self._unseen = self._unseen, []
        for container in unseen:
            self._destroy(container)

    def _begin(self, container: Contained) -> None:
        task = container.tasks[0]
        life = Life(container.id, task.id, task.framework, self.name)
        self._truth.lives[container.id] = life
        self._spawn(self._live(container, life))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, container: Contained, life: Life) -> None:
        """ADD, and the command."""
        node, holder = self.node, self.node.holder if self.serves else None
        lent = None
        if holder is not None:
            with contextlib.suppress(MoorageError):
                lent = await node.take(self._network)
        usable = lent is not None and holder is node.holder and self.serves and life.ended is None
        if not usable or container.killed:
            if usable and lent is not None:
                holder.put_back(lent)
            life.ended = life.ended or time.monotonic()
            if container.id in self.containers:
                self.forget(container)
                why = "REASON_CONTAINER_LAUNCH_FAILED"
                await asyncio.sleep(0.2)  # Marathon backs off, too
                self.report(container, "TASK_FAILED", "Failed to launch container", why)
            return
        life.boot = node.boot_id
        self._truth.begin(life, node.assign(lent, container.id))
        given = [{"protocol": "IPv4", "ip_address": str(ip)} for ip in life.ips]
        container.network_infos = ({"name": self._network.name, "ip_addresses": given},)
        self.report(container, "TASK_RUNNING")
        life.is_secret = self._chance.random() < self.forgets
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        self._tell_whose(container, life)

    def _tell_whose(self, container: Contained, life: Life) -> None:
        """The moorage agent has asked the Mesos agent which task it is, off the ADD path."""
        if not self.serves or life.is_secret:
            return
        task = container.tasks[0]
        rows = []
        for ip in life.ips:
            held = self.node.holder.held(ip)
            if held is not None and held.record is not None and held.record.container_id == life.id:
                whose = held.record.with_(task=task.id, app="/" + task.name, framework=task.framework)
                if whose.state is AddressState.ASSIGNED:
                    rows.append(AddressRow(ip, whose, held.revision, True))
        self.node.journal.save_addresses(rows)
        self.node.holder.accept(rows)

    def _end(self, container: Contained) -> None:
        """A kill has arrived. Some containers take their time after their end was reported."""
        life = self._truth.lives[container.id]
        if not life.is_live:
            return
        if self._chance.random() < self.slow:
            self.report(container, "TASK_KILLED")
            self._spawn(self._end_slowly(container))
        else:
            self._truth.end(life)
            self._destroy(container)

    async def _end_slowly(self, container: Contained) -> None:
        await asyncio.sleep(self._chance.uniform(*SLOW_END))
        life = self._truth.lives[container.id]
        if life.is_live:
            self._truth.end(life)
            self._delete_or_lose(life)
            self.forget(container)

    def die(self, container: Contained) -> None:
        """Its process ends by itself."""
        life = self._truth.lives[container.id]
        if not life.is_live:
            return
        self._truth.end(life)
        if self.is_running:
            self._destroy(container)
        else:
            self._unseen.append(container)

    def report_gone(self, container: Contained) -> None:
        """TASK_GONE for one task of an agent that lives; the process goes on for a while."""
        self.report(container, "TASK_GONE", "Executor terminated", "REASON_EXECUTOR_TERMINATED")
        self._spawn(self._end_slowly(container))

    def _destroy(self, container: Contained) -> None:
        if container.id not in self.containers:
            return
        self._delete_or_lose(self._truth.lives[container.id])
        self.forget(container)
        if not (container.statuses and container.statuses[-1].is_terminal):
            self.report(container, "TASK_KILLED" if container.killed else "TASK_FINISHED")

    # -- the hook

    def _delete_or_lose(self, life: Life) -> None:
        if self._chance.random() < self.loses:
            self._truth.lost_dels += 1
        elif self.serves:
            self._delete(life)
        else:
            self._spool.append(life)

    def _delete(self, life: Life) -> None:
        self._accept(self.node.holder.plan_release(life.ips, (life.id, IFNAME)))

    def _release(self, ips: list[IPAddress]) -> None:
        self._accept(self.node.holder.plan_release(ips))

    def _accept(self, rows: list[AddressRow]) -> None:
        self.node.journal.save_addresses(rows)
        self.node.holder.accept(rows)

    async def _answer(self, intent: Intent) -> dict[str, Any]:
        """As the isolator answers: what nobody lives on is released, if it still is what the asker saw."""
        if intent.kind is not IntentKind.VERIFY:
            return await self.node.holder.give_back(intent)
        ip = ip_address(intent.ip)
        held = self.node.holder.held(ip)
        if held is None or held.record is None or held.record.state is not AddressState.ASSIGNED:
            return {"done": True, "why": f"{ip} is not assigned here any more"}
        if held.record.id != intent.id or (not held.dirty and held.revision != intent.mod_revision):
            return {"done": False, "changed": True, "why": f"{ip} changed since it was looked at; look again"}
        life = self._truth.carried.get(ip)
        if life is not None:
            self._truth.suspected.add((intent.ip, intent.id))
            why = f"{ip} is carried by the live container {life.id} ({IFNAME})"
            return {"done": False, "live": True, "why": why}
        self._release([ip])
        return {"done": True, "why": f"{ip} is released"}
