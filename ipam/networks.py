"""Networks and their pools: created, listed and deleted by operators.

Every change of pools compares and rewrites the ``poolset`` key, so of two concurrent changes that were
both decided on the same picture exactly one succeeds; the other looks again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from ipaddress import ip_address, ip_network
from typing import Any

from ipam import keys
from ipam.errors import AlreadyExists, Ambiguous, InvalidInput, NotFound, StoreError, TryAgain
from ipam.isolation import check_isolation
from ipam.next_hops import choose_next_hop
from ipam.nodes_networks import NodesNetworks, read_nodes_networks
from ipam.permissions import check_rules
from ipam.pool_collisions import check_pool
from ipam.pools import NAME, geometry, overlapping, parse_pool
from ipam.records import FABRICS, OWN, Address, AddressState, Block, Network, Pool, Reservation
from ipam.store.base import (
    Compare,
    Delete,
    KeyValue,
    Op,
    Put,
    Store,
    Txn,
    absent,
    none_between,
    read_prefix,
    scan,
    unchanged,
)

MTU = (1280, 65535)
"""Bytes. Below 1280 IPv6 does not work (RFC 8200 section 5)."""

MAX_WARM = 4096
MAX_POOLS = 32
"""Pools of one network; they are created and deleted in one transaction."""

UNREADABLE = "unreadable"
CHANGE_TRIES = 50
"""Each try fails only because another change succeeded, so this bounds concurrent operators."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """A pool as an operator asks for it; None and () are defaults. forced: see Pool."""

    cidr: str
    block_size: int | None = None
    static: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    forced: bool = False


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """How a pool is used, in addresses. own: the nodes' own ones, counted as state ``own``.

    usable: that may be given out; without what nodes' own networks use. outside: of those that are held, how many are
    not usable (any more). withdrawn: of the cooling ones, those that nobody had.

    by_node: node -> state -> count; a record that cannot be read is counted as ``unreadable`` of node ``?``.
    """

    usable: int
    allocated: int
    assigned: int
    own: int
    warm: int
    cooling: int
    outside: int = 0
    withdrawn: int = 0
    by_node: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.usable + self.outside - sum(sum(states.values()) for states in self.by_node.values())

    def __str__(self) -> str:
        nodes = "; ".join(
            f"{node}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            for node, states in sorted(self.by_node.items())
        )
        own = f" and {self.own} the nodes' own" * bool(self.own)
        promised = f"{self.allocated} allocated, " * bool(self.allocated)
        total = f"{promised}{self.assigned} assigned{own}, {self.warm} warm, {self.cooling} cooling, {self.free} free"
        return f"{total} ({nodes or 'no node holds any'})"


def validate(network: Network) -> None:
    """Raises InvalidInput when a network's own fields make no sense."""
    if not NAME.fullmatch(network.name):
        raise InvalidInput(
            f"{network.name!r} is no network name; use 1 to 63 letters, digits, dots, dashes and underscores, "
            "starting with a letter or digit"
        )
    if network.mtu and not MTU[0] <= network.mtu <= MTU[1]:
        raise InvalidInput(
            f"the MTU {network.mtu} is not between {MTU[0]} and {MTU[1]}; correct it, 0 is the underlay's"
        )
    if not 0 <= network.warm <= MAX_WARM:
        raise InvalidInput(f"warm {network.warm} is not between 0 and {MAX_WARM}; correct it")
    if network.fabric not in FABRICS:
        raise InvalidInput(
            f"there is no fabric {network.fabric!r}; a network's is one of {', '.join(FABRICS)}"
        )
    for server in network.dns:
        try:
            ip_address(server)
        except ValueError as error:
            raise InvalidInput(f"the DNS server {server!r} is no IP address ({error})") from error
    for domain in network.search:
        if not NAME.fullmatch(domain.rstrip(".")):
            raise InvalidInput(f"the search domain {domain!r} is no domain name")
    check_isolation(network)
    check_rules(network)


async def create_network(store: Store, network: Network, pools: Sequence[PoolSpec]) -> Network:
    """Create a network and its pools in one transaction, with a next hop that no other has while there is one.

    Raises InvalidInput for nonsense and for pools over nodes' own networks (ipam/pool_collisions.py), AlreadyExists
    naming what it overlaps with or that the name is taken. Nothing is written then.
    """
    validate(network)
    if not pools:
        raise InvalidInput(f"the network {network.name} needs at least one --pool, for example 10.64.0.0/16")
    if len(pools) > MAX_POOLS:
        raise InvalidInput(
            f"the network {network.name} has {len(pools)} pools; {MAX_POOLS} are possible, take larger ones"
        )
    parsed: list[Pool] = []
    for spec in pools:
        pool = _parsed(network.name, spec)
        if twin := overlapping(ip_network(pool.cidr), parsed):
            raise AlreadyExists(f"the pools {twin.cidr} and {pool.cidr} overlap; leave one out")
        parsed.append(pool)
    record = network.with_(pools=[pool.name for pool in parsed])

    for _ in range(CHANGE_TRIES):
        guard = await store.get(keys.POOLSET)
        existing = [pool for _, pool in await _pools(store)]
        for pool in parsed:
            if other := overlapping(ip_network(pool.cidr), existing):
                raise AlreadyExists(
                    f"the pool {pool.cidr} overlaps {other.cidr} of network {other.network}; choose another CIDR"
                )
        around = await read_nodes_networks(store)
        for pool in parsed:
            check_pool(geometry(pool), around)
        # Read after the guard, which every change of networks rewrites: of two at once, one chooses again.
        record = record.with_(next_hop=choose_next_hop(n.next_hop for n in await _networks(store)))
        result = await store.txn(
            Txn(
                (_guard(guard), absent(keys.NETWORKS + record.name)),
                (
                    Put(keys.POOLSET, _next(guard)),
                    Put(keys.NETWORKS + record.name, record.encode()),
                    *(Put(keys.POOLS + pool.name, pool.encode()) for pool in parsed),
                ),
            )
        )
        if result.succeeded:
            return record
        if await store.get(keys.NETWORKS + record.name):
            raise AlreadyExists(
                f"the network {record.name} exists already; see `moorage network show {record.name}`"
            )
    raise TryAgain(f"pools changed {CHANGE_TRIES} times while {record.name} was created; try again")


def _guard(guard: KeyValue | None) -> Compare:
    return absent(keys.POOLSET) if guard is None else unchanged(guard)


def _next(guard: KeyValue | None) -> bytes:
    return str(int(guard.value) + 1 if guard else 1).encode()


async def _pools(store: Store) -> list[tuple[KeyValue, Pool]]:
    items, _ = await read_prefix(store, keys.POOLS)
    return [(kv, Pool.decode(kv.key, kv.value)) for kv in items]


async def _networks(store: Store) -> list[Network]:
    items, _ = await read_prefix(store, keys.NETWORKS)
    return [Network.decode(kv.key, kv.value) for kv in items]


async def list_networks(store: Store) -> list[tuple[Network, list[Pool]]]:
    """All networks with their pools, by name."""
    networks = await _networks(store)
    pools = {pool.name: pool for _, pool in await _pools(store)}
    return [(n, [pools[name] for name in n.pools if name in pools]) for n in networks]


async def get_network(store: Store, name: str) -> tuple[Network, list[Pool]]:
    """One network with its pools. Raises NotFound naming the known ones."""
    known = await list_networks(store)
    for network, pools in known:
        if network.name == name:
            return network, pools
    raise NotFound(unknown_network(name, [network.name for network, _ in known]))


def unknown_network(name: str, known: Sequence[str]) -> str:
    """The sentence for a network that nobody created."""
    listed = ", ".join(sorted(known)) if known else "none yet"
    return (
        f"there is no network {name!r} (known: {listed}); "
        "create it with `moorage network create`, or correct the name"
    )


async def pool_usage(store: Store, pool: Pool, around: NodesNetworks | None = None) -> PoolUsage:
    """Counts the pool's addresses in the store; the time grows with those in use, not with the pool's size.

    around: what nodes' own networks use; read from the store if it is not given.
    """
    shape = (around or await read_nodes_networks(store)).effective(geometry(pool))
    counts: Counter[tuple[str, str]] = Counter()
    outside = withdrawn = 0
    async for kv in scan(store, *keys.address_range(shape.cidr)):
        try:
            outside += not shape.usable(keys.ip_of(kv.key))
            address = Address.decode(kv.key, kv.value)
            counts[address.node, address.use] += 1
            withdrawn += address.is_withdrawn
        except StoreError:
            counts["?", UNREADABLE] += 1
    by_node: dict[str, dict[str, int]] = {}
    for (node, state), count in counts.items():
        by_node.setdefault(node, {})[state] = count

    def total(state: str) -> int:
        return sum(count for (_, s), count in counts.items() if s == state)

    return PoolUsage(
        usable=shape.usable_count(),
        allocated=total(AddressState.ALLOCATED),
        assigned=total(AddressState.ASSIGNED),
        own=total(OWN),
        warm=total(AddressState.WARM),
        cooling=total(AddressState.COOLING),
        outside=outside,
        withdrawn=withdrawn,
        by_node=by_node,
    )


@dataclass(frozen=True, slots=True)
class NetworkChange:
    """What an operator changes of a network; None leaves a field as it is.

    add: pools. disable, enable: CIDRs of its own pools. force: those to enable are forced from now on; see Pool.
    """

    add: tuple[PoolSpec, ...] = ()
    disable: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()
    force: bool = False
    mtu: int | None = None
    nat: bool | None = None
    dns: tuple[str, ...] | None = None
    search: tuple[str, ...] | None = None
    warm: int | None = None
    preload: bool | None = None
    strict: bool | None = None
    isolation: str | None = None
    allow_from: tuple[str, ...] | None = None
    to_node: tuple[str, ...] | None = None
    max_connections: int | None = None
    fabric: str | None = None
    allow_netgroups: tuple[str, ...] | None = None
    allow_public: bool | None = None
    allow_static: tuple[str, ...] | None = None
    allow_mac: bool | None = None
    allow_hostports: tuple[str, ...] | None = None
    max_bandwidth: int | None = None

    def fields(self) -> dict[str, Any]:
        """The changed fields of the network's own record."""
        given = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value is not None and name not in ("add", "disable", "enable", "force")
        }


async def set_network(store: Store, name: str, change: NetworkChange) -> tuple[Network, list[Pool]]:
    """Change a network and its pools in one transaction; returns them as they are then.

    Agents follow: a disabled pool gives out nothing more and what is warm of it goes back, other fields hold
    for endpoints attached from then on. Raises NotFound, InvalidInput, AlreadyExists; nothing is written then.
    """
    for _ in range(CHANGE_TRIES):
        guard = await store.get(keys.POOLSET)
        stored = await store.get(keys.NETWORKS + name)
        existing = await _pools(store)
        if stored is None:
            await get_network(store, name)  # raises
            continue
        network = Network.decode(stored.key, stored.value)
        own = {pool.name: kv for kv, pool in existing if pool.name in network.pools}
        changed = _switched(network, [pool for _, pool in existing], change)
        added = _added(network, [pool for _, pool in existing], change.add)
        if added or change.force:
            around = await read_nodes_networks(store)
            for pool in (*added, *(pool for pool in changed if pool.forced and not pool.disabled)):
                check_pool(geometry(pool), around)
        record = network.with_(**change.fields(), pools=[*network.pools, *(pool.name for pool in added)])
        validate(record)
        if len(record.pools) > MAX_POOLS:
            raise InvalidInput(
                f"the network {name} would have {len(record.pools)} pools; {MAX_POOLS} are possible, take larger ones"
            )
        operations: list[Op] = [Put(keys.POOLSET, _next(guard)), Put(stored.key, record.encode())]
        operations += [Put(keys.POOLS + pool.name, pool.encode()) for pool in (*changed, *added)]
        compares = (_guard(guard), unchanged(stored), *(unchanged(own[pool.name]) for pool in changed))
        if (await store.txn(Txn(compares, tuple(operations)))).succeeded:
            return await get_network(store, name)
    raise TryAgain(f"pools changed {CHANGE_TRIES} times while {name} was changed; try again")


def _switched(network: Network, pools: Sequence[Pool], change: NetworkChange) -> list[Pool]:
    """The pools to disable and to enable, as they shall be. Raises NotFound, InvalidInput."""
    own = [pool for pool in pools if pool.name in network.pools]
    wanted: dict[str, Pool] = {}
    for cidrs, disabled in ((change.disable, True), (change.enable, False)):
        for text in cidrs:
            pool = next((p for p in own if _same_cidr(text, p)), None)
            if pool is None:
                raise NotFound(
                    f"the network {network.name} has no pool {text!r} (it has "
                    f"{', '.join(p.cidr for p in own)}); correct the CIDR"
                )
            if pool.name in wanted and wanted[pool.name].disabled != disabled:
                raise InvalidInput(f"the pool {pool.cidr} cannot be both disabled and enabled; leave one out")
            forced = pool.forced or (change.force and not disabled)
            wanted[pool.name] = pool.with_(disabled=disabled, forced=forced)
    return list(wanted.values())


def _same_cidr(text: str, pool: Pool) -> bool:
    try:
        return ip_network(text) == ip_network(pool.cidr)
    except ValueError:
        return False


def _added(network: Network, existing: Sequence[Pool], specs: Sequence[PoolSpec]) -> list[Pool]:
    """The new pools. Raises InvalidInput, AlreadyExists naming what they overlap."""
    added: list[Pool] = []
    for spec in specs:
        pool = _parsed(network.name, spec)
        if other := overlapping(ip_network(pool.cidr), [*existing, *added]):
            raise AlreadyExists(
                f"the pool {pool.cidr} overlaps {other.cidr} of network {other.network}; choose another CIDR"
            )
        added.append(pool)
    return added


def _parsed(network: str, spec: PoolSpec) -> Pool:
    return parse_pool(
        spec.cidr,
        network=network,
        block_size=spec.block_size,
        static=spec.static,
        excluded=spec.excluded,
        forced=spec.forced,
    )


async def set_pools_disabled(store: Store, names: Sequence[str], disabled: bool) -> None:
    """Stop (or resume) giving out addresses from pools; agents then give back what they keep warm."""
    for _ in range(CHANGE_TRIES):
        guard = await store.get(keys.POOLSET)
        found = [(kv, pool) for kv, pool in await _pools(store) if pool.name in names]
        result = await store.txn(
            Txn(
                (_guard(guard), *(unchanged(kv) for kv, _ in found)),
                (
                    Put(keys.POOLSET, _next(guard)),
                    *(Put(kv.key, pool.with_(disabled=disabled).encode()) for kv, pool in found),
                ),
            )
        )
        if result.succeeded:
            return
    raise TryAgain("pools kept changing meanwhile; try again")


async def delete_network(store: Store, name: str, *, patience: float = 5.0) -> None:
    """Delete a network with its pools and reservations.

    Refuses while an address is allocated, assigned or cooling after somebody had it. Otherwise the pools are
    disabled, so that agents give back what they keep warm, for which it waits ``patience`` seconds; if they do not,
    the pools are enabled again. Raises NotFound, TryAgain saying who still holds what.
    """
    _, pools = await get_network(store, name)
    around = await read_nodes_networks(store)
    uses = {pool.cidr: await pool_usage(store, pool, around) for pool in pools}
    if any(use.allocated or use.assigned or use.cooling > use.withdrawn for use in uses.values()):
        raise TryAgain(_in_use(name, uses))
    enabled = [pool.name for pool in pools if not pool.disabled]
    await set_pools_disabled(store, enabled, True)
    try:
        await _remove_when_empty(store, name, time.monotonic() + patience)
    except BaseException:
        try:
            await set_pools_disabled(store, enabled, False)
        except StoreError as error:
            raise TryAgain(
                f"the network {name} is not deleted, and its pools stay disabled ({error}); delete it again"
            ) from error
        raise
    await _remove_reservations(store, name)


async def _remove_when_empty(store: Store, name: str, deadline: float) -> None:
    in_doubt = False
    while True:
        try:
            return await _remove_network(store, name)
        except NotFound:
            if in_doubt:
                return None  # the try whose reply was lost had landed
            raise
        except TryAgain as error:
            in_doubt = in_doubt or isinstance(error, Ambiguous)
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


async def _remove_reservations(store: Store, name: str) -> None:
    """Those of a deleted network; each on its own, because there may be more than fit a transaction."""
    items, _ = await read_prefix(store, keys.RESERVATIONS)
    for kv in items:
        if Reservation.decode(kv.key, kv.value).network == name:
            await store.txn(Txn((absent(keys.NETWORKS + name), unchanged(kv)), (Delete(kv.key),)))


def _in_use(name: str, uses: dict[str, PoolUsage]) -> str:
    return (
        f"the network {name} is in use: "
        + ", ".join(f"{cidr} has {use}" for cidr, use in uses.items() if use.by_node)
        + "; end its containers, wait for the cooldown, and try again"
    )


async def _remove_network(store: Store, name: str) -> None:
    """Delete it if no address and no block of it is left, in one transaction that compares just that."""
    for _ in range(CHANGE_TRIES):
        guard = await store.get(keys.POOLSET)
        stored = await store.get(keys.NETWORKS + name)
        network, pools = await get_network(store, name)
        if stored is None:
            continue
        shapes = [geometry(pool) for pool in pools]
        compares: list[Compare] = [_guard(guard), unchanged(stored)]
        for shape in shapes:
            compares.append(none_between(*keys.address_range(shape.cidr)))
            compares.append(none_between(*keys.block_range(shape.cidr)))
        operations: list[Op] = [Put(keys.POOLSET, _next(guard)), Delete(stored.key)]
        operations += [Delete(keys.POOLS + pool) for pool in network.pools]
        if (await store.txn(Txn(tuple(compares), tuple(operations)))).succeeded:
            return
        blocks = [kv for shape in shapes for kv in (await store.page(*keys.block_range(shape.cidr))).items]
        around = await read_nodes_networks(store)
        uses = {pool.cidr: await pool_usage(store, pool, around) for pool in pools}
        if any(use.by_node for use in uses.values()):
            raise TryAgain(_in_use(name, uses))
        if blocks:
            owners = sorted({Block.decode(kv.key, kv.value).node for kv in blocks})
            raise TryAgain(
                f"the network {name} has {len(blocks)} blocks held by {', '.join(owners)}; "
                "its agents give them back within seconds while they run: start them and try again"
            )
    raise TryAgain(f"pools kept changing while {name} was deleted; try again")
