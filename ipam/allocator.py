"""Where the address is chosen: pure decisions over blocks and what is known of them.

A node takes addresses from its own blocks, in the order of the network's pools. Inside a block those
come first that nobody had since the agent runs, then the address that was released longest ago. When its
blocks are used up, the node claims another, looking from a place that its name hashes to: nodes then
rarely look at the same block. Where no block is left either: ipam/borrowing.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from itertools import islice

from ipam.keys import IPAddress, IPNetwork
from ipam.pools import Geometry


class BlockSpace:
    """The addresses of one own block that nobody is known to hold, longest unused first."""

    def __init__(self, pool: Geometry, block: IPNetwork, held: Collection[IPAddress]) -> None:
        self.pool = pool
        self.block = block
        # A dictionary is a queue in which any member is found at once. To when it was given back; 0 is not known.
        dynamic = list(pool.dynamic_in(block))
        self._size = len(dynamic)
        self._version = block.version
        self._ends = int(block.network_address), int(block.broadcast_address)
        self._free = dict.fromkeys((ip for ip in dynamic if ip not in held), 0)
        self._foreign: set[IPAddress] = set()

    def __contains__(self, ip: IPAddress) -> bool:
        """Whether ``ip`` lies in the block. Asked of every block for every address that comes or goes."""
        return ip.version == self._version and self._ends[0] <= int(ip) <= self._ends[1]

    @property
    def is_idle(self) -> bool:
        """This node holds none of those that may be given to anybody. Others may: what they had when last heard of
        counts for nothing, because the store is asked when the block is returned."""
        return len(self._free) + len(self._foreign) == self._size

    @property
    def foreign(self) -> frozenset[IPAddress]:
        """Those that were somebody else's when last heard of."""
        return frozenset(self._foreign)

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int, reserved: Collection[IPAddress]) -> list[IPAddress]:
        """Up to ``count`` addresses, none of them reserved for somebody."""
        taken = list(islice((ip for ip in self._free if ip not in reserved), max(count, 0)))
        for ip in taken:
            del self._free[ip]
        return taken

    def oldest(self, count: int, reserved: Collection[IPAddress]) -> list[tuple[int, IPAddress]]:
        """(when it was given back, address) of those that ``take`` would take, longest unused first."""
        return list(islice(((at, ip) for ip, at in self._free.items() if ip not in reserved), count))

    def remove(self, ip: IPAddress) -> None:
        """This node holds it now."""
        self._free.pop(ip, None)
        self._foreign.discard(ip)

    def note_foreign(self, ip: IPAddress) -> None:
        """Somebody else holds it, who may release it unseen."""
        self._free.pop(ip, None)
        if self.pool.dynamic(ip):
            self._foreign.add(ip)

    def give_back(self, ip: IPAddress, at: int) -> None:
        """Nobody holds it any more: it is reused last. at: grows from one to the next, in all blocks."""
        self._foreign.discard(ip)
        if self.pool.dynamic(ip):
            self._free.setdefault(ip, at)

    def reshaped(self, pool: Geometry, held: Collection[IPAddress]) -> BlockSpace:
        """The same block after its pool was changed; what was released longest ago still comes first."""
        space = BlockSpace(pool, self.block, held)
        for ip in self._foreign:
            if ip in space._free:
                space.note_foreign(ip)
        known = {ip: at for ip, at in self._free.items() if ip in space._free}
        fresh = {ip: at for ip, at in space._free.items() if ip not in known}
        space._free = fresh | known
        return space


def first_block(node: str, pool: Geometry) -> int:
    """The index where ``node`` starts looking for a block of ``pool`` to claim."""
    return zlib.crc32(node.encode()) % pool.block_count
