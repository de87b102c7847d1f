"""The stock: for whom the warm addresses of a network lie ready on this node.

    announced   its record names the network's own netgroup, and other nodes take it for a member of that already. So
                a container that gets it is known to them before it starts, also while the store is away. It is lent
                to members of that netgroup only: to others it would give what they are not in.
    plain       a member of nothing until its assignment stands in the store. For everybody, members of other
                netgroups have no choice. An announced one becomes plain in place where only that helps; then it is
                lent once others have heard.

Both together are what the network keeps warm; how much of it is plain follows from who came of late. Other nodes hear
of an announced address a moment after the store. So those are lent first that the store confirmed longest ago, and
while many come more lie ready, that each lies long enough. Why it is so, and what it weakens:
docs/decisions/warm-addresses-are-announced.md. Nothing here waits, reads or writes anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ipam.keys import Family
from ipam.shelf import Held, Shelf, Waiter

RECENT = 16
"""ADDs of a network by which the stock is divided."""

ONE_IN = 8
"""Of so many warm addresses one is plain where nobody came for it yet, so that the first who does need not wait."""


HEARD_WITHIN = 1.0
"""Seconds from the store's confirmation until every node that is in touch with it has heard, and told its kernel. They
gather changes for 0.05 s; the rest is for busy machines."""

HIGH_WATER = 2
"""So many times what a network keeps warm may lie ready, of both kinds together. What comes beyond is given back."""

_KINDS = _ANNOUNCED, _PLAIN = True, False


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one network and family. unserved: who waits and for whom nothing is on its way, in the order they came.
    ready: how many more of each kind are to lie ready; of kinds where there are enough, 0 or less. spare: how many lie
    ready, or will, that nobody waits for."""

    unserved: list[Waiter]
    ready: dict[bool, int]
    spare: int

    def kinds(self) -> list[bool]:
        """What to ask for so that enough lie ready, one by one, most missing first: whether it is announced."""
        found: list[bool] = []
        if self.ready[_ANNOUNCED] <= 0 and self.ready[_PLAIN] <= 0:
            return found
        left = {kind: count for kind, count in self.ready.items() if count > 0}
        while left:
            kind = max(left, key=lambda kind: (left[kind], kind))
            found.append(kind)
            left[kind] -= 1
            if not left[kind]:
                del left[kind]
        return found


class Tally:
    """What is on its way, and who waits, by network, family, pool and kind: counted in one pass over the outbox. Good
    for as long as one group of writes is gathered; what is asked for meanwhile is told by ``expect``."""

    def __init__(self, shelf: Shelf, stock: Stock) -> None:
        self._shelf = shelf
        self._stock = stock
        self._coming: defaultdict[tuple[str, Family], Counter[tuple[str, bool]]] = defaultdict(Counter)
        self._waiters: defaultdict[tuple[str, Family], list[Waiter]] = defaultdict(list)
        for held in shelf.coming():
            if held.record is not None:
                self.expect(
                    held.record.network, held.ip.version, held.record.pool, announced=held.is_announced
                )
        for waiter in shelf.all_waiters():
            self._waiters[waiter.network, waiter.family].append(waiter)

    def expect(self, network: str, family: Family, pool: str, *, announced: bool) -> None:
        """One more is on its way."""
        self._coming[network, family][pool, announced] += 1

    def needs(self, network: str, family: Family, warm: int, times: int = 1) -> Needs:
        """What is missing for who waits, and so that ``times`` the shares of ``warm`` lie ready."""
        plain = self._stock.share(network, warm, announced=False) if warm else 0
        have = {kind: len(self._shelf.ready(network, family, announced=kind)) for kind in _KINDS}
        waiters = self._waiters.get((network, family))
        coming = self._coming.get((network, family))
        unserved: list[Waiter] = []
        if waiters or coming:
            left = Counter(coming)
            unserved = _unserved(waiters or [], left, network)
            for (_, kind), count in left.items():
                have[kind] += count
        ready = {_ANNOUNCED: times * (warm - plain) - have[_ANNOUNCED], _PLAIN: times * plain - have[_PLAIN]}
        return Needs(unserved, ready, have[_ANNOUNCED] + have[_PLAIN])

    def waiters(self, network: str, family: Family) -> list[Waiter]:
        """Who waits, in the order they came."""
        return self._waiters.get((network, family), [])


def _unserved(waiters: Sequence[Waiter], left: Counter[tuple[str, bool]], network: str) -> list[Waiter]:
    """The waiters for whom nothing is on its way. left: what is, by pool and kind; what somebody will get is taken off.

    Who can have one pool only chooses before who can have any; else who came first does. A member leaves what is plain
    to others while there is something announced for it; so does Shelf.offer.
    """
    unserved: set[Waiter] = set()
    for waiter in sorted(waiters, key=lambda w: w.pool is None):
        kinds = _KINDS if waiter.is_member_of(network) else (_PLAIN,)
        fitting = (
            (pool, kind)
            for kind in kinds
            for pool, k in left
            if k is kind and waiter.pool in (None, pool) and left[pool, k] > 0
        )
        found = next(fitting, None)
        if found is None:
            unserved.add(waiter)
        else:
            left[found] -= 1
    return [waiter for waiter in waiters if waiter in unserved]


class Stock:
    """See the module's docstring. now: seconds; goes on evenly."""

    def __init__(self, shelf: Shelf, now: Callable[[], float]) -> None:
        self._shelf = shelf
        self._now = now
        self._came: defaultdict[str, deque[float]] = defaultdict(deque)
        self._recent: defaultdict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=RECENT))

    def note(self, network: str, netgroups: Collection[str]) -> None:
        """A container of the network came that is in these netgroups; () stands for the network's own."""
        self._recent[network].append(not netgroups or network in netgroups)

    def note_add(self, network: str, netgroups: Collection[str]) -> None:
        """The same, just now."""
        self.note(network, netgroups)
        self._came[network].append(self._now())

    def wanted(self, network: str, warm: int) -> int:
        """How many are to lie ready of a network that keeps ``warm`` ones: as many as came within HEARD_WITHIN."""
        came = self._came.get(network)
        while came and came[0] < self._now() - HEARD_WITHIN:
            came.popleft()
        return min(max(warm, len(came or ())), HIGH_WATER * warm)

    def share(self, network: str, warm: int, *, announced: bool) -> int:
        """How many of the ``warm`` addresses that the network keeps ready are to be announced, or plain."""
        plain = self._plain(network, warm)
        return warm - plain if announced else plain

    def tally(self) -> Tally:
        """What is on its way, and who waits, as of now."""
        return Tally(self._shelf, self)

    def surplus(self, network: str, family: Family, warm: int) -> list[Held]:
        """What lies ready beyond the high-water mark, of the kind that there is most too much of, last come first."""
        ready = {kind: list(self._shelf.ready(network, family, announced=kind)) for kind in _KINDS}
        wanted = self.wanted(network, warm)
        shares = {kind: self.share(network, wanted, announced=kind) for kind in _KINDS}
        found: list[Held] = []
        while sum(map(len, ready.values())) > HIGH_WATER * warm:
            kind = max(_KINDS, key=lambda kind: len(ready[kind]) - shares[kind])
            found.append(ready[kind].pop())
        return found

    def _plain(self, network: str, warm: int) -> int:
        recent = self._recent.get(network)
        if recent is None:
            return warm // ONE_IN
        if warm == 1:
            return int(not recent[-1])
        plain = round(warm * recent.count(False) / len(recent))
        return max(plain, warm // ONE_IN)
