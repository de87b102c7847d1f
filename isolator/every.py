"""Work that is due at fixed times, however often its loop is woken for something else."""

from __future__ import annotations

import asyncio


class Every:
    """Due every so many seconds; a wait for something else ends no later than that. In a running event loop.

    A timeout that begins anew with each event never comes where events come often enough.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = asyncio.get_running_loop().time() + seconds

    def left(self) -> float:
        """Seconds until it is due, at least 0."""
        return max(0.0, self._at - asyncio.get_running_loop().time())

    def is_due(self) -> bool:
        """Whether it is due; if so, it is due again after another turn."""
        if self.left():
            return False
        self._at = asyncio.get_running_loop().time() + self._seconds
        return True
