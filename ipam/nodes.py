"""Nodes as the store knows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ipam import keys
from ipam.records import Alive, Block, Node
from ipam.store.base import Store, read_prefix


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node and whether its agent runs. instance: of the running agent, "" if none. since: wall clock."""

    name: str
    alive: bool
    version: str
    underlay: list[str]
    instance: str
    since: float
    blocks: int


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
                version=node.version,
                underlay=node.underlay,
                instance=lease.instance if lease else "",
                since=node.since,
                blocks=owned[node.name],
            )
        )
    return found
