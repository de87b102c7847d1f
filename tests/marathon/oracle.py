"""Judges a history by what is really there, never by what the reconciler says or does.

1. An address that a live container carries is never released: looked at in every transaction of the nodes before it is
   sent and after it has landed, and in everything that the store's watch tells, whoever did it.
2. What is provably stale is released within the grace and ALLOWANCE seconds: a clock an address, which runs while
   everybody is there that has to be, and starts anew when that was not so. It is a witness's (witness.py).

What belongs to a node that is gone is provably stale when its agent has been away for ``gone_after`` seconds in a row,
and the listener that leads has led for as long: it cannot know it sooner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from ipam import keys
from ipam.keys import IPAddress
from ipam.records import Address, AddressState, Alive
from ipam.store import Delete, KeyValue, Lease, Page, Put, Store, Txn, TxnResult, WatchBatch, read_prefix
from tests.marathon.hosts import Host, Life, Truth
from tests.marathon.witness import Witness
from tests.standins.marathon import Marathon
from tests.standins.mesos_master import Master

ALLOWANCE = 10.0
"""Seconds beyond the grace until a provably stale address has to be released."""

EVERY = 0.2
"""Seconds between looks."""


class WatchedStore:
    """See ipam.store.base.Store: a real store, in which every transaction is looked at."""

    def __init__(self, store: Store, truth: Truth) -> None:
        self.store = store
        self.released_live: list[str] = []
        self._truth = truth

    async def txn(self, txn: Txn) -> TxnResult:
        before = {key: life for key in _touched(txn) if (life := self._carried(key)) is not None}
        result = await self.store.txn(txn)
        for op in _landed(txn, result):
            life = before.get(op.key)
            if life is not None and life.is_live and not _keeps(op, life):
                self.released_live.append(f"{keys.ip_of(op.key)} of {life.id} on {life.host}: {op}")
        return result

    def _carried(self, key: str) -> Life | None:
        """Who lives on the address that a key stands for."""
        return self._truth.carried.get(keys.ip_of(key)) if key.startswith(keys.ADDRESSES) else None

    async def get(self, key: str) -> KeyValue | None:
        return await self.store.get(key)

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        return await self.store.page(start, end, limit=limit, revision=revision, keys_only=keys_only)

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        return self.store.watch(prefix, from_revision)

    async def lease(self, ttl: float) -> Lease:
        return await self.store.lease(ttl)

    async def close(self) -> None:
        await self.store.close()


def _touched(txn: Txn) -> Iterator[str]:
    """The keys that a transaction might write."""
    for op in (*txn.then, *txn.orelse):
        if isinstance(op, Txn):
            yield from _touched(op)
        elif isinstance(op, (Put, Delete)):
            yield op.key


def _landed(txn: Txn, result: TxnResult) -> Iterator[Put | Delete]:
    """What a transaction has written."""
    for op, outcome in zip(txn.then if result.succeeded else txn.orelse, result.results, strict=True):
        if isinstance(op, Txn):
            assert isinstance(outcome, TxnResult)
            yield from _landed(op, outcome)
        elif isinstance(op, (Put, Delete)):
            yield op


def _keeps(op: Put | Delete, life: Life) -> bool:
    """Whether the address still is that container's afterwards."""
    if isinstance(op, Delete):
        return False
    record = Address.decode(op.key, op.value)
    return record.state is AddressState.ASSIGNED and record.container_id == life.id


@dataclass(slots=True)
class Clock:
    """Since when an address has been provably stale while everybody was there: by the witness, and by the wall.

    why: what proves it. leader: the listener that has to see to it.
    """

    since: float
    begun: float
    why: str
    leader: int


@dataclass(slots=True)
class Framework:
    """A Marathon, and the listener that leads for it. pid: None if none leads that also works. since: it does."""

    marathon: Marathon
    pid: int | None = None
    since: float = 0.0


@dataclass
class Oracle:
    """See the module's docstring. frameworks: by id; the first one's leader sees to what is no framework's.

    stale, unreachable, gone: (ip, id) of all that ever were so, unreachable ones while they lived. late: sentences.
    in_time: releases while the clock ran. slowest, slowest_by_the_wall: seconds, of those.
    """

    store: Store
    truth: Truth
    hosts: dict[str, Host]
    frameworks: dict[str, Framework]
    master: Master
    grace: float
    gone_after: float
    witness: Witness
    stale: set[tuple[str, str]] = field(default_factory=set)
    unreachable: set[tuple[str, str]] = field(default_factory=set)
    gone: set[tuple[str, str]] = field(default_factory=set)
    released_live: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    in_time: int = 0
    slowest: float = 0.0
    slowest_by_the_wall: float = 0.0
    looks: int = 0
    _clocks: dict[tuple[str, str], Clock] = field(default_factory=dict)
    _away_since: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_around())
            group.create_task(self._follow())

    # -- 1

    async def _follow(self) -> None:
        items, revision = await read_prefix(self.store, keys.ADDRESSES)
        assigned = {kv.key: Address.decode(kv.key, kv.value) for kv in items}
        async for batch in self.store.watch(keys.ADDRESSES, revision + 1):
            for event in batch.events:
                before = assigned.pop(event.key, None)
                now = None if event.kv is None else Address.decode(event.key, event.kv.value)
                if now is not None and now.state is AddressState.ASSIGNED:
                    assigned[event.key] = now
                if before is not None and (now is None or now.id != before.id or event.key not in assigned):
                    self._ended(keys.ip_of(event.key), before)

    def _ended(self, ip: IPAddress, assignment: Address) -> None:
        life = self.truth.carried.get(ip)
        if life is not None and life.id == assignment.container_id:
            self.released_live.append(
                f"{ip} of {life.id} on {life.host}, seen in the store; {self._how(life.host)}"
            )
        clock = self._clocks.pop((str(ip), assignment.id), None)
        if clock is not None:
            self.in_time += 1
            self.slowest = max(self.slowest, self.witness.now() - clock.since)
            self.slowest_by_the_wall = max(self.slowest_by_the_wall, time.monotonic() - clock.begun)

    def _how(self, name: str) -> str:
        """How a host is that something was taken from, for people."""
        now, host = time.monotonic(), self.hosts[name]
        serves = "does not serve" if host.up_since is None else f"serves for {now - host.up_since:.1f} s"
        away = self._away_since.get(name)
        sign = "shows life" if away is None else f"shows no life for {now - away:.1f} s"
        known = self.master.agents.get(host.id)
        return f"its agent {serves} and {sign}; Mesos calls it {known.state if known else 'nothing'}"

    # -- 2

    async def _look_around(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY)

    async def look(self) -> set[tuple[str, str]]:
        """Look once; what is provably stale now."""
        items, _ = await read_prefix(self.store, keys.ADDRESSES)
        leases, _ = await read_prefix(self.store, keys.ALIVE)
        alive = {kv.key.removeprefix(keys.ALIVE): Alive.decode(kv.key, kv.value).instance for kv in leases}
        # Addresses first: what ends after this is not judged by what was read before.
        now = time.monotonic()
        self._away_since = {name: self._away_since.get(name, now) for name in self.hosts if name not in alive}
        self.looks += 1
        found = {}
        assigned = [
            (keys.ip_of(kv.key), record)
            for kv in items
            if (record := Address.decode(kv.key, kv.value)).state is AddressState.ASSIGNED
        ]
        answering = {
            name
            for name, framework in self.frameworks.items()
            if any(r.task in framework.marathon.tasks for _, r in assigned if r.framework == name)
        }
        for ip, record in assigned:
            key = (str(ip), record.id)
            if self._is_unreachable(record) and ip in self.truth.carried:
                self.unreachable.add(key)
            leading = self.frameworks.get(record.framework) or next(iter(self.frameworks.values()))
            if why := self._why_stale(ip, record, alive, leading, answers=record.framework in answering):
                found[key] = (why, leading)
        self._tick(found)
        return set(found)

    def _is_unreachable(self, record: Address) -> bool:
        framework = self.frameworks.get(record.framework)
        task = framework.marathon.tasks.get(record.task) if framework else None
        return task is not None and task.state == "TASK_UNREACHABLE"

    def _why_stale(
        self, ip: IPAddress, record: Address, alive: dict[str, str], leading: Framework, *, answers: bool
    ) -> str:
        """Why an address is provably stale now; "" if it is not, or somebody who is needed is away."""
        host = self.hosts[record.node]
        if record.node not in alive:
            registered = self.master.agents.get(host.dead_id)
            gone = registered is not None and registered.state == "gone"
            away_since = max(self._away_since[record.node], leading.since)
            long_enough = time.monotonic() - away_since >= self.gone_after
            if not host.is_on and gone and long_enough and _answers(self.master):
                self.gone.add((str(ip), record.id))
                return f"node {record.node} is gone"
            return ""
        life = self.truth.lives.get(record.container_id)
        if life is None or life.ended is None or record.framework not in self.frameworks:
            return ""
        self.stale.add((str(ip), record.id))
        if not host.serves or alive[record.node] != host.node.instance or host.node.holder.problem:
            return ""
        if record.task in leading.marathon.tasks or not answers or not _answers(leading.marathon):
            return ""
        return f"{record.container_id} on {record.node} has ended, and Marathon does not know {record.task}"

    def _tick(self, found: dict[tuple[str, str], tuple[str, Framework]]) -> None:
        now, wall = self.witness.now(), time.monotonic()
        before, self._clocks = self._clocks, {}
        for key, (why, leading) in found.items():
            if leading.pid is None:
                continue
            clock = before.get(key)
            if clock is None or clock.leader != leading.pid:
                clock = Clock(now, wall, why, leading.pid)
            self._clocks[key] = clock
            if now - clock.since > self.grace + ALLOWANCE:
                late = f"{now - clock.since:.1f} s, {wall - clock.begun:.1f} s by the wall"
                self.late.append(f"{key[0]}: {clock.why}, for {late}")
                clock.since, clock.begun = now, wall


def _answers(service: Marathon | Master) -> bool:
    """Whether all its instances are there and behave, so that whoever asks any of them is answered."""
    return service.elected is not None and all(
        one.is_running
        and not (one.faults.status or one.faults.delay or one.faults.truncate or one.faults.hang)
        for one in service.instances
    )
