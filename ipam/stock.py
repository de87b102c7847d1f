"""The stock: for whom the warm addresses of a network lie ready on this node.

    announced   its record names the network's own netgroup, and other nodes take it for a member of that already. So
                a container that gets it is known to them before it starts, also while the store is away. It is lent
                to members of that netgroup only: to others it would give what they are not in.
    plain       a member of nothing until its assignment stands in the store. For everybody, members of other
                netgroups have no choice.

Both together are what the network keeps warm; how much of it is plain follows from who came of late. Other nodes hear
of an announced address a moment after the store. So those are lent first that the store confirmed longest ago, and
while many come more lie ready, that each lies long enough. Why it is so, and what it weakens:
docs/decisions/warm-addresses-are-announced.md. Nothing here waits, reads or writes anything.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection

from ipam.keys import Family
from ipam.shelf import Shelf

RECENT = 16
"""ADDs of a network by which the stock is divided."""

ONE_IN = 8
"""Of so many warm addresses one is plain where nobody came for it yet, so that the first who does need not wait."""


HEARD_WITHIN = 1.0
"""Seconds from the store's confirmation until every node that is in touch with it has heard, and told its kernel. They
gather changes for 0.05 s; the rest is for busy machines."""

HIGH_WATER = 2
"""So many times what a network keeps warm may lie ready: after this a cooled address is freed."""

_KINDS = _ANNOUNCED, _PLAIN = True, False


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

    def most(self, network: str, warm: int, *, announced: bool) -> int:
        """How many of a kind may lie ready: never fewer than are asked for, which would be freed and asked for anew."""
        share = self.share(network, warm, announced=announced)
        return max(HIGH_WATER * share, self.share(network, HIGH_WATER * warm, announced=announced))

    def _plain(self, network: str, warm: int) -> int:
        recent = self._recent.get(network)
        if recent is None:
            return warm // ONE_IN
        if warm == 1:
            return int(not recent[-1])
        plain = round(warm * recent.count(False) / len(recent))
        return max(plain, warm // ONE_IN)

    def missing(self, network: str, family: Family, warm: int, times: int = 1) -> tuple[int, int]:
        """How many addresses are to be asked for, and how many of those for who waits. times: so often ``warm`` of both
        kinds may lie ready."""
        return (
            sum(max(self._short(network, family, warm, kind, times), 0) for kind in _KINDS),
            sum(max(self._short(network, family, 0, kind), 0) for kind in _KINDS),
        )

    def waits_for_plain(self, network: str, family: Family) -> int:
        """For how many who wait an announced address is none, and nothing else is on its way."""
        return max(self._short(network, family, 0, _PLAIN), 0)

    def announcements(
        self, network: str, family: Family, warm: int, count: int, times: int = 1
    ) -> list[tuple[str, ...]]:
        """What the next ``count`` addresses that are asked for are announced as; () leaves one plain. Who waits comes
        first."""
        waiting = {kind: self._short(network, family, 0, kind) for kind in _KINDS}
        ready = {kind: self._short(network, family, warm, kind, times) for kind in _KINDS}
        found: list[tuple[str, ...]] = []
        for _ in range(count):
            short = waiting if max(waiting.values()) > 0 else ready
            kind = max(_KINDS, key=short.__getitem__)
            waiting[kind] -= 1
            ready[kind] -= 1
            found.append((network,) if kind is _ANNOUNCED else ())
        return found

    def _short(self, network: str, family: Family, warm: int, announced: bool, times: int = 1) -> int:
        """Of one kind: who waits, and what may lie ready, without what is there or on its way."""
        waiting = sum(1 for w in self._shelf.waiters(network, family) if w.is_member_of(network) is announced)
        have = self._shelf.warm_count(network, family, announced) + self._shelf.coming(
            network, family, announced
        )
        return waiting + times * self.share(network, warm, announced=announced) - have
