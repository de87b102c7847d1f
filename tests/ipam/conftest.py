from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ipam import holder, outage, upkeep, writer
from ipam.store import Store, open_store
from tests.ipam.faulty import FaultyStore
from tests.ipam.nodes import Node, Nodes
from tests.ipam.store.etcd_members import Cluster


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "GRACE", 0.1)
    monkeypatch.setattr(writer, "RETRY_AT_MOST", 0.01)
    monkeypatch.setattr(writer, "CLAIM_RETRY", 0.001)
    monkeypatch.setattr(holder, "SYNC_RETRY", 0.02)
    monkeypatch.setattr(upkeep, "JOURNAL_RETRY", 0.02)
    monkeypatch.setattr(upkeep, "RETURN_RETRY", 0.05)


@pytest.fixture(scope="session")
def etcd_member() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
def store_url(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Makes the URL of an empty store: a file in the given directory, or a prefix of a real etcd."""
    if request.param == "sqlite":
        return lambda directory: f"sqlite://{directory}/store.db"
    cluster: Cluster = request.getfixturevalue("etcd_member")
    return lambda _: cluster.url(prefix=f"/{uuid.uuid4().hex}")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(f"sqlite://{tmp_path}/store.db")
    yield opened
    await opened.close()


@pytest.fixture
def faulty(store: Store) -> FaultyStore:
    return FaultyStore(store)


@pytest.fixture
async def new_node(tmp_path: Path, faulty: FaultyStore) -> AsyncIterator[Callable[..., Node]]:
    """Makes nodes on the faulty store, not started; what they left running is ended."""
    made: list[Node] = []

    def make(name: str = "n1", **options: object) -> Node:
        made.append(Node(tmp_path, options.pop("store", faulty), name, **options))
        return made[-1]

    yield make
    for node in made:
        if hasattr(node, "journal"):
            await node.crash()


@pytest.fixture
async def node(new_node: Callable[..., Node]) -> Node:
    """A node that is not started."""
    return new_node()


@pytest.fixture
async def nodes(tmp_path: Path, store: Store) -> AsyncIterator[Nodes]:
    """Starts nodes n1, n2, … that are alive and answer each other."""
    made: list[Node] = []

    async def start(count: int, **options: object) -> list[Node]:
        for i in range(count):
            made.append(Node(tmp_path, store, f"n{i + 1}", **options))
            await made[-1].start()
            await made[-1].join()
        return made

    yield start
    for node in made:
        await node.crash()
