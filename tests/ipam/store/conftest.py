"""The store implementations under test. The contract suite runs once for each of BACKENDS."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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
from tests.ipam.store.etcd_members import Cluster

ROOT = Path(__file__).parents[3]
KEPT = 3
"""Leases that have to be kept alive are so many times longer than the shortest: a machine may stand still meanwhile."""
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Backend:
    """One empty store of one implementation, to be opened any number of times.

    shortest_ttl: the shortest lease it keeps to, seconds.
    compact: forget all revisions before the given one.
    margin: how many revisions later than the oldest one that can be read a watch can start.
    """

    url: str
    shortest_ttl: float
    compact: Callable[[int], Awaitable[None]]
    margin: int = 0
    opened: list[Store] = field(default_factory=list)

    async def open(self) -> Store:
        store = await open_store(self.url)
        self.opened.append(store)
        return store


@contextlib.asynccontextmanager
async def sqlite_backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    path: Path = request.getfixturevalue("tmp_path") / "moorage" / "store.db"

    async def compact(revision: int) -> None:
        with contextlib.closing(Database(path)) as database, database.writing() as db:
            mvcc.compact(db, revision)

    yield Backend(f"sqlite://{path}", shortest_ttl=1, compact=compact)


@pytest.fixture(scope="session")
def etcd() -> Iterator[Cluster]:
    """One etcd for all tests of a session; each test has a prefix of its own."""
    with Cluster() as cluster:
        yield cluster


prefixes = itertools.count()


@contextlib.asynccontextmanager
async def etcd_backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    cluster: Cluster = request.getfixturevalue("etcd")

    async def compact(revision: int) -> None:
        await asyncio.to_thread(cluster.ctl, "compact", "--physical", str(revision))

    yield Backend(cluster.url(prefix=f"/test{next(prefixes)}"), shortest_ttl=1, compact=compact, margin=1)


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Backend]]] = {
    "sqlite": sqlite_backend,
    "etcd": etcd_backend,
}
MARKS = {"etcd": [pytest.mark.etcd]}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    async with BACKENDS[request.param](request) as backend:
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
