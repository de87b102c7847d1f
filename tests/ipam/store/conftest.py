"""The store implementations under test. The contract suite runs once for each of BACKENDS."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ipam.store import Store, open_store
from ipam.store import sqlite_mvcc as mvcc
from ipam.store.sqlite_file import Database

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Backend:
    """One empty store of one implementation, to be opened any number of times.

    shortest_ttl: the shortest lease it keeps to, seconds.
    compact: forget all revisions before the given one.
    """

    url: str
    shortest_ttl: float
    compact: Callable[[int], Awaitable[None]]
    opened: list[Store] = field(default_factory=list)

    async def open(self) -> Store:
        store = await open_store(self.url)
        self.opened.append(store)
        return store


@contextlib.asynccontextmanager
async def sqlite_backend(directory: Path) -> AsyncIterator[Backend]:
    path = directory / "moorage" / "store.db"

    async def compact(revision: int) -> None:
        with contextlib.closing(Database(path)) as database, database.writing() as db:
            mvcc.compact(db, revision)

    yield Backend(f"sqlite://{path}", shortest_ttl=0.3, compact=compact)


BACKENDS: dict[str, Callable[[Path], AbstractAsyncContextManager[Backend]]] = {"sqlite": sqlite_backend}


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    async with BACKENDS[request.param](tmp_path) as backend:
        yield backend
        for store in backend.opened:
            await store.close()


@pytest.fixture
async def store(backend: Backend) -> Store:
    return await backend.open()


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start worker.py as another process: ``spawn(url, command, *arguments)``; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), url, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
