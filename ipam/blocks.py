"""Blocks, as operators see them: who owns which, what is in them, and one given back by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ipam import keys
from ipam.errors import MoorageError, NotFound, StoreError, TryAgain
from ipam.intents import ask
from ipam.keys import IPNetwork
from ipam.pools import block_at
from ipam.records import Address, AddressState, Block, Intent, IntentKind
from ipam.store.base import Store, read_prefix, read_range


@dataclass(frozen=True, slots=True)
class BlockUse:
    """A block and the addresses in it that are in use. others: how many of them are other nodes'.

    since: wall clock, when it was claimed. free: of all its addresses, usable or not.
    """

    block: str
    pool: str
    node: str
    allocated: int
    assigned: int
    warm: int
    cooling: int
    others: int
    free: int
    since: float


async def list_blocks(store: Store, *, node: str | None = None, pool: str | None = None) -> list[BlockUse]:
    """Every block that matches, in address order. pool: its CIDR or name."""
    found = []
    for kv in (await read_prefix(store, keys.BLOCKS))[0]:
        record = Block.decode(kv.key, kv.value)
        block = block_at(keys.ip_of(kv.key), record.size)
        if node in (None, record.node) and (pool is None or pool.replace("/", "-") == record.pool):
            found.append(await _use(store, block, record))
    return found


async def _use(store: Store, block: IPNetwork, record: Block) -> BlockUse:
    states: Counter[str] = Counter()
    others = 0
    items, _ = await read_range(store, *keys.address_range(block))
    for kv in items:
        try:
            address = Address.decode(kv.key, kv.value)
        except StoreError:
            continue  # in use, and `moorage ip check` says why it is not counted
        states[address.state] += 1
        others += address.node != record.node
    return BlockUse(
        block=str(block),
        pool=record.pool,
        node=record.node,
        allocated=states[AddressState.ALLOCATED],
        assigned=states[AddressState.ASSIGNED],
        warm=states[AddressState.WARM],
        cooling=states[AddressState.COOLING],
        others=others,
        free=block.num_addresses - len(items),
        since=record.claimed_at,
    )


async def release_block(store: Store, block: IPNetwork) -> str:
    """Have the owner's agent return an empty block to its pool; returns the owner's name.

    Raises NotFound, TryAgain naming what is in it, or saying that the owner's agent does not run.
    """
    kv = await store.get(keys.block_key(block))
    record = None if kv is None else Block.decode(kv.key, kv.value)
    if record is None or record.size != block.prefixlen:
        raise NotFound(f"no node has claimed a block {block}; see `moorage block list`")
    if await store.get(keys.ALIVE + record.node) is None:
        raise TryAgain(
            f"the agent of node {record.node}, which owns {block}, is not running, and only it may return the block; "
            f"start it, or if the node is gone free all it had with `moorage node remove {record.node}`"
        )
    intent = Intent(kind=IntentKind.RETURN_BLOCK, evidence={"block": str(block)})
    answer = await ask(store, record.node, intent)
    if not answer.get("done"):
        raise MoorageError(f"node {record.node} kept {block}: {answer.get('why', 'it did not say why')}")
    return record.node
