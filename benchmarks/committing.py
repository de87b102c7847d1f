"""The process behind ``commits``: ``python -m benchmarks.committing WHAT URL DIRECTORY REPEATS``, on an empty store.

It prints JSON. WHAT is ``loads``: rates per second by kind of load, which take turns in every repeat; or
``bursts``: what came of each. Journals are made in DIRECTORY. It runs where it can reach etcd, and drives IPAM
itself, without agents: a commit is an allocation or a release whose caller's await returned after etcd's reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from ipam.holder import COOLDOWN
from ipam.networks import PoolSpec, create_network
from ipam.records import Address, AddressState, Network
from ipam.store import Put, Store, Txn, open_store
from moorage.lab.simulated import SimulatedNode, burst

CALLERS = 64
MEASURED = 1.0
"""Seconds of each load."""

WARM = 4 * CALLERS
"""So that an allocation is an assignment, as it is on a node that is not short of addresses."""

NODES, EACH = 100, 5

Step = Callable[[], Awaitable[int]]
"""One turn of a caller; how much it completed."""


async def loads(url: str, directory: Path, repeats: int) -> dict[str, list[float]]:
    """Completed per second, by kind of load; the first turn warms up."""
    rates: defaultdict[str, list[float]] = defaultdict(list)
    async with _opened(url) as store, _node(store, directory) as (node, network):
        for number in range(1 + repeats):
            for name, step, callers in (
                ("put", _putting(store), 1),
                ("put, many", _putting(store), CALLERS),
                ("commit", _committing(node, network), 1),
                ("commit, many", _committing(node, network), CALLERS),
            ):
                rate = await _rate(step, callers)
                if number:
                    rates[name].append(rate)
    return rates


async def bursts(url: str, directory: Path, repeats: int) -> list[dict[str, float]]:
    """Each time: seconds, transactions, and duplicates, which there must not be."""
    return [await _burst(url, directory, number) for number in range(repeats)]


async def _rate(step: Step, callers: int) -> float:
    """What ``callers`` completed per second, each one step after the other."""
    begun = time.perf_counter()

    async def call() -> int:
        completed = 0
        while time.perf_counter() < begun + MEASURED:
            completed += await step()
        return completed

    completed = sum(await asyncio.gather(*(call() for _ in range(callers))))
    return completed / (time.perf_counter() - begun)


def _putting(store: Store) -> Step:
    """Puts of keys of their own, each as large as an address's record."""
    value = Address(
        pool="10.64.0.0-12", state=AddressState.WARM, node="n1", network="bench", since=time.time()
    ).encode()
    number = 0

    async def put() -> int:
        nonlocal number
        number += 1
        await store.txn(Txn(then=(Put(f"bench/{number % 10_000}", value),)))
        return 1

    return put


def _committing(node: SimulatedNode, network: Network) -> Step:
    """Addresses allocated and released again, each time until etcd has it."""

    async def commit() -> int:
        ips = await node.add(network, "container")
        await node.holder.confirmed(ips)
        node.delete(*ips)
        await node.holder.confirmed(ips)
        return 2

    return commit


@contextlib.asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Store]:
    store = await open_store(url)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def _node(store: Store, directory: Path) -> AsyncIterator[tuple[SimulatedNode, Network]]:
    """A node with its addresses ready."""
    network = await create_network(
        store, Network(name="bench", pools=[], warm=WARM), [PoolSpec("10.64.0.0/12")]
    )
    node = SimulatedNode(directory, store, "n1", cooldown=COOLDOWN)
    await node.start()
    try:
        await node.add(network, "first")
        while True:
            if node.states().get("warm", 0) >= WARM:
                break
            await asyncio.sleep(0.01)
        yield node, network
    finally:
        await node.crash()


async def _burst(url: str, directory: Path, number: int) -> dict[str, float]:
    """NODES nodes, each with a connection of its own, ask for EACH addresses at the same moment."""
    nodes = []
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(_opened(url))
        network = await create_network(
            store, Network(name=f"burst{number}", pools=[], warm=0), [PoolSpec(f"10.{number}.0.0/16")]
        )
        for name in range(NODES):
            own = await stack.enter_async_context(_opened(url))
            nodes.append(SimulatedNode(directory, own, f"b{number}-{name}"))
            await nodes[-1].start()
            stack.push_async_callback(nodes[-1].crash)
        came = await burst(nodes, network, EACH)
    return {
        "seconds": came.seconds,
        "transactions": came.transactions,
        "duplicates": len(came.ips) - len(set(came.ips)),
    }


if __name__ == "__main__":
    measure: Callable[[str, Path, int], Coroutine[Any, Any, object]] = {"loads": loads, "bursts": bursts}[
        sys.argv[1]
    ]
    print(json.dumps(asyncio.run(measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))))
