"""The time after a doubt in which nothing new is taken: others assert meanwhile what the store forgot.

It stands in the journal with its boot and that boot's clock: an agent that is restarted within it, as operators do
after a restore, would otherwise find nothing odd and give out what others' containers have.
"""

from __future__ import annotations

import time
from typing import Protocol

import structlog

from ipam.errors import TryAgain

log = structlog.get_logger(__name__)

SECONDS = 30.0
"""Seconds that a grace lasts, unless every node has asserted before what it holds."""


class GraceMemory(Protocol):
    """Where a grace survives a restart; the journal."""

    def load_grace(self) -> tuple[str, float] | None:
        """(boot id, CLOCK_BOOTTIME in seconds when it ends), as saved last."""
        ...

    def save_grace(self, until: float | None) -> None:
        """Of this boot; None forgets it. Raises TryAgain."""
        ...


class Grace:
    """See the module's docstring. why: what it began for, "" if the journal has it from before a restart."""

    def __init__(self, memory: GraceMemory, boot_id: str, at_least: float = 0.0) -> None:
        """at_least: seconds."""
        self._memory = memory
        self._at_least = at_least
        self._until = 0.0
        self.why = ""
        known = memory.load_grace()
        if known is not None:
            # The clock of another boot says nothing: once more the whole time.
            whole = _now() + self.seconds
            self._until = min(known[1], whole) if known[0] == boot_id else whole
            self._save()

    @property
    def seconds(self) -> float:
        """That a whole one lasts."""
        return max(SECONDS, self._at_least)

    @property
    def left(self) -> float:
        """Seconds, 0 if nothing is in doubt."""
        if not self._until:
            return 0.0
        left = self._until - _now()
        if left <= 0:
            self.end()
        return max(left, 0.0)

    def begin(self, why: str, seconds: float | None = None) -> None:
        """From now on nothing new is taken for a while. seconds: less than the whole time."""
        until = _now() + (self.seconds if seconds is None else seconds)
        if until > self._until:
            self.why = why
            self._until = until
            self._save()

    def end(self) -> None:
        """Nothing is in doubt any more."""
        if self._until:
            self._until = 0.0
            self.why = ""
            self._save()

    def _save(self) -> None:
        try:
            self._memory.save_grace(self._until or None)
        except TryAgain as error:
            log.warning("grace is not journalled; a restart within it would forget it", why=str(error))


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
