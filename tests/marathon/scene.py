"""A store with addresses on nodes that answer for them, and a Marathon beside it: what a listener sees.

The nodes are words in the store: each address is there or not, and ``living`` says on which a process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Self

import msgspec

from ipam import keys
from ipam.intents import IntentServer
from ipam.networks import PoolSpec, create_network
from ipam.records import Address, AddressState, Alive, Block, Fence, Intent, IntentKind, Network, Node
from ipam.store import Delete, Put, Store, Txn, read_prefix
from tests.patience import PATIENCE
from tests.standins.marathon import Marathon, Task
from tests.standins.tasks import TaskInfo

FRAMEWORK = "11111111-2222-3333-4444-555555555555-0000"
UUID = "3f2504e0-4f89-11d3-9a0c-{:012x}"


def task_id(number: int, app: str = "/web") -> str:
    return f"{app.strip('/').replace('/', '_')}.instance-{UUID.format(number)}._app.1"


def task(number: int, app: str = "/web", state: str = "TASK_RUNNING", agent: str = "S1") -> Task:
    return Task(TaskInfo(task_id(number, app), app.strip("/"), FRAMEWORK), app, agent, "h1", "v1", state)


def ip_of(number: int) -> str:
    return str(ip_address("10.64.0.0") + number)


class Idle:
    """A Mesos agent as its master knows it, where nothing runs."""

    hostname, port = "h", 5051

    def has(self, task: str) -> bool:
        return False

    def launch(self, tasks: list[TaskInfo]) -> None:
        """Nothing comes of it."""

    def kill(self, task: str) -> None:
        """There is none."""

    def shut_down(self) -> None:
        """Nothing runs here."""


class Scene:
    """See the module's docstring. living: addresses that a process lives on. asked: intents, in order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.marathon = Marathon(framework=FRAMEWORK, keepalive=0.2)
        self.marathon.fill({"id": "/web"}, [])
        self.living: set[str] = set()
        self.asked: list[Intent] = []
        self._work: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for work in self._work:
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def network(self, **rules: Any) -> None:
        await create_network(self.store, Network(name="web", pools=[], **rules), [PoolSpec("10.64.0.0/16")])

    async def node(self, name: str = "n1", *, alive: bool = True, mesos_agent: str = "S1") -> None:
        """A node with a block and a fence, whose agent answers if it is alive."""
        puts = [
            Put(keys.NODES + name, Node(name=name, version="1", mesos_agent=mesos_agent).encode()),
            Put(keys.WRITERS + name, Fence(instance="i", boot_id="b", seq=7).encode()),
            Put(
                f"{keys.BLOCKS}4/{len(self._work):08x}",
                Block(pool="p", size=26, node=name, claimed_at=0.0).encode(),
            ),
        ]
        if alive:
            puts.append(Put(keys.ALIVE + name, Alive(instance="i", boot_id="b").encode()))
            self.run(IntentServer(self.store, name, self._answer).run())
        await self.store.txn(Txn(then=tuple(puts)))

    async def lose_sight_of(self, node: str) -> None:
        """Its sign of life is gone, whether its agent runs or not."""
        await self.store.txn(Txn(then=(Delete(keys.ALIVE + node),)))

    async def show_life_of(self, node: str) -> None:
        """Its agent is registered again."""
        await self.store.txn(Txn(then=(Put(keys.ALIVE + node, Alive(instance="i", boot_id="b").encode()),)))

    def run(self, work: Any) -> asyncio.Task[None]:
        """Beside the test, until its end."""
        running = asyncio.create_task(work)
        self._work.append(running)
        return running

    async def assigned(self, *numbers: int, app: str = "/web", node: str = "n1", **fields: Any) -> None:
        """Addresses of tasks of the same numbers."""
        known: dict[str, Any] = {"engine": "mesos", "framework": FRAMEWORK, "network": "web", "app": app}
        for number in numbers:
            record = Address(
                pool="p",
                state=AddressState.ASSIGNED,
                node=node,
                id=f"assignment-{number}",
                container_id=f"container-{number}",
                ifname="eth0",
                task=task_id(number, app),
            ).with_(**{**known, **fields})
            await self.store.txn(
                Txn(then=(Put(keys.address_key(ip_address(ip_of(number))), record.encode()),))
            )

    def listed(self, *numbers: int, app: str = "/web", state: str = "TASK_RUNNING") -> None:
        """Tasks that Marathon lists from now on."""
        self.marathon.fill({"id": app}, [task(number, app, state) for number in numbers])

    def over(self, number: int, state: str = "TASK_KILLED", agent: str = "S1") -> None:
        """A task ends, and Marathon says so."""
        ended = self.marathon.tasks.pop(task_id(number))
        ended.state, ended.agent = state, agent
        self.marathon._changed()
        self.marathon._tell(ended)

    async def _answer(self, intent: Intent) -> dict[str, Any]:
        self.asked.append(intent)
        key = keys.address_key(ip_address(intent.ip))
        kv = await self.store.get(key)
        if kv is None or kv.mod_revision != intent.mod_revision:
            return {"done": False, "changed": True, "why": f"{intent.ip} changed"}
        if intent.kind is IntentKind.LABELS:
            record = Address.decode(key, kv.value).with_(netgroups=intent.evidence["netgroups"])
            await self.store.txn(Txn(then=(Put(key, record.encode()),)))
            return {"done": True, "why": ""}
        if intent.ip in self.living:
            return {"done": False, "live": True, "why": f"{intent.ip} is carried by a live container"}
        await self.store.txn(Txn(then=(Delete(key),)))
        return {"done": True, "why": f"{intent.ip} is released"}

    async def addresses(self) -> set[str]:
        items, _ = await read_prefix(self.store, keys.ADDRESSES)
        return {str(keys.ip_of(kv.key)) for kv in items}

    async def told(self) -> dict[str, Any]:
        """What the leader last left in the store; {} if there is none."""
        kv = await self.store.get(keys.LISTENERS + FRAMEWORK)
        return {} if kv is None else msgspec.json.decode(kv.value, type=dict[str, Any])

    async def until(self, holds: Callable[[], Any], within: float = PATIENCE) -> None:
        """Wait for something, which may be asked of the store."""
        async with asyncio.timeout(within):
            while True:
                found = holds()
                if await found if asyncio.iscoroutine(found) else found:
                    return
                await asyncio.sleep(0.02)

    async def left(self, *numbers: int, within: float = PATIENCE) -> None:
        """Wait until these addresses are assigned and no others."""
        wanted = {ip_of(number) for number in numbers}
        found: set[str] = set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while (found := await self.addresses()) != wanted:
                    await asyncio.sleep(0.02)
        assert found == wanted

    async def counts(self, **wanted: int) -> None:
        """Wait until the leader tells so many addresses by verdict; ``_`` in a name is a space."""

        async def told() -> bool:
            counts = (await self.told()).get("counts", {})
            return all(counts.get(name.replace("_", " ")) == count for name, count in wanted.items())

        await self.until(told)
