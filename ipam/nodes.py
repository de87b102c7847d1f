"""Nodes as the store knows them, and what operators do with them.

While a node's agent lives it is asked, through intents. What is left of a node that is gone is freed here,
behind its own fence:

    remove   fence := an operator's, older than anything the agent had confirmed
             addresses, page by page -> blocks -> nodes/<name> and the fence
    adopt    fence := vacant, and alive/<name> ends: in one transaction

Every one of these transactions compares ``alive/<name>`` absent (an adoption may end it) and the fence as the
one before left it. So an agent that was only cut off cannot write in between, and finds when it is back that
its store is older than its journal: it asserts anew what its endpoints use, or is cut off where somebody
else has it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ipam import keys
from ipam.errors import MoorageError, NotFound, StoreError, TryAgain
from ipam.intents import ask
from ipam.pools import block_at
from ipam.records import Address, AddressState, Alive, Block, Fence, Intent, IntentKind, Node
from ipam.store.base import (
    MAX_OPS,
    Compare,
    Delete,
    KeyValue,
    Op,
    Put,
    Store,
    Txn,
    absent,
    prefix_end,
    read_prefix,
    unchanged,
)

PAGE = MAX_OPS - 8
"""Keys of a removed node freed in one transaction, which compares a few more."""

ADOPT_TRIES = 100
"""Each fails only because the agent wrote something meanwhile."""

DRAIN_PATIENCE = 20.0
"""Seconds a drain waits for ADDs under way, which wait up to 10 s for an address themselves."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node and whether its agent runs. instance: of the running agent, "" if none. since: wall clock."""

    name: str
    alive: bool
    drained: bool
    version: str
    underlay: list[str]
    instance: str
    since: float
    blocks: int


@dataclass(frozen=True, slots=True)
class Count:
    """Addresses of one network, family and state."""

    network: str
    family: int
    state: str
    count: int


@dataclass(frozen=True, slots=True)
class NodeDetail:
    """All that the store knows of one node.

    mesos_agent: the id of the Mesos agent there, "" if nobody told it.
    fence: how many writes of it the store has confirmed; None if it has no fence.
    blocks: CIDRs. surroundings: what its own networks use, as in ipam/taken.py.
    kept: addresses that its containers may be using, so that they are not freed unasked.
    """

    name: str
    alive: bool
    drained: bool
    version: str
    underlay: list[str]
    mtu: int
    features: list[str]
    mesos_agent: str
    instance: str
    boot_id: str
    fence: int | None
    since: float
    blocks: list[str]
    surroundings: list[str]
    addresses: list[Count]
    kept: dict[str, int]

    def states(self) -> dict[str, int]:
        """How many addresses, by state."""
        found: Counter[str] = Counter()
        for row in self.addresses:
            found[row.state] += row.count
        return dict(found)


@dataclass(slots=True)
class Freed:
    """What a removal deleted. addresses: by state."""

    addresses: dict[str, int] = field(default_factory=dict)
    blocks: int = 0


async def list_nodes(store: Store) -> list[NodeStatus]:
    """Every node that ever registered and was not removed, by name."""
    nodes, _ = await read_prefix(store, keys.NODES)
    leases, _ = await read_prefix(store, keys.ALIVE)
    blocks, _ = await read_prefix(store, keys.BLOCKS)
    alive = {kv.key.removeprefix(keys.ALIVE): Alive.decode(kv.key, kv.value) for kv in leases}
    owned = Counter(Block.decode(kv.key, kv.value).node for kv in blocks)
    found = []
    for kv in nodes:
        node = Node.decode(kv.key, kv.value)
        lease = alive.get(node.name)
        found.append(
            NodeStatus(
                name=node.name,
                alive=lease is not None,
                drained=node.drained,
                version=node.version,
                underlay=node.underlay,
                instance=lease.instance if lease else "",
                since=node.since,
                blocks=owned[node.name],
            )
        )
    return found


async def get_node(store: Store, name: str) -> NodeDetail:
    """All about one node; reads every address of the store. Raises NotFound naming the known ones."""
    record, lease, fence = await _known(store, name)
    node = Node.decode(record.key, record.value) if record else Node(name=name, version="")
    alive = Alive.decode(lease.key, lease.value) if lease else None
    counts: Counter[tuple[str, int, str]] = Counter()
    kept: Counter[str] = Counter()
    async for kv, address in _addresses(store, name):
        counts[address.network, keys.ip_of(kv.key).version, address.use] += 1
        if _may_be_used(address, drained=node.drained):
            kept[address.state.value] += 1
    blocks = [str(block_at(keys.ip_of(kv.key), block.size)) for kv, block in await _blocks(store, name)]
    return NodeDetail(
        name=name,
        alive=alive is not None,
        drained=node.drained,
        version=node.version,
        underlay=node.underlay,
        mtu=node.mtu,
        features=node.features,
        mesos_agent=node.mesos_agent,
        instance=alive.instance if alive else "",
        boot_id=alive.boot_id if alive else "",
        fence=Fence.decode(fence.key, fence.value).seq if fence else None,
        since=node.since,
        blocks=blocks,
        surroundings=node.surroundings,
        addresses=[
            Count(network, family, state, count) for (network, family, state), count in sorted(counts.items())
        ],
        kept=dict(kept),
    )


async def check_node(store: Store, name: str) -> None:
    """Raises NotFound, naming the known ones, if there is no such node."""
    await _known(store, name)


async def _known(store: Store, name: str) -> tuple[KeyValue | None, KeyValue | None, KeyValue | None]:
    """The node's record, sign of life and fence, of which there is at least one. Raises NotFound."""
    found = await asyncio.gather(
        *(store.get(prefix + name) for prefix in (keys.NODES, keys.ALIVE, keys.WRITERS))
    )
    if not any(found):
        items, _ = await read_prefix(store, keys.NODES)
        known = ", ".join(kv.key.removeprefix(keys.NODES) for kv in items) or "none yet"
        raise NotFound(f"there is no node {name!r} (known: {known}); correct the name")
    return found[0], found[1], found[2]


def _may_be_used(address: Address, *, drained: bool) -> bool:
    """Whether a container may have it, as far as the store can tell without the node's agent.

    An agent lends what is warm, and what cools down to who had it, before the store hears of it.
    """
    if address.state.is_taken:
        return not address.is_nodes_own
    comes_back = address.reservation or address.container_id or address.former
    return not drained and (address.state is AddressState.WARM or bool(comes_back))


async def _addresses(store: Store, name: str) -> AsyncIterator[tuple[KeyValue, Address]]:
    """The node's, as they stand when they are come to. Records that cannot be read are left to `ip check`."""
    cursor: str | None = keys.ADDRESSES
    while cursor is not None:
        page = await store.page(cursor, prefix_end(keys.ADDRESSES))
        for kv in page.items:
            try:
                address = Address.decode(kv.key, kv.value)
                keys.ip_of(kv.key)
            except StoreError:
                continue
            if address.node == name:
                yield kv, address
        cursor = page.next_key


async def _blocks(store: Store, name: str) -> list[tuple[KeyValue, Block]]:
    found = []
    for kv in (await read_prefix(store, keys.BLOCKS))[0]:
        try:
            block = Block.decode(kv.key, kv.value)
            block_at(keys.ip_of(kv.key), block.size)
        except StoreError:
            continue
        if block.node == name:
            found.append((kv, block))
    return found


async def drain_node(store: Store, name: str, *, undo: bool = False) -> dict[str, Any]:
    """Have a node's agent take no more addresses (or again, with ``undo``) and give back what is not in use.

    Returns its answer, ipam/drain.py `Drain.report`. Raises NotFound, and TryAgain when the agent does not
    run or ADDs under way keep it from being drained within DRAIN_PATIENCE seconds.
    """
    await _known(store, name)
    deadline = asyncio.get_running_loop().time() + DRAIN_PATIENCE
    while True:
        answer = await ask(store, name, Intent(kind=IntentKind.DRAIN, evidence={"undo": undo}))
        if answer.get("done"):
            return answer
        if "left" not in answer:
            raise MoorageError(f"node {name} refused: {answer.get('why', 'it did not say why')}")
        if asyncio.get_running_loop().time() > deadline:
            raise TryAgain(
                f"node {name} takes no new addresses, but some are not given back yet: {_said(answer['left'])}; "
                "see its log and drain it again"
            )


def _said(left: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['count']} {row['state']} of {row['network']}" for row in left) or "none"


async def remove_node(
    store: Store, name: str, *, force: bool = False, guards: Sequence[Compare] = ()
) -> Freed:
    """Forget a node that is gone: free its addresses and blocks, end its fence, delete its record.

    Refuses while its agent is alive, and, without ``force``, while containers may be using addresses of it:
    assigned ones, and warm ones unless it was drained. Once begun it goes on where it was interrupted.
    guards: have to hold in every transaction, besides its own compares. Raises NotFound, TryAgain.
    """
    node = await get_node(store, name)
    if node.alive:
        raise TryAgain(
            f"the agent of node {name} is running; drain the node (`moorage node drain {name}`), end its containers, "
            "stop its agent, and remove it then (a killed agent counts as running for another 15 s)"
        )
    if node.kept and not force:
        held = ", ".join(f"{count} {state}" for state, count in sorted(node.kept.items()))
        drain = "" if node.drained else "; the node was not drained, so that warm ones may be in use too"
        raise TryAgain(
            f"node {name} holds addresses that its containers may be using: {held}{drain}; start its agent and drain "
            "it, or use --force if the machine is gone for good"
        )
    guards = await _take_fence(store, name, guards)
    freed = Freed()
    counts: Counter[str] = Counter()
    page: list[KeyValue] = []
    async for kv, address in _addresses(store, name):
        page.append(kv)
        counts[address.use] += 1
        if len(page) == PAGE:
            await _delete(store, name, guards, page)
            page.clear()
    await _delete(store, name, guards, page)
    freed.addresses = dict(counts)
    blocks = [kv for kv, _ in await _blocks(store, name)]
    for start in range(0, len(blocks), PAGE):
        await _delete(store, name, guards, blocks[start : start + PAGE])
    freed.blocks = len(blocks)
    await _write(store, name, guards, (Delete(keys.NODES + name), Delete(keys.WRITERS + name)))
    return freed


async def _take_fence(store: Store, name: str, also: Sequence[Compare]) -> tuple[Compare, ...]:
    """Shut the node's agent out; returns what every further transaction compares.

    At seq 0 the fence is older than all that the agent had confirmed: if it comes back it asserts anew.
    """
    alive = absent(keys.ALIVE + name)
    key = keys.WRITERS + name
    fence = await store.get(key)
    mine = Fence(instance=f"removed-{uuid.uuid4().hex}", boot_id="", seq=0)
    guards = (*also, alive, absent(key) if fence is None else unchanged(fence))
    result = await store.txn(Txn(guards, (Put(key, mine.encode()),)))
    if not result.succeeded:
        raise _came_back(name)
    return *also, alive, Compare(key, result.revision)


async def _delete(store: Store, name: str, guards: tuple[Compare, ...], found: Sequence[KeyValue]) -> None:
    await _write(
        store, name, (*guards, *(unchanged(kv) for kv in found)), tuple(Delete(kv.key) for kv in found)
    )


async def _write(store: Store, name: str, guards: tuple[Compare, ...], operations: tuple[Op, ...]) -> None:
    if not (await store.txn(Txn(guards, operations))).succeeded:
        raise _came_back(name)


def _came_back(name: str) -> TryAgain:
    return TryAgain(
        f"node {name} changed while it was removed: its agent came back, or somebody else removes it; an agent that "
        f"came back asserts what its containers use. See `moorage node show {name}`, then try again"
    )


async def adopt_node(store: Store, name: str, *, force: bool = False) -> NodeDetail:
    """Take a name from its agent and keep it for whoever starts next under it; returns how it stood before.

    Raises NotFound, and TryAgain when the agent is alive (unless ``force``) or kept writing meanwhile.
    """
    node = await get_node(store, name)
    for _ in range(ADOPT_TRIES):
        _, lease, found = await _known(store, name)
        if lease is not None and not force:
            raise TryAgain(
                f"the agent of node {name} is running; stop it, or confirm that it is to be fenced"
            )
        key = keys.WRITERS + name
        stood = Fence.decode(found.key, found.value) if found else None
        vacant = Fence(instance="", boot_id="", seq=stood.seq if stood else 0, vacant=True)
        guards = (
            absent(key) if found is None else unchanged(found),
            absent(keys.ALIVE + name) if lease is None else unchanged(lease),
        )
        ends: tuple[Op, ...] = () if lease is None else (Delete(lease.key),)
        if (await store.txn(Txn(guards, (Put(key, vacant.encode()), *ends)))).succeeded:
            return node
    raise TryAgain(f"the agent of node {name} kept writing meanwhile; try again")
