"""Whether the store is away: for a moment, as between two leaders, or for longer.

    answers --failed()--> hesitates, for GRACE: who finds nothing warm waits, a leader is elected meanwhile
    hesitates --GRACE is over--> away: who waits is refused, and who comes later is refused at once
    hesitates, away --answered()--> answers

The writer reports to it. Reads need not: they are repeated for longer than GRACE before they fail.
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
        self.why = ""
        self.away = False

    def failed(self, why: str) -> None:
        """Something was sent and not answered."""
        self.why = why
        if self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(GRACE, self._end_grace)

    def answered(self) -> None:
        """The store said something, whatever it was."""
        self.why = ""
        self.away = False
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _end_grace(self) -> None:
        self.away = True
        self._on_away(self.why)
