"""Pressure: before a pool is called exhausted, other nodes are asked to give back what they do not need.

    asker   reads who holds what in the pool -> intents `give-back` to live nodes -> looks once more
    node    frees its warm addresses of the pool, returns its empty blocks, and keeps none warm for a while

Asking goes on beside the upkeep: who is asked may be asking us at the same moment.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from ipam import keys
from ipam.errors import MoorageError, StoreError
from ipam.holdings import Holdings
from ipam.intents import ask
from ipam.keys import IPAddress, IPNetwork
from ipam.pools import Geometry, block_at
from ipam.records import Address, AddressState, Block, Intent, IntentKind
from ipam.store.base import Store

log = structlog.get_logger(__name__)

ASK_EVERY = 2.0
"""Seconds between two rounds of questions about one pool while somebody waits."""

SCARCE_EVERY = 10.0
"""The same while the pool is scarce, but whoever came still got an address."""

ANSWER_WITHIN = 3.0
"""Seconds that a node may take to answer."""

CONFIRMED_WITHIN = 2.5
"""Seconds that who gives back waits for the store to confirm, before it answers."""

BLOCKS_WITHIN = 0.5
"""Seconds that who gives back waits for its empty blocks; some turn out to hold somebody's address."""

LOOK_EVERY = 0.005

ASKED_AT_ONCE = 32
"""Nodes in one round, the largest holders first."""


@dataclass(frozen=True, slots=True)
class Relief:
    """What a round brought. freed: addresses and blocks. away: warm addresses of nodes that are not alive."""

    freed: int = 0
    away: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Round:
    """good_for: seconds after which its relief says nothing any more."""

    task: asyncio.Task[None]
    relief: Relief | None = None
    finished: float = 0.0
    good_for: float = SCARCE_EVERY


class Pressure:
    """See the module's docstring. on_relief is told a pool's name when a round about it has ended."""

    def __init__(self, store: Store, holdings: Holdings, on_relief: Callable[[str], None]) -> None:
        self._store = store
        self._holdings = holdings
        self._on_relief = on_relief
        self._rounds: dict[str, _Round] = {}

    def cancel(self) -> None:
        """Nobody waits for the rounds under way any more."""
        for name, round_ in list(self._rounds.items()):
            if round_.relief is None:
                round_.task.cancel()
                del self._rounds[name]

    def note_scarcity(self, pool: Geometry) -> None:
        """Few addresses are left; others are asked in good time, now and then."""
        known = self._rounds.get(pool.name)
        if known is None or (known.relief and self._now() - known.finished >= SCARCE_EVERY):
            self._begin(pool)

    def relief(self, pool: Geometry) -> Relief | None:
        """What asking has brought, when that was nothing; None while there is still hope."""
        known = self._rounds.get(pool.name)
        if known is not None and known.relief is None:
            return None
        if known is None or known.relief is None:
            self._begin(pool)
            return None
        # If something was freed and somebody else was faster, there may be more next time. When that is,
        # ``next_round`` says only until it has come: who comes later begins a round of its own.
        good_for = ASK_EVERY if known.relief.freed else known.good_for
        if self._now() - known.finished >= good_for:
            self._begin(pool)
            return None
        known.good_for = ASK_EVERY
        return None if known.relief.freed else known.relief

    def next_round(self) -> float | None:
        """When somebody may be asked again who had something to give."""
        now = self._now()
        times = [r.finished + ASK_EVERY for r in self._rounds.values() if r.relief and r.relief.freed]
        return min((t for t in times if t > now), default=None)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _begin(self, pool: Geometry) -> None:
        self._rounds[pool.name] = _Round(asyncio.create_task(self._run(pool)))

    async def _run(self, pool: Geometry) -> None:
        relief = Relief()
        try:
            relief = await self._ask_around(pool)
        except MoorageError as error:
            log.info("nobody could be asked to give back", pool=pool.name, why=str(error))
        except Exception:
            log.exception("asking around failed on a bug", pool=pool.name)
        round_ = self._rounds[pool.name]
        round_.relief, round_.finished = relief, self._now()
        self._on_relief(pool.name)

    async def _ask_around(self, pool: Geometry) -> Relief:
        warm, idle, neighbours = await self._holders(pool)
        if (neighbours | set(idle)) - {self._holdings.node}:
            # What they give back is for who waits, here too.
            self._holdings.hold_back(pool.name)
        wealth = warm + idle
        nodes = [node for node, _ in wealth.most_common(ASKED_AT_ONCE) if node != self._holdings.node]
        leases = await asyncio.gather(*(self._store.get(keys.ALIVE + node) for node in nodes))
        alive = [node for node, lease in zip(nodes, leases, strict=True) if lease is not None]
        away = {node: warm[node] for node in nodes if node not in alive and warm[node]}
        freed = await asyncio.gather(*(self._ask(node, pool) for node in alive))
        return Relief(sum(freed), away)

    async def _ask(self, node: str, pool: Geometry) -> int:
        intent = Intent(kind=IntentKind.GIVE_BACK, evidence={"pool": pool.name})
        try:
            answer = await ask(self._store, node, intent, ANSWER_WITHIN)
        except MoorageError as error:
            log.info("node gave nothing back", node=node, pool=pool.name, why=str(error))
            return 0
        freed = answer.get("freed", 0)
        return freed if isinstance(freed, int) else 0

    async def _holders(self, pool: Geometry) -> tuple[Counter[str], Counter[str], set[str]]:
        """Warm addresses with those on their way back, and blocks without any address in them, by node; and every node
        that has any address."""
        warm: Counter[str] = Counter()
        nodes: set[str] = set()
        busy: set[IPNetwork] = set()
        cursor: str | None
        cursor, end = keys.address_range(pool.cidr)
        while cursor is not None:
            page = await self._store.page(cursor, end)
            for kv in page.items:
                try:
                    busy.add(pool.block_of(keys.ip_of(kv.key)))
                    record = Address.decode(kv.key, kv.value)
                except StoreError:
                    continue  # nobody can be asked for it; `moorage ip check` reports it
                nodes.add(record.node)
                if record.state is AddressState.WARM or record.is_withdrawn:
                    warm[record.node] += 1
            cursor = page.next_key
        return warm, await self._idle_blocks(pool, busy), nodes

    async def _idle_blocks(self, pool: Geometry, busy: set[IPNetwork]) -> Counter[str]:
        idle: Counter[str] = Counter()
        cursor: str | None
        cursor, end = keys.block_range(pool.cidr)
        while cursor is not None:
            page = await self._store.page(cursor, end)
            for kv in page.items:
                try:
                    record = Block.decode(kv.key, kv.value)
                    if block_at(keys.ip_of(kv.key), record.size) not in busy:
                        idle[record.node] += 1
                except StoreError:
                    continue
            cursor = page.next_key
        return idle


class Generosity:
    """The side that is asked: answers intents of kind `give-back`."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._shelf = holdings.shelf

    async def give_back_pool(self, pool: str) -> dict[str, object]:
        """Free the warm addresses of ``pool`` that nobody waits for, and return its empty blocks.

        What is on its way back already counts as well: another node may have asked a moment before.
        """
        for held in self._shelf.all_ready():
            if held.is_of(pool):
                self._shelf.withdraw(held)
        leaving = self._shelf.leaving(pool)
        blocks = self._holdings.blocks_of(pool)
        self._holdings.hold_back(pool)
        self._holdings.wake.set()

        def freed() -> int:
            return sum(self._shelf.held.get(held.ip) is not held for held in leaving)

        def stays() -> int:
            return sum(held.record is not None and not held.is_withdrawn for held in leaving)

        def returned() -> int:
            return len(blocks - self._holdings.blocks_of(pool))

        def idle() -> bool:
            return any(space.is_idle for b, space in self._shelf.spaces.items() if b in blocks)

        await self._until(lambda: freed() + stays() >= len(leaving), CONFIRMED_WITHIN)
        await self._until(lambda: not idle(), BLOCKS_WITHIN)
        return {"done": freed() == len(leaving), "freed": freed() + returned()}

    async def give_back_ip(self, ip: IPAddress, revision: int, reservation: str) -> dict[str, object]:
        """Free one address if nobody uses it: a warm one, or one that cools after an owner with that reservation.

        revision: as the asker saw it; 0 if it did not look.
        """
        held = self._shelf.held.get(ip)
        if held is None:
            return {"done": True, "freed": 0}
        record = held.record
        if record is None:
            await self._until(lambda: self._shelf.held.get(ip) is not held, CONFIRMED_WITHIN)
            return {"done": self._shelf.held.get(ip) is not held, "freed": 0}
        if held.dirty or held.lent or (revision and held.revision != revision):
            return {"done": False, "why": f"{ip} is changing hands on node {self._holdings.node}"}
        kept = self._holdings.catalogue.reserved(ip)
        same_key = kept is not None and kept.reservation.key == reservation == record.reservation
        cooled_for_it = record.state is AddressState.COOLING and held.ready_at is not None and same_key
        if record.state is not AddressState.WARM and not cooled_for_it:
            return {"done": False, "why": f"{ip} is {record.state.value} on node {self._holdings.node}"}
        if held.is_announced and (why := self._holdings.why_not_renounced(held)):
            return {"done": False, "why": why}
        self._shelf.withdraw(held)
        self._holdings.wake.set()
        await self._until(lambda: self._shelf.held.get(ip) is not held, CONFIRMED_WITHIN)
        gone = self._shelf.held.get(ip) is not held
        return {"done": gone, "freed": int(gone)}

    @staticmethod
    async def _until(condition: Callable[[], bool], patience: float) -> None:
        now = asyncio.get_running_loop().time
        deadline = now() + patience
        while True:
            if condition() or now() >= deadline:
                return
            await asyncio.sleep(LOOK_EVERY)
