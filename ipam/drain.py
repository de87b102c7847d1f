"""Draining: a node stops taking addresses, and says so in the store once none is ready on it any more.

    undrained --begin--> draining: ADD is refused, warm addresses are freed, empty blocks go back
    draining --nothing warm, lent or unwritten--> confirmed: nodes/<name> says ``drained``
    confirmed --withdraw--> draining, not confirmed again --the store says so too--end--> undrained

A warm address of an agent that does not answer may be in use: the agent lends it first and tells the store
later. Of a drained node that cannot be, so `moorage node remove` may free what is warm there. For the same
reason the record is withdrawn before the first address is taken again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from ipam.errors import MoorageError, TryAgain
from ipam.holdings import Holdings
from ipam.records import AddressState

LOOK = 0.01
"""Seconds between looks at what is left, while somebody waits for the answer."""


class Drain:
    """See the module's docstring. fail_waiters: told the error for every ADD that waits for an address."""

    def __init__(self, holdings: Holdings, fail_waiters: Callable[[MoorageError], None]) -> None:
        self._holdings = holdings
        self._fail_waiters = fail_waiters
        self._confirmed = False
        self._withdrawn = False
        """An operator has undone the drain, or is about to; what the store says of before counts no more."""

    @property
    def is_on(self) -> bool:
        """Whether this node takes no address; the journal remembers it."""
        return self._holdings.drained

    @property
    def confirmed(self) -> bool:
        """Whether others may take what is warm here for unused. Stays so until it is withdrawn."""
        if self.is_on and not self._withdrawn and not self._confirmed:
            self._confirmed = self._nothing_ready()
        return self._confirmed

    def begin(self) -> None:
        """Take nothing from now on. Raises JournalUnwritable, and then nothing changed."""
        self._withdrawn = False
        if self._holdings.drained:
            return
        self._holdings.journal.save_drained(True)
        self._holdings.drained = self._holdings.reconsider = True
        self._fail_waiters(refusal(self._holdings.node))
        self._holdings.wake.set()

    def remember(self) -> None:
        """The store says that the node is drained, and the journal may have been lost. Raises JournalUnwritable."""
        if not self._withdrawn and not self._holdings.drained:
            self.begin()

    def withdraw(self) -> None:
        """The store's record is to say that the node is not drained; nothing is taken yet."""
        self._withdrawn = True
        self._confirmed = False

    def end(self) -> None:
        """Take addresses again; the store's record says so already. Raises JournalUnwritable."""
        self._holdings.journal.save_drained(False)
        self._holdings.drained = self._confirmed = False
        self._holdings.wake.set()

    async def settle(self, patience: float) -> None:
        """Wait up to ``patience`` seconds until nothing is ready here and the empty blocks are returned."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while True:
                    if self.confirmed and not self._idle_blocks():
                        return
                    await asyncio.sleep(LOOK)

    def report(self) -> dict[str, Any]:
        """What an intent is answered with.

        {"done", "drained", "blocks": how many, "left": [{"network", "family", "state", "count"}]}
        """
        counts: Counter[tuple[str, int, str]] = Counter()
        for ip, held in self._holdings.shelf.held.items():
            if held.record is not None and not held.is_asked_for:
                counts[held.record.network, ip.version, held.record.use] += 1
        return {
            "done": self.confirmed or not self.is_on,
            "drained": self.is_on,
            "blocks": len(self._holdings.blocks),
            "left": [
                {"network": network, "family": family, "state": state, "count": count}
                for (network, family, state), count in sorted(counts.items())
            ],
        }

    def _nothing_ready(self) -> bool:
        """In sync, and of what is held here all that is in use is known to the store to be in use."""
        if self._holdings.problem:
            return False
        return not any(
            held.lent
            or held.record is None
            or held.state is AddressState.WARM
            or held.is_withdrawn
            or (held.dirty and held.record.state.is_taken)
            for held in self._holdings.shelf.held.values()
        )

    def _idle_blocks(self) -> bool:
        return any(space.is_idle for space in self._holdings.shelf.spaces.values())


def refusal(node: str) -> TryAgain:
    """Why an ADD gets no address on a drained node."""
    return TryAgain(
        f"node {node} is drained and gives out no address; start the container on another node, "
        f"or end the drain with `moorage node drain {node} --undo`"
    )
