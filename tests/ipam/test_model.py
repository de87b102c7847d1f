"""Everything at once, against a model that knows only who was told to have which address.

Nodes share the pools of one network: two that have room, or three in pools so small that they borrow from each
other and are asked to give back. Containers start, stop and are refused, agents are killed,
the store goes away, loses replies and delivers late. The model is a dictionary; what it asserts is what
DESIGN.md section 5 promises. A failing seed is printed and shrinks: `run` takes the list of steps.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam.coming_back import Asker
from ipam.errors import MoorageError, NotAllocated
from ipam.keys import IPAddress
from ipam.networks import PoolSpec, create_network, set_pools_disabled
from ipam.records import Network
from ipam.reservations import reserve, unreserve
from ipam.store import open_store
from tests.ipam.faulty import FaultyStore
from tests.ipam.nodes import Node, stored
from tests.patience import PATIENCE

STATIC = [f"10.64.0.{n}" for n in (12, 13, 14)]
RESERVED = ip_address("10.64.0.9")
COOLDOWN = 0.01

Step = tuple[str, int]
ACTIONS = (
    ["take"] * 6
    + ["release"] * 5
    + ["again"] * 3
    + ["static", "static", "by name", "reservation", "move", "put back", "burst", "cancel", "pause", "pause"]
    + ["allocate", "allocate", "isolate", "isolate", "let go"]
    + ["crash", "outage", "lost replies", "late replies", "deliver", "disable", "reserve", "resync"]
)
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1000)), min_size=5, max_size=40)


@dataclass(frozen=True)
class Shape:
    nodes: int
    pool: PoolSpec
    pool6: PoolSpec

    @property
    def pool_name(self) -> str:
        return self.pool.cidr.replace("/", "-")


STATIC_RANGE = (f"{STATIC[0]}-{STATIC[-1]}",)
ROOMY = Shape(
    2, PoolSpec("10.64.0.0/27", block_size=29, static=STATIC_RANGE), PoolSpec("fd00:64::/120", block_size=126)
)
TIGHT = Shape(
    3, PoolSpec("10.64.0.0/28", block_size=29, static=STATIC_RANGE), PoolSpec("fd00:64::/125", block_size=127)
)


class World:
    """The nodes, their store, and the model: container -> (node, addresses), and uid -> the same."""

    def __init__(self, path: Path, store: FaultyStore, net: Network, shape: Shape) -> None:
        self.store, self.net, self.shape = store, net, shape
        self.nodes = [Node(path, store, f"n{i + 1}", cooldown=COOLDOWN) for i in range(shape.nodes)]
        self.holds: dict[str, tuple[Node, list[IPAddress]]] = {}
        self.promised: dict[str, tuple[Node, list[IPAddress]]] = {}
        self.released_at: dict[IPAddress, float] = {}
        self.names = (f"c{i}" for i in itertools.count())
        self.disabled = self.reserved = False

    def node(self, n: int) -> Node:
        return self.nodes[n % len(self.nodes)]

    async def add(self, node: Node, *ips: str, key: str | None = None) -> None:
        try:
            lent = await node.take(self.net, *ips, reservation=key)
        except MoorageError:
            return
        self.begin(node, lent, key)

    def begin(self, node: Node, lent: list[object], key: str | None = None) -> None:
        name = next(self.names)
        addresses = node.assign(lent, name, key or "")
        assert sorted(ip.version for ip in addresses) == [4, 6]
        self.check_new(name, addresses, key)
        assert all(str(ip) not in STATIC or any(h.ip == ip for h in lent) for ip in addresses)
        self.holds[name] = (node, addresses)

    def check_new(self, name: str, addresses: list[IPAddress], key: str | None = None) -> None:
        """Nobody has them, and they have cooled down."""
        taken = {ip for _, ips in (*self.holds.values(), *self.promised.values()) for ip in ips}
        assert not taken & set(addresses), f"{taken & set(addresses)} given to {name} though it is in use"
        now = asyncio.get_running_loop().time()
        for ip in addresses:
            early = key is not None and ip == RESERVED
            assert early or now - self.released_at.get(ip, 0.0) >= COOLDOWN, (
                f"{ip} reused before its cooldown"
            )

    async def allocate(self, node: Node, n: int) -> None:
        uid = next(self.names)
        try:
            ips = await node.allocate(self.net, uid, ipv4=n % 3, ipv6=n % 2)
        except MoorageError:
            return
        self.check_new(uid, ips)
        assert sorted(ip.version for ip in ips) == [4] * (n % 3) + [6] * (n % 2)
        self.promised[uid] = (node, ips)

    def isolate(self, n: int) -> None:
        """A container gets what a uid has, on its node; on another it does not."""
        uid = sorted(self.promised)[n % len(self.promised)]
        node, ips = self.promised[uid]
        for other in self.nodes:
            if other is not node and ips:
                with pytest.raises(NotAllocated):
                    other.isolate(ips, "a thief")
        node.isolate(ips, uid)
        self.holds[uid] = self.promised.pop(uid)

    def let_go(self, n: int) -> None:
        """A uid gives up what it has: what a container has already stays that one's."""
        uid = sorted({**self.promised, **self.holds})[n % (len(self.promised) + len(self.holds))]
        node, ips = self.promised.pop(uid, None) or (self.holds[uid][0], [])
        node.release(uid)
        self.released_at |= dict.fromkeys(ips, asyncio.get_running_loop().time())

    async def do(self, action: str, n: int) -> None:
        node = self.node(n)
        match action:
            case "take":
                await self.add(node)
            case "burst":
                await asyncio.gather(*(self.add(self.node(i)) for i in range(n % 10)))
            case "static":
                await self.add(node, STATIC[n % 3])
            case "by name":
                await self.add(node, f"10.64.0.{1 + n % 11}")
            case "move":
                for name, (_, ips) in list(self.holds.items()):
                    if RESERVED in ips:
                        self.release(name)
                await self.add(node, key="db")
            case "reservation":
                await self.add(node, key="db")
            case "put back":
                try:
                    node.holder.put_back(await node.take(self.net))
                except MoorageError:
                    return
            case "cancel":
                taking = asyncio.create_task(node.take(self.net, *([STATIC[n % 3]] if n % 4 == 0 else [])))
                await asyncio.sleep((n % 5) / 2000)
                taking.cancel()
                (answer,) = await asyncio.gather(taking, return_exceptions=True)
                if isinstance(answer, list):
                    node.holder.put_back(answer)
            case "release":
                if self.holds:
                    self.release(sorted(self.holds)[n % len(self.holds)])
            case "again":
                if self.holds:
                    await self.again(n)
            case "allocate":
                await self.allocate(node, n)
            case "isolate":
                if self.promised:
                    self.isolate(n)
            case "let go":
                if self.promised or self.holds:
                    self.let_go(n)
            case "crash":
                await node.crash()
                node.load()
                node.serve()
                node.live_on()
            case "resync":
                node.holder._writer._claimed = False  # as after a store error; the next commit notices
            case "outage":
                self.store.down = not self.store.down
            case "lost replies" | "late replies":
                kind = {"lost": "reply lost", "late": "late"}[action[:4]]
                self.store.faults(*[random.Random(i).choice([kind, ""]) for i in range(n % 7)])
            case "deliver":
                await self.store.deliver()
            case "disable":
                self.disabled = not self.disabled
                await set_pools_disabled(self.store.store, [self.shape.pool_name], self.disabled)
            case "reserve":
                self.reserved = not self.reserved
                await (reserve(self.store.store, RESERVED, "db") if self.reserved else self.unreserve())
            case "pause":
                await asyncio.sleep((n % 4) / 200)

    async def again(self, n: int) -> None:
        """A container starts again and names what it had: it has that back, or nothing."""
        name = sorted(self.holds)[n % len(self.holds)]
        node, ips = self.holds[name]
        self.release(name)
        await asyncio.sleep((n % 3) / 500)
        for ip in ips:
            # To itself nothing has to cool down.
            del self.released_at[ip]
        try:
            lent = await node.take(self.net, *map(str, ips), asker=Asker(name, "eth0"))
        except MoorageError:
            self.released_at |= dict.fromkeys(ips, asyncio.get_running_loop().time())
            return
        addresses = node.assign(lent, name)
        self.check_new(name, addresses)
        assert set(ips) <= set(addresses)
        self.holds[name] = (node, addresses)

    def release(self, name: str) -> None:
        node, ips = self.holds.pop(name)
        node.delete(*ips)
        self.released_at |= dict.fromkeys(ips, asyncio.get_running_loop().time())

    async def unreserve(self) -> None:
        await unreserve(self.store.store, RESERVED)

    async def settle(self) -> None:
        """The store answers again; soon everything agrees."""
        self.store.down, self.store.fault = False, lambda _: ""
        await self.store.deliver()
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while wrong := await self._wrong():
            assert asyncio.get_running_loop().time() < deadline, wrong
            await asyncio.sleep(0.005)

    async def _wrong(self) -> str:
        """What does not agree yet, between the model, the store, the nodes' memories and their journals."""
        assert not any(node.conflicts for node in self.nodes)
        found = await stored(self.store.store)
        assigned = {ip: (r.node, r.container_id) for ip, r in found.items() if r.state == "assigned"}
        if assigned != {ip: (node.name, name) for name, (node, ips) in self.holds.items() for ip in ips}:
            return f"the model has {self.holds} and the store {assigned}"
        allocated = {ip: (r.node, r.uid) for ip, r in found.items() if r.state == "allocated"}
        if allocated != {ip: (n.name, uid) for uid, (n, ips) in self.promised.items() for ip in ips}:
            return f"the model has {self.promised} and the store {allocated}"
        for node in self.nodes:
            mine = {ip for ip, r in found.items() if r.node == node.name}
            held = node.holder._shelf.held
            warm = sum(found[ip].state == "warm" for ip in mine)
            if node.holder.problem:
                return f"{node.name} is out of sync: {node.holder.problem}"
            if mine != set(held) or any(h.lent or h.dirty or h.state == "cooling" for h in held.values()):
                return f"{node.name} holds {held} and the store says {mine}"
            if mine != (rows := {row.ip for row in node.journal.load_addresses()}):
                return f"the journal of {node.name} has {rows} and the store {mine}"
            if warm > 2 * 2 * self.net.warm:
                return f"{node.name} keeps {warm} warm"
        return ""

    async def end(self) -> None:
        for node, ips in self.holds.values():
            node.delete(*ips)
        self.holds.clear()
        for uid, (node, _) in self.promised.items():
            node.release(uid)
        self.promised.clear()
        await asyncio.sleep(0.01)
        await self.settle()


async def run(path: Path, url: str, shape: Shape, script: list[Step]) -> None:
    real = await open_store(url)
    try:
        net = await create_network(real, Network(name="prod", pools=[], warm=2), [shape.pool, shape.pool6])
        world = World(path, FaultyStore(real), net, shape)
        try:
            for node in world.nodes:
                await node.start()
                await node.join()
            for action, n in script:
                await world.do(action, n)
            await world.settle()
            await world.end()
        finally:
            for node in world.nodes:
                await node.crash()
    finally:
        await real.close()


SHORT = {
    "ipam.holder.REFILL_PATIENCE": 0.15,
    "ipam.named.REFILL_PATIENCE": 0.15,
    "ipam.named.HANDOVER_PATIENCE": 0.1,
    "ipam.named.GIVE_UP_WITHIN": 0.05,
    "ipam.handover.GIVE_UP_WITHIN": 0.05,
    "ipam.handover.LOOK_AGAIN": 0.005,
    "ipam.pressure.ASK_EVERY": 0.05,
    "ipam.pressure.SCARCE_EVERY": 0.1,
    "ipam.pressure.ANSWER_WITHIN": 0.1,
    "ipam.pressure.CONFIRMED_WITHIN": 0.1,
    "ipam.pressure.BLOCKS_WITHIN": 0.02,
    "ipam.holdings.GIVE_BACK_HOLD": 0.1,
    "ipam.borrowing.NOTHING_FOR": 0.01,
    "ipam.refill.FULL_FOR": 0.01,
    "ipam.upkeep.SURPLUS_AFTER": 0.1,
    "ipam.membership.LOOK": 0.02,
}


@pytest.mark.parametrize(
    "shape", [pytest.param(ROOMY, id="roomy"), pytest.param(TIGHT, id="tight", marks=pytest.mark.slow)]
)
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(script=steps)
def test_no_address_is_ever_double_booked_lost_or_leaked(
    tmp_path_factory: pytest.TempPathFactory,
    store_url: Callable[[Path], str],
    shape: Shape,
    script: list[Step],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for constant, seconds in SHORT.items():
            patch.setattr(constant, seconds)
        path = tmp_path_factory.mktemp("world")
        asyncio.run(run(path, store_url(path), shape, script))
