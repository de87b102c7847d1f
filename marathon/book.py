"""The book: assigned addresses and nodes as the store has them, followed, and found by task.

Only what is judged by is read of a record (facts.Assigned); 100,000 of them take some 80 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterable, Iterator

import msgspec
import structlog

from ipam import keys
from ipam.errors import StoreError
from ipam.following import follow
from ipam.records import NODE_ENGINE, Node
from ipam.store.base import KeyValue, Store, WatchBatch, prefix_end, read_prefix
from marathon.facts import Assigned, NodeFacts, instance_of

log = structlog.get_logger(__name__)

FOLLOWED = (keys.NODES, keys.ALIVE, keys.ADDRESSES)
"""In this order: a node that is listed before its sign of life is away for no longer than the listing takes."""

_ASSIGNED = "assigned"
_IPV4 = f"{keys.ADDRESSES}4/"

_decode = msgspec.json.Decoder(Assigned).decode


class Book:
    """See the module's docstring. Reading it never blocks. listed: whether it is complete.

    Every node that is known either lives or is away, since the moment in which this book saw it leave, or first saw
    that it is not there. Whatever its agent writes of itself begins that anew: an agent was there, if only so
    briefly that nobody saw its sign of life.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._addresses: dict[str, Assigned] = {}
        self._by_instance: dict[str, tuple[str, ...]] = {}
        self._nodes: dict[str, tuple[str, int]] = {}
        self._alive: set[str] = set()
        self._away: dict[str, float] = {}
        self._passed_over: dict[str, int] = {}
        self._rewound = asyncio.Event()
        self.listed = asyncio.Event()

    # -- looking in

    def __len__(self) -> int:
        return len(self._addresses)

    def all(self) -> list[Assigned]:
        """Every assigned address of a container, as it stands now."""
        return list(self._addresses.values())

    def of_instances(self, instances: Iterable[str]) -> Iterator[Assigned]:
        """The addresses of tasks' instances."""
        for instance in instances:
            for key in self._by_instance.get(instance, ()):
                yield self._addresses[key]

    def of_apps(self, apps: set[str]) -> Iterator[Assigned]:
        """The addresses of apps."""
        return (address for address in self._addresses.values() if address.app in apps)

    def get(self, ip: str, assignment: str) -> Assigned | None:
        """One assignment of an address, None if it is over."""
        found = self._addresses.get(ip)
        return found if found is not None and found.id == assignment else None

    def nodes(self) -> dict[str, NodeFacts]:
        """Every node that is registered or lives."""
        return {
            name: NodeFacts(name, agent, self._away.get(name), revision)
            for name in self._nodes.keys() | self._alive
            for agent, revision in [self._nodes.get(name, ("", 0))]
        }

    # -- following

    async def refresh(self) -> None:
        """List everything anew, while it is followed: no watch notices a restored backup."""
        self.listed.clear()
        self._rewound.set()
        await self.listed.wait()

    async def follow(self) -> None:
        """Follow the store until cancelled. Raises StoreError when it fails; the caller runs it again."""
        while True:
            self._rewound.clear()
            listed = {prefix: await self._list(prefix) for prefix in FOLLOWED}
            if self._rewound.is_set():
                continue  # who wants it anew would have what was read before that
            self.listed.set()
            await follow(self._store, listed, self._deliver, self._rewound)

    async def load(self) -> None:
        """List everything once, without following it. Raises StoreError."""
        for prefix in FOLLOWED:
            await self._list(prefix)
        self.listed.set()

    async def _list(self, prefix: str) -> int:
        if prefix != keys.ADDRESSES:
            return await self._list_nodes(prefix)
        self._addresses.clear()
        self._by_instance.clear()
        cursor: str | None = prefix
        revision = 0
        while cursor is not None:
            page = await self._store.page(cursor, prefix_end(prefix), revision=revision)
            revision = page.revision
            for kv in page.items:
                self._note(prefix, kv)
            cursor = page.next_key
        return revision

    async def _list_nodes(self, prefix: str) -> int:
        """Their records or their signs of life. All at once: by half a list the others would be away."""
        items, revision = await read_prefix(self._store, prefix)
        listed = {kv.key.removeprefix(prefix) for kv in items}
        for name in (self._nodes.keys() if prefix == keys.NODES else self._alive) - listed:
            self._forget_node(prefix, name)
        for kv in items:
            self._note(prefix, kv)
        return revision

    def _forget_node(self, prefix: str, name: str) -> None:
        if prefix == keys.NODES:
            self._nodes.pop(name, None)
        else:
            self._alive.discard(name)
            self._away[name] = time.monotonic()

    def _deliver(self, prefix: str, batch: WatchBatch) -> None:
        for event in batch.events:
            if event.kv is not None:
                self._note(prefix, event.kv)
            elif prefix == keys.ADDRESSES:
                self._forget_address(event.key)
            else:
                self._forget_node(prefix, event.key.removeprefix(prefix))

    def _forget_address(self, key: str) -> None:
        with contextlib.suppress(StoreError):  # a key that was never an address
            self._drop(_ip_text(key))

    def _note(self, prefix: str, kv: KeyValue) -> None:
        if prefix == keys.ADDRESSES:
            self._note_address(kv)
        elif prefix == keys.NODES:
            try:
                node = Node.decode(kv.key, kv.value)
            except StoreError as error:
                self._pass_over(kv, error)
                return
            self._note_node(kv.key.removeprefix(prefix), node.mesos_agent, kv.mod_revision)
        else:
            self._alive.add(kv.key.removeprefix(prefix))
            self._away.pop(kv.key.removeprefix(prefix), None)

    def _pass_over(self, kv: KeyValue, error: Exception) -> None:
        """Told once, and not in every listing."""
        if self._passed_over.get(kv.key) != kv.mod_revision:
            self._passed_over[kv.key] = kv.mod_revision
            log.warning("record passed over", key=kv.key, why=str(error))

    def _note_node(self, name: str, mesos_agent: str, revision: int) -> None:
        _, known = self._nodes.get(name, ("", 0))
        self._nodes[name] = (mesos_agent, revision)
        if name not in self._alive and revision != known:
            self._away[name] = time.monotonic()

    def _note_address(self, kv: KeyValue) -> None:
        try:
            address = _decode(kv.value)
            ip = _ip_text(kv.key)
        except (msgspec.MsgspecError, UnicodeDecodeError, StoreError) as error:
            # Kept as it stands, like everything that cannot be judged; `moorage ip check` shows it.
            self._pass_over(kv, error)
            return
        if ip in self._addresses:
            self._drop(ip)
        if address.state != _ASSIGNED or address.engine == NODE_ENGINE:
            return
        address.ip = ip
        address.revision = kv.mod_revision
        address.instance = instance_of(address.task)
        self._addresses[ip] = address
        if address.instance:
            self._by_instance[address.instance] = (*self._by_instance.get(address.instance, ()), ip)

    def _drop(self, ip: str) -> None:
        known = self._addresses.pop(ip, None)
        if known is not None and known.instance:
            left = tuple(other for other in self._by_instance.pop(known.instance) if other != ip)
            if left:
                self._by_instance[known.instance] = left


def _ip_text(key: str) -> str:
    """The IP of an address's key, as text. Raises StoreError."""
    if key.startswith(_IPV4) and len(key) == len(_IPV4) + keys.WIDTH[4]:
        # Of 100,000 addresses the general way takes longer than everything else.
        with contextlib.suppress(ValueError):
            return socket.inet_ntoa(bytes.fromhex(key[len(_IPV4) :]))
    return str(keys.ip_of(key))
