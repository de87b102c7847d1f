"""An agent whose tasks can be made to raise, by name, in whatever they wait for: ``CONTROL=SOCKET python
raising_agent.py agent --node ...``. No product code knows of it; any task of the event loop can be named.

Over the socket: ``list\\n`` -> JSON, [[name, seconds since it began], ...] of tasks, those without a name by their
coroutine's, and of all threads but the main one; ``raise NAME\\n`` -> how many tasks of that name there were.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import runpy
import threading
import time
from collections.abc import Coroutine, Generator
from typing import Any

from ipam.store import sqlite_file
from moorage import agent

MADE = "made to raise"

PULSE = "moorage-store-pulse"
"""A thread with work of its own."""


class Raising(Coroutine[Any, Any, Any]):
    """A coroutine that raises RuntimeError where it waits, when its task is cancelled with ``trip`` set."""

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self._inner = inner
        self.__qualname__ = str(getattr(inner, "__qualname__", inner))
        self.trip = False
        self.born = time.monotonic()

    def send(self, value: Any) -> Any:
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        if self.trip:
            self.trip = False
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return self._inner.throw(RuntimeError(MADE))
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


def name_of(task: asyncio.Task[Any], coroutine: Raising) -> str:
    name = task.get_name()
    return coroutine.__qualname__ if re.fullmatch(r"Task-\d+", name) else name


class Control:
    """What the test says."""

    def __init__(self) -> None:
        self.pulse_raises = False

    def listed(self) -> list[tuple[str, float]]:
        now = time.monotonic()
        found = [(name_of(task, coroutine), now - coroutine.born) for task, coroutine in self._tasks()]
        mine = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
        return found + [(name, now) for name in mine]

    def make_raise(self, name: str) -> int:
        threads = [one.ident for one in threading.enumerate() if one.name == name != PULSE]
        for ident in threads:
            error = ctypes.py_object(RuntimeError)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident or 0), error)
        if threads:
            return len(threads)
        if name == PULSE:
            self.pulse_raises = True
            return 1
        chosen = [(task, coroutine) for task, coroutine in self._tasks() if name_of(task, coroutine) == name]
        for task, coroutine in chosen:
            coroutine.trip = True
            task.cancel()
        return len(chosen)

    @staticmethod
    def _tasks() -> list[tuple[asyncio.Task[Any], Raising]]:
        found = [(task, task.get_coro()) for task in asyncio.all_tasks() if not task.done()]
        return [(task, coroutine) for task, coroutine in found if isinstance(coroutine, Raising)]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word, _, name = (await reader.readline()).decode().strip().partition(" ")
        said: Any = self.listed() if word == "list" else self.make_raise(name)
        writer.write(json.dumps(said).encode() + b"\n")
        await writer.drain()
        writer.close()


def main() -> None:
    control = Control()
    serve, changed = agent._serve, sqlite_file.Database.changed

    async def serving(*arguments: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, coroutine: asyncio.Task(Raising(coroutine), loop=loop))
        server = await asyncio.start_unix_server(control.answer, os.environ["CONTROL"])
        async with server:
            await serve(*arguments)

    def raises(database: sqlite_file.Database) -> bool:
        if control.pulse_raises:
            control.pulse_raises = False
            raise RuntimeError(MADE)
        return changed(database)

    agent._serve = serving
    sqlite_file.Database.changed = raises
    runpy.run_module("moorage", run_name="__main__")


if __name__ == "__main__":
    main()
