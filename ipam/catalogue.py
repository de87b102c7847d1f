"""The catalogue: networks, pools and reservations as the node last saw them, and what nodes' own networks use.

Followed from the store by snapshot and watch, kept in the node's journal, so that an ADD reads memory
only and works while the store is away. A network that is not known yet is looked for once more in the
store before it is refused: operators create a network and start an app in the same breath.

Pools come out of it without what nodes' own networks use (ipam/nodes_networks.py), so nobody who gives out
addresses has to know of that. Of this very node it is what its kernel says, whatever stands in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from ipam import keys
from ipam.errors import MoorageError, NotFound, StoreError, TryAgain
from ipam.following import follow
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.networks import unknown_network
from ipam.nodes_networks import NodesNetworks
from ipam.pools import Geometry, geometry
from ipam.ranges import Ranges
from ipam.records import Network, Node, Pool, Reservation
from ipam.store.base import KeyValue, Store, WatchBatch, read_prefix
from ipam.taken import Taken, taken_of

log = structlog.get_logger(__name__)

OPERATORS = (keys.NETWORKS, keys.POOLS, keys.RESERVATIONS)
FOLLOWED = (*OPERATORS, keys.NODES)


class CatalogueCache(Protocol):
    """Where the catalogue survives restarts; the journal."""

    def load_cache(self) -> Iterable[tuple[str, bytes, int]]: ...

    def save_cache(self, changed: Iterable[tuple[str, bytes, int]], gone: Iterable[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation and the revision that wrote it."""

    ip: IPAddress
    reservation: Reservation
    mod_revision: int


class Catalogue:
    """See the module's docstring. Reading it never blocks.

    node: this one's name. own_record: what other nodes were told of it last, None if that is not known.
    on_rewound: told when the store turned out to have gone back in time, for others who follow it.
    """

    def __init__(
        self,
        store: Store,
        cache: CatalogueCache,
        on_change: Callable[[], None],
        on_rewound: Callable[[], None] = lambda: None,
        *,
        node: str = "",
    ) -> None:
        self._store = store
        self._cache = cache
        self._on_change = on_change
        self._on_rewound = on_rewound
        self._node = node
        self._own_told = False
        self.own_record: Node | None = None
        self._networks: dict[str, Network] = {}
        self._drawn: dict[str, Geometry] = {}
        self._pools: dict[str, Geometry] = {}
        self.around = NodesNetworks()
        self._reserved: dict[IPAddress, Reserved] = {}
        self._revisions: dict[str, int] = {}
        # How far each prefix was heard. A snapshot that a watch has overtaken says nothing new.
        self._heard: dict[str, int] = {}
        self._refreshing = asyncio.Lock()
        self._rewound = asyncio.Event()

    def load(self) -> None:
        """Start from what the journal remembers. It may be of another store: revisions say nothing yet."""
        for key, value, _ in self._cache.load_cache():
            self._set(key, value, 0)
        self._draw()

    def tell_own(self, taken: Sequence[Taken]) -> None:
        """What this node's own networks use, as its kernel says; until then it is what its record says."""
        self._own_told = True
        if self.around.tell(self._node, taken):
            self._draw()
            self._on_change()

    async def refresh(self, prefixes: Sequence[str] = FOLLOWED) -> int:
        """Read everything anew; returns the revision it was read at. Raises StoreUnavailable."""
        async with self._refreshing:
            changed: list[KeyValue] = []
            gone: list[str] = []
            read = [(prefix, *await read_prefix(self._store, prefix)) for prefix in prefixes]
            # Nothing is waited for from here on: what the watch told while they were read is newer.
            for prefix, items, at in read:
                if at >= self._heard.get(prefix, 0):
                    self._heard[prefix] = at
                    fresh = {kv.key for kv in items}
                    gone += [key for key in self._revisions if key.startswith(prefix) and key not in fresh]
                    changed += [kv for kv in items if self._revisions.get(kv.key) != kv.mod_revision]
            self._apply(changed, gone)
            # Watching starts from the oldest of them, so nothing between them is missed.
            return min(at for _, _, at in read)

    async def start_over(self) -> None:
        """The store went back in time: believe it, and follow it from there. Raises StoreUnavailable."""
        self._heard.clear()
        self._revisions = dict.fromkeys(self._revisions, 0)
        self._on_rewound()
        await self.refresh()
        self._rewound.set()

    async def follow(self) -> None:
        """Follow the store until cancelled. Raises StoreError when it fails; the caller runs it again."""
        while True:
            self._rewound.clear()
            revision = await self.refresh()
            await follow(self._store, dict.fromkeys(FOLLOWED, revision), self._deliver, self._rewound)

    def _deliver(self, prefix: str, batch: WatchBatch) -> None:
        # The newest of each key, beyond what a refresh has heard meanwhile.
        newest = {e.key: e.kv for e in batch.events if e.revision > self._heard.get(prefix, 0)}
        self._heard[prefix] = max(self._heard.get(prefix, 0), batch.revision)
        changed = [kv for kv in newest.values() if kv is not None]
        self._apply(changed, [key for key, kv in newest.items() if kv is None])

    def _apply(self, changed: Iterable[KeyValue], gone: Iterable[str]) -> None:
        rows = []
        matters = False
        for kv in changed:
            matters = self._set(kv.key, kv.value, kv.mod_revision) or matters
            rows.append((kv.key, kv.value, kv.mod_revision))
        removed = []
        for key in gone:
            if self._revisions.pop(key, None) is not None:
                matters = self._drop(key) or matters
                removed.append(key)
        if not rows and not removed:
            return
        try:
            self._cache.save_cache(rows, removed)
        except MoorageError as error:
            log.warning("catalogue not saved", why=str(error))
        if matters:
            self._draw()
            self._on_change()

    def _set(self, key: str, value: bytes, revision: int) -> bool:
        """Whether anybody has to know; not of a node that is different, and uses what it did."""
        self._revisions[key] = revision
        try:
            if key.startswith(keys.NETWORKS):
                network = Network.decode(key, value)
                self._networks[network.name] = network
            elif key.startswith(keys.POOLS):
                shape = geometry(Pool.decode(key, value))
                self._drawn[shape.name] = shape
            elif key.startswith(keys.NODES):
                return self._set_node(key.removeprefix(keys.NODES), Node.decode(key, value))
            else:
                ip = keys.ip_of(key)
                self._reserved[ip] = Reserved(ip, Reservation.decode(key, value), revision)
        except MoorageError as error:
            log.error("catalogue entry ignored", key=key, why=str(error))
        return True

    def _set_node(self, name: str, node: Node) -> bool:
        if name == self._node:
            self.own_record = node
        return not self._is_own(name) and self.around.tell(name, taken_of(node))

    def _is_own(self, node: str) -> bool:
        return self._own_told and node == self._node

    def _drop(self, key: str) -> bool:
        """Whether anybody has to know."""
        if key.startswith(keys.NETWORKS):
            self._networks.pop(key.removeprefix(keys.NETWORKS), None)
        elif key.startswith(keys.POOLS):
            self._drawn.pop(key.removeprefix(keys.POOLS), None)
        elif key.startswith(keys.NODES):
            name = key.removeprefix(keys.NODES)
            return not self._is_own(name) and self.around.tell(name, ())
        else:
            with contextlib.suppress(StoreError):  # one that could not be read was never there
                self._reserved.pop(keys.ip_of(key), None)
        return True

    def _draw(self) -> None:
        """Pools as they are now, without what nodes use."""
        self._pools = {name: self.around.effective(shape) for name, shape in self._drawn.items()}

    async def network(self, name: str) -> Network:
        """The network called ``name``, when its pools are known too. Raises NotFound naming the known ones, TryAgain
        when it is not known and the store does not answer, StoreError when one of its pools cannot be read."""
        if not self._knows(name):
            await self.look_again(f"the network {name!r}")
        network = self._networks.get(name)
        if network is None:
            raise NotFound(unknown_network(name, self.names()))
        if not self._knows(name):
            missing = [pool for pool in network.pools if pool not in self._pools]
            raise StoreError(
                f"the network {name} has pools that cannot be read: {', '.join(missing)}; "
                "see the agent's log, and restore them from a dump"
            )
        return network

    def _knows(self, name: str) -> bool:
        network = self._networks.get(name)
        return network is not None and all(pool in self._pools for pool in network.pools)

    async def look_again(self, what: str) -> None:
        """Read the store once more: ``what`` is asked for, and may just have been created. Raises TryAgain when the
        store does not answer: nobody can say then that there is no such thing."""
        try:
            await self.refresh(OPERATORS)
        except StoreError as error:
            raise TryAgain(
                f"{what} is not known here, and the store, which may have it, does not answer ({error}); try again "
                "when it does"
            ) from error

    def names(self) -> list[str]:
        return sorted(self._networks)

    def nodes(self) -> set[str]:
        """The names of all registered nodes, as far as they were heard of."""
        return {key.removeprefix(keys.NODES) for key in self._revisions if key.startswith(keys.NODES)}

    def networks(self) -> list[Network]:
        return list(self._networks.values())

    def pools(self) -> list[Geometry]:
        return list(self._pools.values())

    def drawn(self) -> list[Geometry]:
        """The pools as operators made them, with what nodes' own networks use."""
        return list(self._drawn.values())

    def pools_of(self, network: Network, family: Family | None = None) -> list[Geometry]:
        """The network's pools in its order, of one family if given."""
        found = (self._pools.get(name) for name in network.pools)
        return [p for p in found if p is not None and family in (None, p.family)]

    def cidrs_of(self, network: Network, families: Collection[Family]) -> tuple[IPNetwork, ...]:
        """The network's pools in its order, whole, disabled ones too: what is assigned of those stays."""
        return tuple(pool.cidr for pool in self.pools_of(network) if pool.family in families)

    def wholly_known(self, name: str) -> Network | None:
        """A network all of whose pools are known; None of one that is not known, or not wholly."""
        return self._networks[name] if self._knows(name) else None

    def pool_of(self, ip: IPAddress) -> Geometry | None:
        return next((p for p in self._pools.values() if ip in p.cidr), None)

    def closed_in(self, network: IPNetwork, pool_name: str = "") -> Ranges:
        """What of a network no route and no rule may take for containers': by the pool that it lies in.

        pool_name: of that pool, from who knows it, because looking for it takes long with many pools.
        """
        pool = self._pools.get(pool_name) if pool_name else self.pool_of(network.network_address)
        closed = self.around.closed(network.version, forced=pool is not None and pool.forced)
        return closed.within(int(network.network_address), int(network.broadcast_address))

    def reserved(self, ip: IPAddress) -> Reserved | None:
        return self._reserved.get(ip)

    def reserved_ips(self) -> Collection[IPAddress]:
        return self._reserved.keys()

    def reserved_under(self, key: str, network: str) -> list[Reserved]:
        """The addresses of ``network`` reserved under ``key``, in address order."""
        found = [
            r
            for r in self._reserved.values()
            if r.reservation.key == key and r.reservation.network == network
        ]
        return sorted(found, key=lambda r: (r.ip.version, int(r.ip)))
