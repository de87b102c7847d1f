"""The cluster: every node, block and address as the store last said, for the fabric and the isolation of one node.

Followed from the store by listing and watch, and kept small, because every agent keeps all of it: addresses
lie in the slice of their pool that is or could be a block, as offset -> an interned ``Holding``.

    slice 10.64.3.0/26   owner n7     5 -> (n7, web, ...)     9 -> (n2, web, ...)    <- a stray: away from its block

Two kinds of news come out of it, each told once per batch of changes, and on_members already while they are listed:

    on_topology(nodes)   the facts, blocks or strays of these nodes are different
    on_members(changes)  these addresses are somebody's, of other netgroups, or nobody's any more

Somebody's is also what is announced: no container has it yet, and one that gets it is a member of these netgroups
(ipam/stock.py). Nobody can send from it before.
"""

from __future__ import annotations

import asyncio
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

import msgspec
import structlog

from ipam import grace, keys
from ipam.catalogue import Catalogue
from ipam.errors import StoreError
from ipam.following import follow
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.pools import BITS, DEFAULT_BLOCK, Geometry, block_at
from ipam.ranges import Ranges
from ipam.records import NODE_ENGINE, AddressState, Alive, Block, Node
from ipam.store.base import IN_A_ROW, KeyValue, Store, WatchBatch, pages, prefix_end

log = structlog.get_logger(__name__)

FOLLOWED = (keys.NODES, keys.ALIVE, keys.BLOCKS, keys.ADDRESSES)

INTERN_AT_LEAST = 4096
"""Distinct holdings that are kept before those that no address has any more are looked for."""

_Place: TypeAlias = tuple[Family, int]
"""An IP as family and number."""


class Member(NamedTuple):
    """Whom an assigned address belongs to, as far as isolation has to know.

    netgroups: as recorded; () stands for the network's default. own: it is the node's own, no container's.
    announced: nobody has it yet, and who gets it is in these netgroups.
    """

    node: str
    network: str
    netgroups: tuple[str, ...]
    own: bool = False
    announced: bool = False


class Holding(NamedTuple):
    """One address: who holds it. member: set while it is assigned or announced."""

    node: str
    member: Member | None

    @property
    def is_assigned(self) -> bool:
        return self.member is not None and not self.member.announced


class _Record(msgspec.Struct):
    """What is read of an address record; the rest is skipped unparsed."""

    node: str
    state: str
    network: str = ""
    engine: str = ""
    netgroups: list[str] = []


_decode_address = msgspec.json.Decoder(_Record).decode


@dataclass(slots=True)
class _Slice:
    """What is, or could be, one block. pool: "" if no known pool has it. owner: "" if nobody claimed it."""

    base: int
    size: int
    pool: str
    owner: str = ""
    held: dict[int, Holding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OwnedBlock:
    """A block and the name of its pool."""

    cidr: IPNetwork
    pool: str


class Cluster:
    """See the module's docstring. Reading it never blocks.

    listed: whether everything was listed since the store was last known to be right.

    Whoever was cut off from the store cannot tell by what it lists then whether it was restored meanwhile, and has as
    high a revision as before again: so after that, as after a store known to be restored, nothing is forgotten for
    grace.SECONDS. Those who hold what the store does not know any more assert it anew. What nobody holds does no
    harm meanwhile.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        on_topology: Callable[[set[str]], None] = lambda _: None,
        on_members: Callable[[Sequence[tuple[IPAddress, Member | None]]], None] = lambda _: None,
        on_batch: Callable[[WatchBatch], None] = lambda _: None,
    ) -> None:
        """on_batch: told of all that a watch tells of."""
        self._on_batch = on_batch
        self._store = store
        self._catalogue = catalogue
        self._on_topology = on_topology
        self._on_members = on_members
        self._nodes: dict[str, Node] = {}
        self._slices: dict[Family, dict[int, _Slice]] = {4: {}, 6: {}}
        self._shapes: dict[Family, list[Geometry]] = {4: [], 6: []}
        self._owned: defaultdict[str, set[_Place]] = defaultdict(set)
        self._strays: defaultdict[str, set[_Place]] = defaultdict(set)
        self._unplaced: dict[_Place, str] = {}
        self._interned: dict[Holding, Holding] = {}
        self._netgroups: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._intern_limit = INTERN_AT_LEAST
        self._changed_nodes: set[str] = set()
        self._changed_members: dict[_Place, Member | None] = {}
        self._again = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None
        self._is_over = False
        self._removed: set[str] = set()
        self._alive: dict[str, str] = {}
        self._away: set[str] = set()
        self.listed = asyncio.Event()

    # -- looking in

    def nodes(self) -> dict[str, Node]:
        """The facts of every node, by name."""
        return self._nodes

    @property
    def removed(self) -> frozenset[str]:
        """Nodes that the store told the removal of, since it was last known to have gone back in time."""
        return frozenset(self._removed)

    @property
    def away(self) -> set[str]:
        """Registered nodes, of those that run containers, without a sign of life in the store."""
        return self._away if self.listed.is_set() else set()

    def have_asserted(self, nodes: Collection[str], incarnation: str) -> bool:
        """Whether the store has all of what these nodes hold, since its incarnation is this."""
        return all(self._alive.get(node) == incarnation for node in nodes)

    @property
    def alive(self) -> Collection[str]:
        """Nodes that gave a sign of life."""
        return self._alive.keys()

    @property
    def is_settled(self) -> bool:
        """Whether all was listed, of a store that is not known to have gone back in time of late."""
        return self.listed.is_set() and self._grace is None

    def names(self) -> set[str]:
        """Every node that has facts, a block or a stray."""
        return {*self._nodes, *self._owned, *self._strays}

    def blocks_of(self, node: str) -> list[OwnedBlock]:
        """The node's blocks, in no order."""
        found = []
        for family, base in self._owned.get(node, ()):
            piece = self._slices[family][base]
            found.append(OwnedBlock(block_at(_ip(family, base), piece.size), piece.pool))
        return found

    def strays_of(self, node: str) -> list[tuple[IPAddress, str]]:
        """Addresses that the node holds outside of its blocks, each with its pool's name; in no order."""
        return [
            (_ip(family, value), self._slice(family, value).pool)
            for family, value in self._strays.get(node, ())
        ]

    def owner_of(self, ip: IPAddress) -> str:
        """The node whose block an address lies in; "" if that block is nobody's."""
        return self._slice(ip.version, int(ip)).owner

    def holder_of(self, ip: IPAddress) -> Holding | None:
        """Who holds an address; None if nobody does."""
        piece = self._slice(ip.version, int(ip))
        return piece.held.get(int(ip) - piece.base)

    def assigned_in(self, block: IPNetwork, within: Ranges) -> list[IPAddress]:
        """The assigned addresses of a block that lie in ``within`` and are held by who has the block."""
        piece = self._slice(block.version, int(block.network_address))
        return [
            _ip(block.version, piece.base + offset)
            for offset, holding in piece.held.items()
            if holding.is_assigned and holding.node == piece.owner and piece.base + offset in within
        ]

    def members(self) -> Iterator[tuple[IPAddress, Member]]:
        """Every assigned address, and every announced one."""
        for family, slices in self._slices.items():
            for piece in slices.values():
                for offset, holding in piece.held.items():
                    if holding.member is not None:
                        yield _ip(family, piece.base + offset), holding.member

    # -- following

    async def follow(self) -> None:
        """Follow the store until cancelled. Raises StoreError when it fails; the caller runs it again."""
        while True:
            self._again.clear()
            if self._nodes and not self._is_over:
                self._begin_grace()
            self._is_over = False
            # Blocks of pools that are not known yet would be taken for nobody's.
            await self._catalogue.refresh()
            self.pools_changed()
            forgets = self._grace is None
            listed = {prefix: await self._list(prefix, forgets) for prefix in FOLLOWED}
            if self._again.is_set():
                continue  # what was read may be of before that
            self.listed.set()
            self._tell()
            self._on_members(())  # who waited for the end of a doubt hears of it
            await follow(self._store, listed, self._deliver, self._again)

    def start_over(self, seconds: float | None = None) -> None:
        """The store went back in time: it is to be listed anew. seconds: that nothing is forgotten for."""
        self._begin_grace(seconds)
        self._is_over = False
        self._removed.clear()
        self.listed.clear()
        self._again.set()

    def _begin_grace(self, seconds: float | None = None) -> None:
        if self._grace is not None:
            self._grace.cancel()
        whole = grace.SECONDS if seconds is None else seconds
        self._grace = asyncio.get_running_loop().call_later(whole, self._end_grace)

    def _end_grace(self) -> None:
        """What is not there in the listing that follows is gone."""
        self._grace = None
        self._is_over = True
        self._again.set()

    def pools_changed(self) -> None:
        """The catalogue's pools may be different: addresses and blocks are put where they belong now."""
        shapes: dict[Family, list[Geometry]] = {
            family: sorted((p for p in self._catalogue.pools() if p.family == family), key=lambda p: p.first)
            for family in self._slices
        }
        if _outlines(shapes) == _outlines(self._shapes):
            return
        before = self._slices
        owners = {(f, p.base): p.owner for f, slices in before.items() for p in slices.values() if p.owner}
        owners |= self._unplaced
        self._shapes = shapes
        self._changed_nodes |= self.names()
        self._slices = {4: {}, 6: {}}
        self._owned.clear()
        self._strays.clear()
        self._unplaced.clear()
        for place, owner in owners.items():
            self._set_owner(*place, owner)
        for family, slices in before.items():
            for piece in slices.values():
                for offset, holding in piece.held.items():
                    self._put(family, piece.base + offset, holding)
        if self.listed.is_set():
            self._tell()

    async def _list(self, prefix: str, forgets: bool) -> int:
        """Read all below a prefix, page by page; returns the revision it was read at. Raises StoreUnavailable.

        forgets: what is not there is gone.
        """
        gone = set(self._known(prefix))
        revision = 0
        async for page in pages(self._store, prefix, prefix_end(prefix)):
            for number, kv in enumerate(page.items):
                if number % IN_A_ROW == 0:
                    await asyncio.sleep(0)
                if forgets or not self._takes_a_member(kv):
                    self._apply(kv.key, kv)
                gone.discard(kv.key)
            # Page by page: news of a hundred thousand addresses at once would be larger than what is kept of them.
            self._tell_members()
            revision = page.revision
        # Who lives is said anew every few seconds; a store that went back in time knows it as well as before.
        for key in gone if forgets or prefix == keys.ALIVE else ():
            self._apply(key, None)
        return revision

    def _takes_a_member(self, kv: KeyValue) -> bool:
        """Whether an address is that of the same node as before, and not assigned any more, or not yet again; or not
        announced any more."""
        if not kv.key.startswith(keys.ADDRESSES):
            return False
        try:
            ip, found = keys.ip_of(kv.key), self._holding(kv)
        except (StoreError, msgspec.MsgspecError):
            return False
        known = self.holder_of(ip)
        return (
            known is not None
            and known.member is not None
            and known.node == found.node
            and not found.is_assigned
            and (known.is_assigned or found.member is None)
        )

    def _known(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix that something is known of."""
        if prefix == keys.NODES:
            yield from (prefix + name for name in self._nodes)
            return
        if prefix == keys.ALIVE:
            yield from (prefix + name for name in self._alive)
            return
        if prefix == keys.BLOCKS:
            yield from (f"{prefix}{family}/{keys.hex_of(base, family)}" for family, base in self._unplaced)
        for family, slices in self._slices.items():
            for piece in slices.values():
                if prefix == keys.ADDRESSES:
                    yield from (keys.address_key(_ip(family, piece.base + offset)) for offset in piece.held)
                elif piece.owner:
                    yield keys.block_key(block_at(_ip(family, piece.base), piece.size))

    def _deliver(self, _: str, batch: WatchBatch) -> None:
        self._on_batch(batch)
        for event in batch.events:
            self._apply(event.key, event.kv)
            if event.kv is None and event.key.startswith(keys.NODES):
                self._removed.add(event.key.removeprefix(keys.NODES))
        self._tell()

    def _tell(self) -> None:
        changed, self._changed_nodes = self._changed_nodes, set()
        if changed:
            self._on_topology(changed)
        self._tell_members()

    def _tell_members(self) -> None:
        members, self._changed_members = self._changed_members, {}
        if members:
            self._on_members([(_ip(*place), member) for place, member in members.items()])

    # -- changing

    def _apply(self, key: str, kv: KeyValue | None) -> None:
        """One key as it is now; None if it is gone. What cannot be read leaves things as they were."""
        try:
            if key.startswith(keys.ADDRESSES):
                self._put(*_place(key), None if kv is None else self._holding(kv))
            elif key.startswith(keys.ALIVE):
                self._set_alive(key.removeprefix(keys.ALIVE), None if kv is None else _incarnation(kv))
            elif key.startswith(keys.BLOCKS):
                owner = "" if kv is None else Block.decode(key, kv.value).node
                self._set_owner(*_place(key), owner)
            else:
                self._set_node(key.removeprefix(keys.NODES), kv)
        except (StoreError, msgspec.MsgspecError) as error:
            # `moorage ip check` reports it; no word of it each time it is seen.
            log.debug("record is not followed", key=key, why=str(error))

    def _holding(self, kv: KeyValue) -> Holding:
        record = _decode_address(kv.value)
        member = None
        if record.state == AddressState.ASSIGNED:
            own = record.engine == NODE_ENGINE
            member = Member(record.node, record.network, tuple(record.netgroups), own)
        elif record.state != AddressState.COOLING and record.netgroups:
            member = Member(record.node, record.network, tuple(record.netgroups), announced=True)
        found = Holding(record.node, member)
        return self._interned.get(found) or self._intern(found)

    def _intern(self, new: Holding) -> Holding:
        """The holding that stands for all equal ones, made of what others are made of, too."""
        if len(self._interned) > self._intern_limit:
            in_use = {
                holding for of in self._slices.values() for p in of.values() for holding in p.held.values()
            }
            self._interned = {holding: holding for holding in in_use}
            self._netgroups = {m.netgroups: m.netgroups for h in in_use if (m := h.member) is not None}
            self._intern_limit = 2 * len(in_use) + INTERN_AT_LEAST
        node, member = sys.intern(new.node), new.member
        if member is not None:
            netgroups = self._netgroups.get(member.netgroups)
            if netgroups is None:
                netgroups = tuple(map(sys.intern, member.netgroups))
                self._netgroups[netgroups] = netgroups
            member = Member(node, sys.intern(member.network), netgroups, member.own, member.announced)
        holding = Holding(node, member)
        self._interned[holding] = holding
        return holding

    def _set_node(self, name: str, kv: KeyValue | None) -> None:
        node = None if kv is None else Node.decode(kv.key, kv.value)
        if node == self._nodes.get(name):
            return
        if node is None:
            del self._nodes[name]
        else:
            self._nodes[name] = node
            self._removed.discard(name)
        self._changed_nodes.add(name)
        self._set_alive(name, self._alive.get(name))

    def _set_alive(self, name: str, incarnation: str | None) -> None:
        """incarnation: that its sign of life says; None if it gives none."""
        if incarnation is None:
            self._alive.pop(name, None)
        else:
            self._alive[name] = sys.intern(incarnation)
        node = self._nodes.get(name)
        is_away = node is not None and not node.gateway and incarnation is None
        (self._away.add if is_away else self._away.discard)(name)

    def _set_owner(self, family: Family, base: int, owner: str) -> None:
        piece = self._slice(family, base)
        if not piece.pool or piece.base != base:
            # Of a pool not known yet; the catalogue is followed beside this.
            self._unplaced.pop((family, base), None)
            if owner:
                self._unplaced[family, base] = owner
            return
        if piece.owner == owner:
            return
        place = (family, piece.base)
        if piece.owner:
            self._owned[piece.owner].discard(place)
            self._changed_nodes.add(piece.owner)
        if owner:
            self._owned[owner].add(place)
            self._changed_nodes.add(owner)
        piece.owner = owner
        for offset, holding in piece.held.items():
            self._place_stray((family, piece.base + offset), holding, piece)
        self._keep(family, piece)

    def _put(self, family: Family, value: int, holding: Holding | None) -> None:
        piece = self._slice(family, value)
        before = piece.held.get(value - piece.base)
        if before == holding:
            return
        place = (family, value)
        if before is not None and (holding is None or holding.node != before.node):
            self._unstray(place, before.node)
        if holding is None:
            del piece.held[value - piece.base]
        else:
            piece.held[value - piece.base] = holding
            self._place_stray(place, holding, piece)
        if (before.member if before else None) != (member := holding.member if holding else None):
            self._changed_members[place] = member
            if value in self._catalogue.around.closed(family, forced=False):
                # A route leads to it alone (isolator/fabric/plan.py).
                self._changed_nodes |= {of.node for of in (before, holding) if of is not None}
        was_away, is_away = (of is not None and of.node != piece.owner for of in (before, holding))
        if piece.owner and was_away != is_away and self._may_be_alone(family, piece):
            self._changed_nodes.add(piece.owner)  # all that a route leads to is elsewhere now, or back
        self._keep(family, piece)

    def _may_be_alone(self, family: Family, piece: _Slice) -> bool:
        """Whether one address of a block can be all that a route to the block leads to (isolator/fabric/plan.py)."""
        last = piece.base + (1 << (BITS[family] - piece.size)) - 1
        return piece.size == BITS[family] or bool(
            self._catalogue.around.closed(family, forced=False).within(piece.base, last)
        )

    def _place_stray(self, place: _Place, holding: Holding, piece: _Slice) -> None:
        if holding.node == piece.owner:
            self._unstray(place, holding.node)
        elif place not in self._strays[holding.node]:
            self._strays[holding.node].add(place)
            self._changed_nodes.add(holding.node)

    def _unstray(self, place: _Place, node: str) -> None:
        if place in self._strays[node]:
            self._strays[node].discard(place)
            self._changed_nodes.add(node)

    def _keep(self, family: Family, piece: _Slice) -> None:
        """A slice that was changed is known from now on, or no more if nothing is left in it."""
        if piece.held or piece.owner:
            self._slices[family][piece.base] = piece
        else:
            self._slices[family].pop(piece.base, None)

    def _slice(self, family: Family, value: int) -> _Slice:
        """The slice that an address lies in; one that nothing is known of is new."""
        shapes = self._shapes[family]
        index = bisect_right(shapes, value, key=lambda shape: shape.first) - 1
        shape = shapes[index] if index >= 0 and value <= shapes[index].last else None
        if shape is not None:
            base, size, pool = (
                value - (value - shape.first) % shape.block_length,
                shape.block_size,
                shape.name,
            )
        else:
            size, pool = DEFAULT_BLOCK[family], ""
            base = value & ~((1 << (BITS[family] - size)) - 1)
        return self._slices[family].get(base) or _Slice(base, size, pool)


def _incarnation(alive: KeyValue) -> str:
    """What a sign of life says of the store. One that cannot be read is a sign of life all the same."""
    try:
        return Alive.decode(alive.key, alive.value).incarnation
    except StoreError:
        return ""


def _ip(family: Family, value: int) -> IPAddress:
    return IPv4Address(value) if family == 4 else IPv6Address(value)


def _place(key: str) -> _Place:
    """Of an address or block key. Raises StoreError for any other."""
    _, _, tail = key.partition("/")
    if tail.startswith("4/") and len(tail) == 2 + keys.WIDTH[4]:
        family: Family = 4
    elif tail.startswith("6/") and len(tail) == 2 + keys.WIDTH[6]:
        family = 6
    else:
        raise StoreError(f"the store's key {key} stands for no IP address")
    try:
        return family, int(tail[2:], 16)
    except ValueError as error:
        raise StoreError(f"the store's key {key} stands for no IP address") from error


def _outlines(shapes: dict[Family, list[Geometry]]) -> list[tuple[str, IPNetwork, int]]:
    return [(shape.name, shape.cidr, shape.block_size) for of in shapes.values() for shape in of]
