"""Whether the store is away: for a moment, as between two leaders, or for longer.

    answers --failed()--> hesitates, for GRACE: who finds nothing warm waits, a leader is elected meanwhile
    hesitates --GRACE is over--> away: who waits is refused, and who comes later is refused at once
    hesitates, away --answered()--> answers

The writer reports to it, and the look at the fence of a node that has nothing to write (``unread``, ``read``). Other
reads need not: they are repeated for longer than GRACE before they fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

GRACE = 4.0
"""Seconds after a first failure in which the store may only be between two leaders: an election takes 1 to 2 s
with etcd's defaults, and twice that when the votes are split."""


class Outage:
    """See the module's docstring. on_away: told why, once an outage.

    why: what went wrong last; "" while the store answers. away: the grace is over.
    """

    def __init__(self, on_away: Callable[[str], None] = lambda _: None) -> None:
        self._on_away = on_away
        self._grace: asyncio.TimerHandle | None = None
        self._failed = ""
        self._unread = ""
        self.away = False

    @property
    def why(self) -> str:
        return self._failed or self._unread

    def failed(self, why: str) -> None:
        """A transaction was sent and not answered."""
        self._failed = why
        self._begin_grace()

    def answered(self) -> None:
        """The store said something to a transaction, whatever it was."""
        self._failed = self._unread = ""
        self._end()

    def unread(self, why: str) -> None:
        """A read was not answered."""
        self._unread = why
        self._begin_grace()

    def read(self) -> None:
        """A read was answered. A store that takes no writes may still answer those, so what failed stays."""
        self._unread = ""
        if not self._failed:
            self._end()

    def _begin_grace(self) -> None:
        if self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(GRACE, self._end_grace)

    def _end(self) -> None:
        self.away = False
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _end_grace(self) -> None:
        self.away = True
        self._on_away(self.why)
