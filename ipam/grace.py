"""The time after a doubt in which nothing new is taken: others assert meanwhile what the store forgot.

It stands in the journal with its boot and that boot's clock: an agent that is restarted within it, as operators do
after a restore, would otherwise find nothing odd and give out what others' containers have.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import msgspec
import structlog

from ipam.boottime import boottime
from ipam.errors import TryAgain

log = structlog.get_logger(__name__)

SECONDS = 30.0
"""Seconds that a grace lasts, unless every node has asserted before what it holds."""


class Kept(msgspec.Struct, frozen=True):
    """A grace as it is remembered. until: CLOCK_BOOTTIME of the boot, seconds. why, awaited: as in Grace."""

    boot_id: str
    until: float
    why: str
    awaited: list[str] | None


class GraceMemory(Protocol):
    """Where a grace survives a restart; the journal."""

    def load_grace(self) -> bytes | None: ...

    def save_grace(self, kept: bytes | None) -> None:
        """None forgets it. Raises TryAgain."""
        ...


class Grace:
    """See the module's docstring.

    why: what it began for. awaited: the nodes that have to assert what they hold before it may end sooner; None if it
    may not.
    """

    def __init__(self, memory: GraceMemory, boot_id: str, at_least: float = 0.0) -> None:
        """at_least: seconds."""
        self._memory = memory
        self._boot_id = boot_id
        self._at_least = at_least
        self._until = 0.0
        self.why = ""
        self.awaited: frozenset[str] | None = None
        self._load()

    def _load(self) -> None:
        raw = self._memory.load_grace()
        if raw is None:
            return
        whole = _now() + self.seconds
        try:
            kept = msgspec.json.decode(raw, type=Kept)
        except msgspec.MsgspecError as error:
            log.warning("grace in the journal cannot be read; it begins anew", why=str(error))
            self._until = whole
        else:
            # The clock of another boot says nothing: once more the whole time.
            self._until = min(kept.until, whole) if kept.boot_id == self._boot_id else whole
            self.why = kept.why
            self.awaited = None if kept.awaited is None else frozenset(kept.awaited)
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

    def begin(self, why: str, awaited: Collection[str]) -> None:
        """From now on nothing new is taken, until all of these nodes have asserted what they hold, or time is over."""
        self.why, self.awaited = why, frozenset(awaited)
        self._until = _now() + self.seconds
        self._save()

    def pause(self, why: str, seconds: float) -> None:
        """Nothing new is taken for so long; others may have reason to doubt."""
        if _now() + seconds > self._until:
            self.why, self.awaited = why, None
            self._until = _now() + seconds
            self._save()

    def end(self) -> None:
        """Nothing is in doubt any more."""
        if self._until:
            self._until = 0.0
            self.why, self.awaited = "", None
            self._save()

    def _save(self) -> None:
        awaited = None if self.awaited is None else sorted(self.awaited)
        kept = Kept(self._boot_id, self._until, self.why, awaited)
        try:
            self._memory.save_grace(msgspec.json.encode(kept) if self._until else None)
        except TryAgain as error:
            log.warning("grace is not journalled; a restart within it would forget it", why=str(error))


def _now() -> float:
    return boottime() / 1e9
