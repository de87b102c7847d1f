"""Long-lived tasks, none of which may end unseen.

    supervision = Supervision()
    supervision.start("limits", self._keep_limits)      runs it until it is cancelled, whatever it raises
    supervision.failing()                               a sentence for each that failed and does not work again yet

    runs --raises, or returns--> logged once, told by ``failing``, tried again after a pause that doubles
         <-- has run for longer than it did before it failed, or for 60 s: works again, logged

What a task starts and awaits itself is part of it: what that raises, the task raises. A thread of our own is waited for
by a task, for the same reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from ipam.errors import MoorageError

log = structlog.get_logger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a task that failed is tried again: after the first failure, and at most."""

LONGER, WORKS_AT_LATEST = 1.0, 60.0
"""Seconds that a task has to run before it counts as working again: so much longer than it ran before it failed, to
have got past what it failed at, and at most."""

Job = Callable[[], Awaitable[None]]


class _Failure:
    """Of a task that does not work again yet. ran: seconds, before it failed last. timer: set while it runs again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.why = ""
        self.pause = 0.0
        self.ran = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def again(self, why: str, ran: float, longest: float) -> None:
        self._count += 1
        self.why, self.ran = why, ran
        self.pause = min(self.pause * 2 or FIRST_PAUSE, longest)

    def __str__(self) -> str:
        times = "once" if self._count == 1 else f"{self._count} times"
        return (
            f"the agent's task {self._name} failed {times} since {self._since}, last with: {self.why}; it is tried "
            f"again {self.pause:g} s after that, and docs/runbook.md says what stands still meanwhile"
        )


class Supervision:
    """See the module's docstring. On one event loop."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failure] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def failing(self) -> list[str]:
        """Sentences about tasks that failed and do not work again yet."""
        return [str(failure) for _, failure in sorted(self._failures.items())]

    def start(
        self, name: str, job: Job, *, longest: float = LONGEST_PAUSE, ends: bool = False
    ) -> asyncio.Task[None]:
        """``keep`` as a task of that name."""
        task = asyncio.create_task(self.keep(name, job, longest=longest, ends=ends), name=name)
        self._tasks.add(task)  # the event loop would not keep it alive
        task.add_done_callback(self._tasks.discard)
        return task

    async def keep(self, name: str, job: Job, *, longest: float = LONGEST_PAUSE, ends: bool = False) -> None:
        """Run it until cancelled. longest: seconds between tries at most. ends: when it returns, it is over."""
        loop = asyncio.get_running_loop()
        pause = 0.0
        try:
            while True:
                began = loop.time() + pause
                try:
                    await asyncio.sleep(pause)
                    self._hope(name)
                    await job()
                    if ends:
                        return
                    error: BaseException = RuntimeError("it returned, which it never should")
                except asyncio.CancelledError as cancelled:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    error = cancelled  # somebody cancelled what it waits for, not it
                except Exception as raised:
                    error = raised
                pause = self._failed(name, error, max(0.0, loop.time() - began), longest)
        finally:
            if (failure := self._failures.pop(name, None)) and failure.timer:
                failure.timer.cancel()

    def _hope(self, name: str) -> None:
        """It runs: if it does for long enough, it works again."""
        if failure := self._failures.get(name):
            wait = min(failure.ran + LONGER, WORKS_AT_LATEST)
            failure.timer = asyncio.get_running_loop().call_later(wait, self._works, name)

    def _works(self, name: str) -> None:
        del self._failures[name]
        log.info("task works again", task=name)

    def _failed(self, name: str, error: BaseException, ran: float, longest: float) -> float:
        """Say it, if it was not said yet; returns the seconds until it is to be tried again."""
        failure = self._failures.setdefault(name, _Failure(name))
        if failure.timer:
            failure.timer.cancel()
        why = _sentence(error)
        if why != failure.why:
            bug = None if isinstance(error, (MoorageError, OSError)) else error
            log.warning("task failed; it is tried again", task=name, why=why, exc_info=bug)
        failure.again(why, ran, longest)
        return failure.pause


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, (MoorageError, OSError)) and str(error) else repr(error)
