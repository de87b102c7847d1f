"""Large records: no app's labels keep a node from writing, whatever etcd's limit is."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ipam.errors import InvalidInput
from ipam.holder import Owner
from ipam.keys import IPAddress
from ipam.networks import PoolSpec, create_network
from ipam.records import AddressState, Label, Network
from ipam.store import Store, open_store
from netmodules.labels import read_labels
from tests.ipam.faulty import eventually
from tests.ipam.nodes import Node, stored
from tests.ipam.store.etcd_members import Cluster

pytestmark = pytest.mark.etcd

CONTAINERS = 64

SHAPES: dict[str, Callable[[int], list[Label]]] = {
    "empty": lambda count: [Label("")] * count,
    "short": lambda count: [Label("a", "b")] * count,
    "escaped": lambda count: [Label("note", "\x01" * count)],
    "wide": lambda count: [Label("note", "☃" * count)],
}


@pytest.fixture
async def store(etcd_member: Cluster) -> AsyncIterator[Store]:
    """A real etcd with its default limits."""
    opened = await open_store(etcd_member.url(prefix=f"/{uuid.uuid4().hex}"))
    yield opened
    await opened.close()


@pytest.fixture
async def node(tmp_path: Path, store: Store) -> AsyncIterator[Node]:
    made = Node(tmp_path, store)
    await made.start()
    yield made
    await made.crash()


def largest(shape: Callable[[int], list[Label]], most: int = 80_000) -> list[Label]:
    """The largest labels of a shape that an app may have."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        try:
            read_labels(shape(middle))
            least = middle
        except InvalidInput:
            most = middle - 1
    return shape(least)


async def dual_stack(store: Store, node: Node) -> Network:
    """A network of both families, of which the node has heard."""
    pools = [PoolSpec("10.64.0.0/24"), PoolSpec("fd00:64::/64")]
    net = await create_network(store, Network(name="prod", pools=[], warm=2), pools)
    await eventually(lambda: len(list(node.catalogue.pools())) == len(pools))
    return net


async def start(node: Node, net: Network, container: str, labels: list[Label]) -> list[IPAddress]:
    """One container with these labels, which an engine's ADD has passed."""
    lent = await node.take(net)
    rows = node.holder.plan_assign(lent, Owner(container, "eth0", "mesos", labels=tuple(labels)))
    node.journal.save_addresses(rows)
    node.holder.accept(rows)
    return [row.ip for row in rows]


async def assigned(store: Store) -> set[IPAddress]:
    return {ip for ip, record in (await stored(store)).items() if record.state is AddressState.ASSIGNED}


async def test_64_containers_with_all_the_labels_that_are_possible_are_recorded(
    store: Store, node: Node
) -> None:
    net = await dual_stack(store, node)
    kinds = [largest(shape) for shape in SHAPES.values()]
    given = await asyncio.gather(
        *(start(node, net, f"c{n}", kinds[n % len(kinds)]) for n in range(CONTAINERS))
    )
    await eventually(node.is_quiet)
    ips = {ip for each in given for ip in each}
    assert len(ips) == 2 * CONTAINERS
    assert await assigned(store) == ips
    assert node.status()["set_aside"] == []


async def test_a_record_that_etcd_never_takes_costs_no_other_and_is_named(store: Store, node: Node) -> None:
    net = await dual_stack(store, node)
    # No door lets such labels in now. The journal of an earlier version may have them.
    heavy = [Label("note", "x" * 2_000_000)]
    plain = await asyncio.gather(
        *(start(node, net, f"c{n}", heavy if n == 3 else []) for n in range(CONTAINERS // 4))
    )
    await eventually(node.is_quiet)
    ips = {ip for n, each in enumerate(plain) for ip in each if n != 3}
    assert await assigned(store) == ips
    sentences = node.status()["set_aside"]
    assert len(sentences) == 2
    assert all(any(str(ip) in sentence for sentence in sentences) for ip in plain[3])
    node.delete(*plain[3])
    await eventually(lambda: node.is_quiet() and node.status()["set_aside"] == [])
    assert not set(plain[3]) & await assigned(store)


async def test_a_group_that_etcd_calls_too_large_is_halved(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipam.writer.GROUP_BYTES", 64 * 1024 * 1024)
    net = await dual_stack(store, node)
    note = [Label("note", "x" * 60_000)]
    given = await asyncio.gather(*(start(node, net, f"c{n}", note) for n in range(CONTAINERS)))
    await eventually(node.is_quiet)
    assert await assigned(store) == {ip for each in given for ip in each}
