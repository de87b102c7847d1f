"""The shelf: the addresses this node holds, in memory, and who waits for one.

                 offer()                 lend()              plan/accept
    (store) ---> warm, in a queue ---> lent to one ADD ---> assigned
                  ^  ^    ^                 | put_back()        | release
      others have |  |    +-----------------+                   v
            heard |  +------- cooldown over ---------------- cooling ---> (freed)
                warm, announced until now  <--- renounce(), from the queue

An engine that asks for addresses before it has a container makes a stop on the way: lent -> allocated -> lent
-> assigned, or from allocated straight to cooling (ipam/allocations.py).

One Held per address, with what *should* stand in the store (``record``) and what is *known* to stand
there (``revision``). Where the two differ the entry is dirty: all dirty entries together are the
outbox. Nothing here waits, reads or writes anything.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from ipam.allocator import BlockSpace
from ipam.errors import MoorageError
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.records import Address, AddressState

UNKNOWN = "unknown"
"""The id of an assignment of which nobody knows whether there was one."""


def cooling(record: Address) -> Address:
    """The record of a released address; it still says who had it, who may have it back before others."""
    return record.with_(
        state=AddressState.COOLING,
        since=time.time(),
        labels=[],
        netgroups=[],
        uid="",
        former=record.uid or record.former,
        endpoint={},
    )


def doubtful(record: Address) -> Address:
    """The record of an address that cools because somebody may have had it, whatever its last record says."""
    return cooling(record).with_(id=record.id or UNKNOWN)


def netgroups_told(record: Address | None) -> tuple[str, ...]:
    """What other nodes take an address for a member of that has this record in the store."""
    if record is None or record.state is AddressState.COOLING or record.is_nodes_own:
        return ()
    if record.state is AddressState.ASSIGNED and not record.netgroups:
        return (record.network,)
    return tuple(record.netgroups)


@dataclass(slots=True, eq=False)
class Held:
    """One address of this node.

    record: what should stand in the store; None means nothing.
    leaving: when that is None, the record before it.
    revision: the mod_revision known to stand there, 0 if nothing is.
    dirty: the two differ.
    in_flight: the record that was sent to the store, which has not answered yet; None if none was.
    journalled: the journal has it. One that is not is only being asked for.
    forgotten: the journal has it as an address that nobody may use, because it is being given away.
    lent: an ADD is about to use it.
    told: what other nodes take it for a member of, by what the store has confirmed last.
    unheard: the store has confirmed that it is no member of something any more, and others may not have heard yet.
    ready_at: when the cooldown is over, or others have heard (event loop's clock); None until confirmed.
    recalled: the journal says so, and the store was not compared with it since.
    carried: the kernel says so: an endpoint has it, of which the journal knew nothing, or something older.
    """

    ip: IPAddress
    record: Address | None
    revision: int = 0
    dirty: bool = False
    in_flight: Address | None = None
    journalled: bool = False
    forgotten: bool = False
    leaving: Address | None = None
    lent: bool = False
    ready_at: float | None = None
    told: tuple[str, ...] = ()
    unheard: bool = False
    recalled: bool = False
    carried: bool = False

    @property
    def state(self) -> AddressState | None:
        return self.record.state if self.record else None

    @property
    def is_asked_for(self) -> bool:
        """On its way from free to warm."""
        return self.dirty and self.revision == 0 and self.state is AddressState.WARM

    @property
    def is_announced(self) -> bool:
        """Whether it is warm for members of certain netgroups only, as which other nodes know it; ipam/stock.py."""
        return self.record is not None and self.state is AddressState.WARM and bool(self.record.netgroups)

    @property
    def is_withdrawn(self) -> bool:
        """Whether it cools although nobody had it, until others have heard that it is a member of nothing."""
        return self.record is not None and self.record.is_withdrawn

    @property
    def is_uncertain(self) -> bool:
        """Whether nobody can say what other nodes take it for, because the store has not answered yet."""
        return self.in_flight is not None and netgroups_told(self.in_flight) != self.told

    @property
    def is_silent(self) -> bool:
        """Whether it is warm, and nobody may have it before others have heard that it is announced no more."""
        return self.state is AddressState.WARM and self.unheard

    @property
    def is_coming(self) -> bool:
        """Whether it will be offered to anybody: the store, or other nodes, have to hear of it first."""
        return not self.lent and (self.is_silent or (self.dirty and self.state is AddressState.WARM))

    def is_of(self, pool: str) -> bool:
        return self.record is not None and self.record.pool == pool

    def fits(self, netgroups: Collection[str]) -> bool:
        """Whether a container that is in these netgroups may have it: it must not get what it is not in."""
        return self.record is not None and all(name in netgroups for name in self.record.netgroups)


@dataclass(slots=True, eq=False)
class Waiter:
    """An ADD that found no warm address. pool: the only pool it may come from, None for any. netgroups: of the
    container that is to have it."""

    network: str
    family: Family
    pool: str | None
    netgroups: Collection[str] = ()
    granted: asyncio.Future[Held] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def accepts(self, record: Address, family: Family) -> bool:
        return (
            not self.granted.done()
            and record.network == self.network
            and family == self.family
            and self.pool in (None, record.pool)
            and all(name in self.netgroups for name in record.netgroups)
        )

    def is_member_of(self, netgroup: str) -> bool:
        return netgroup in self.netgroups


class Shelf:
    """See the module's docstring. An address that leaves the shelf while it is lent can be put back in
    vain: every call checks that it still is the one that is held.

    may_be_warm: whether an address may be given to whoever comes; others are given back to their pool.
    """

    def __init__(self, may_be_warm: Callable[[Held], bool] = lambda _: True) -> None:
        self._may_be_warm = may_be_warm
        self.held: dict[IPAddress, Held] = {}
        self.spaces: dict[IPNetwork, BlockSpace] = {}
        self._warm: dict[tuple[str, Family, bool], deque[Held]] = defaultdict(deque)
        self._arrived: set[Held] = set()
        self._waiters: deque[Waiter] = deque()
        self._cooling: list[tuple[float, int, Held]] = []
        self._cools: set[tuple[Held, float]] = set()
        self._tie = count()
        self._dirty: dict[IPAddress, Held] = {}
        self._silent: dict[IPAddress, Held] = {}
        self._gone: dict[IPAddress, asyncio.Event] = {}

    # -- what is held

    def add(self, held: Held) -> None:
        self.held[held.ip] = held
        for space in self._spaces_of(held.ip):
            space.remove(held.ip)
        if held.dirty:
            self._dirty[held.ip] = held

    def drop(self, held: Held, *, reusable: bool) -> None:
        """It is not ours any more; ``reusable`` if it is known to be free."""
        if self.held.get(held.ip) is not held:
            return
        del self.held[held.ip]
        self._dirty.pop(held.ip, None)
        self._silent.pop(held.ip, None)
        self._unqueue(held)
        if reusable:
            self.give_back(held.ip)
        self.announce(held.ip)

    def give_back(self, ip: IPAddress) -> None:
        """Nobody holds it any more."""
        for space in self._spaces_of(ip):
            space.give_back(ip, next(self._tie))

    def _spaces_of(self, ip: IPAddress) -> Iterator[BlockSpace]:
        return (space for space in self.spaces.values() if ip in space)

    def want(self, held: Held, record: Address | None) -> None:
        """Something else should stand in the store from now on, or has to be written once more."""
        self._unqueue(held)
        if record is None:
            held.leaving = held.record or held.leaving
        else:
            held.forgotten = False
        held.record = record
        held.dirty = True
        held.ready_at = None
        self._silent.pop(held.ip, None)
        self._dirty.pop(held.ip, None)
        self._dirty[held.ip] = held

    def withdraw(self, held: Held) -> None:
        """A warm address goes back to its pool; by way of cooling if others may take it for a member of something."""
        is_known = held.state is AddressState.WARM and (held.is_announced or held.told or held.unheard)
        if held.record is not None and is_known:
            self.want(held, cooling(held.record))
        else:
            self.want(held, None)

    def renounce(self, held: Held) -> None:
        """An announced address is to be for anybody: when the store says so and others have heard, it is offered."""
        assert held.record is not None, "what is announced has a record"
        self.want(held, held.record.with_(netgroups=[], since=time.time()))

    def confirm(self, held: Held, revision: int, sent: Address | None) -> bool:
        """``sent`` now stands in the store; returns whether that is what should."""
        told, held.told = held.told, netgroups_told(sent)
        held.revision = revision
        held.unheard = held.unheard or not set(told) <= set(held.told)
        if held.record is not sent:
            return False
        held.dirty = False
        self._dirty.pop(held.ip, None)
        return True

    def rest(self, held: Held) -> None:
        """Nothing more is written for it until something else should stand there."""
        held.dirty = False
        self._dirty.pop(held.ip, None)
        self.announce(held.ip)

    def dirty(self) -> list[Held]:
        """The outbox, oldest first."""
        return list(self._dirty.values())

    # -- warm addresses and those who wait for them

    def offer(self, held: Held) -> None:
        """A warm address of which others have heard: for who waits longest, else into the queue."""
        record = held.record
        if record is None or held.lent or self.held.get(held.ip) is not held:
            return
        self.note_heard(held)
        if not self._may_be_warm(held):
            self.withdraw(held)
            return
        queue = self._warm[record.network, held.ip.version, held.is_announced]
        if held in queue:
            return
        waiter = self._next_waiter(record, held.ip.version)
        if waiter is None:
            queue.append(held)
            self._arrived.add(held)
            return
        self._waiters.remove(waiter)
        held.lent = True
        waiter.granted.set_result(held)

    def _next_waiter(self, record: Address, family: Family) -> Waiter | None:
        """Who waits longest; a member leaves a plain one to others while something announced is on its way."""
        able = (w for w in self._waiters if w.accepts(record, family))
        first = next(able, None)
        if first is None or record.netgroups or not first.is_member_of(record.network):
            return first
        other = next((w for w in able if not w.is_member_of(record.network)), None)
        if other is not None and any(
            held.is_coming
            and held.is_announced
            and held.record
            and first.accepts(held.record, held.ip.version)
            for held in self._dirty.values()
        ):
            return other
        return first

    def note_heard(self, held: Held) -> None:
        """Other nodes know what it is a member of; a warm one may be offered."""
        held.unheard, held.ready_at = False, None
        self._silent.pop(held.ip, None)

    def lend(
        self, network: str, family: Family, pool: str | None, netgroups: Collection[str] = ()
    ) -> Held | None:
        """A warm address for a container that is in these netgroups: one that other nodes know already if there is
        one. Of those the one that the store confirmed longest ago, since others hear of it a moment later."""
        for announced in (True, False):
            for held in self._warm[network, family, announced]:
                if (pool is None or held.is_of(pool)) and held.fits(netgroups) and self._may_be_warm(held):
                    return self.lend_this(held)
        return None

    def lend_this(self, held: Held) -> Held:
        self._unqueue(held)
        held.lent = True
        return held

    def put_back(self, held: Held) -> None:
        """An ADD did not use it after all."""
        held.lent = False
        if held.ready_at is not None and not held.dirty:
            self.cool(held, held.ready_at)
        elif held.state is AddressState.WARM and not held.dirty:
            self.offer(held)
        self.announce(held.ip)

    def wait(self, waiter: Waiter) -> None:
        self._waiters.append(waiter)

    def forget_waiter(self, waiter: Waiter) -> None:
        """The waiter gave up; an address it was granted meanwhile goes back."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif waiter.granted.done() and not waiter.granted.cancelled() and not waiter.granted.exception():
            self.put_back(waiter.granted.result())

    def fail_waiters(self, error: MoorageError, waiters: Sequence[Waiter] | None = None) -> None:
        """There is nothing to come for ``waiters``, or for anybody."""
        for waiter in list(self._waiters) if waiters is None else waiters:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)

    def waiters(self, network: str, family: Family) -> list[Waiter]:
        return [w for w in self._waiters if (w.network, w.family) == (network, family)]

    def all_waiters(self) -> list[Waiter]:
        """Who came first is first."""
        return list(self._waiters)

    def ready(self, network: str, family: Family, *, announced: bool) -> Sequence[Held]:
        """The warm addresses of one kind that nobody has, longest unused first."""
        return self._warm.get((network, family, announced), ())

    def warm_count(self, network: str, family: Family) -> int:
        return sum(len(self.ready(network, family, announced=kind)) for kind in (True, False))

    def all_ready(self) -> list[Held]:
        """What of all networks is warm and nobody has."""
        return [held for queue in self._warm.values() for held in queue]

    def leaving(self, pool: str) -> list[Held]:
        """What nobody had and goes back to that pool."""
        return [
            held
            for held in self.held.values()
            if (held.is_of(pool) and held.is_withdrawn)
            or (held.record is None and held.leaving is not None and held.leaving.pool == pool)
        ]

    def coming(self) -> list[Held]:
        """The addresses that will be offered to anybody, of all networks."""
        unconfirmed = [h for h in self._dirty.values() if h.state is AddressState.WARM and not h.lent]
        return unconfirmed + [held for held in self._silent.values() if not held.lent]

    def arrivals(self) -> set[Held]:
        """The warm addresses that were queued since this was called last."""
        arrived, self._arrived = self._arrived, set()
        return arrived

    def _unqueue(self, held: Held) -> None:
        queues = (
            self._warm.values()
            if held.record is None
            else [self._warm[held.record.network, held.ip.version, held.is_announced]]
        )
        for queue in queues:
            if held in queue:
                queue.remove(held)

    # -- cooling

    def cool(self, held: Held, ready_at: float) -> None:
        """The store has confirmed the release, or that it is announced no more; the time until it may be used runs."""
        held.ready_at = ready_at
        if held.state is AddressState.WARM:
            self._silent[held.ip] = held
        # One that was lent before its cooldown was over may or may not have left the heap meanwhile.
        if (held, ready_at) not in self._cools:
            self._cools.add((held, ready_at))
            heapq.heappush(self._cooling, (ready_at, next(self._tie), held))

    def cooled(self, now: float) -> list[Held]:
        """Those whose cooldown is over, or of which others have heard by now; each is returned once."""
        ready = []
        while self._cooling and self._cooling[0][0] <= now:
            at, _, held = heapq.heappop(self._cooling)
            self._cools.discard((held, at))
            # It may have been taken early by its reservation, and released anew, or lost.
            still = self.held.get(held.ip) is held and held.ready_at == at
            if still and held.state in (AddressState.COOLING, AddressState.WARM) and not held.lent:
                ready.append(held)
        return ready

    def next_ready(self) -> float | None:
        """When the next cooldown is over."""
        return self._cooling[0][0] if self._cooling else None

    def on_their_way(self, pools: Collection[str], until: float) -> int:
        """How many addresses of these pools who waits may have before ``until`` (event loop's clock): those that come,
        that go back, and whose cooldown is over by then."""
        count = 0
        for held in self.held.values():
            record = held.record or held.leaving
            if record is None or record.pool not in pools or held.lent or not self._may_be_warm(held):
                continue
            cools = held.state is AddressState.COOLING and held.ready_at is not None and held.ready_at < until
            count += held.record is None or held.is_coming or held.is_withdrawn or cools
        return count

    # -- telling those who wait for one certain address

    def change_of(self, ip: IPAddress) -> asyncio.Event:
        """Set when that address changes hands or state next, or the store has confirmed that it did."""
        return self._gone.setdefault(ip, asyncio.Event())

    def announce(self, ip: IPAddress) -> None:
        event = self._gone.pop(ip, None)
        if event is not None:
            event.set()
