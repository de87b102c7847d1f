"""Nodes that exist in the store only, for an agent to follow: ``python -m benchmarks.crowd STORE``.

Runs in the namespace of the agent that follows: it writes what the others' agents would have written, and sees in that
kernel what became of it. Reads commands from stdin, one a line, and answers each with one line of JSON.

    settle            write all nodes and their blocks
    reached ROUTES    wait until the kernel has that many routes for all packets, also this node's own, and the next hop
                      and tunnel of each node
    blocks COUNT      one node claims a block and returns it, COUNT times: seconds until the kernel follows, each
    populate          write all address records
    churn SECONDS     addresses are released and assigned, RATE changes a second: how many a second there were
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from ipaddress import IPv4Address, IPv4Network

from ipam import keys
from ipam.records import Address, AddressState, Block, Label, Node
from ipam.store import MAX_OPS, Delete, Op, Put, Store, Txn, open_store
from isolator.fabric import VXLAN_DEVICE, mac_of
from isolator.fabric.kernel import read
from isolator.netlink import Node as Kernel
from isolator.netlink import codec, messages
from isolator.netlink.codec import Request, attribute
from isolator.netlink.inventory import link_by_name

NODES, BLOCKS_EACH = 1000, 4
ADDRESSES = 100_000
RATE = 500
"""Changes a second."""

NETWORK, POOL_NAME = "bench", "bench-0"
POOL = IPv4Network("10.128.0.0/12")
UNDERLAY = IPv4Network("198.19.0.0/16")
BLOCK_SIZE = 26

WRITERS = 16
"""Transactions under way at a time, as of so many nodes."""

LOOK = 0.0005
"""Seconds between two looks at one route."""


def name_of(number: int) -> str:
    return f"other-{number:04}"


def _block(index: int) -> IPv4Network:
    """The crowd's blocks are the last ones of the pool: an agent that starts takes some elsewhere."""
    size = 1 << (32 - BLOCK_SIZE)
    base = int(POOL.broadcast_address) + 1 - (index + 1) * size
    return IPv4Network((base, BLOCK_SIZE))


def _node(number: int) -> Put:
    name = name_of(number)
    record = Node(
        name=name,
        version="1",
        underlay=[str(UNDERLAY[number + 1])],
        mac=mac_of(name),
        vxlan_port=4789,
        mtu=1500,
        features=["routed", "hostgw", "vxlan"],
    )
    return Put(keys.NODES + name, record.encode())


def _claim(cidr: IPv4Network, node: str) -> Put:
    record = Block(pool=POOL_NAME, size=BLOCK_SIZE, node=node, claimed_at=time.time())
    return Put(keys.block_key(cidr), record.encode())


def _assigned(ip: IPv4Address, node: str) -> Put:
    """As an agent writes it that knows app and task."""
    task = f"shop_web.instance-{uuid.uuid4()}._app.1"
    record = Address(
        pool=POOL_NAME,
        state=AddressState.ASSIGNED,
        node=node,
        id=uuid.uuid4().hex,
        container_id=str(uuid.uuid4()),
        ifname="eth0",
        network=NETWORK,
        engine="mesos",
        netgroups=[f"team-{int(ip) % 50}", "web"],
        labels=[Label("moorage.netgroups", f"team-{int(ip) % 50},web")],
        app="/shop/web",
        task=task,
        framework="20260101-000000-1234567890-5050-1234-0000",
        since=time.time(),
        endpoint={
            "asked": time.monotonic_ns(),
            "request_id": uuid.uuid4().hex,
            "mtu": 1450,
            "port_mappings": [["tcp", 31080, 80]],
            "pools": [str(POOL)],
        },
    )
    return Put(keys.address_key(ip), record.encode())


def _cooling(ip: IPv4Address, node: str) -> Put:
    record = Address(pool=POOL_NAME, state=AddressState.COOLING, node=node, since=time.time())
    return Put(keys.address_key(ip), record.encode())


def _homes() -> list[tuple[IPv4Address, str]]:
    """Every address that is assigned, and its node: spread evenly over all blocks."""
    each = ADDRESSES // (NODES * BLOCKS_EACH)
    return [
        (_block(index)[offset], name_of(index % NODES))
        for index in range(NODES * BLOCKS_EACH)
        for offset in range(1, each + 1)
    ]


class Crowd:
    """See the module's docstring."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kernel = Kernel()

    async def settle(self) -> None:
        claims = (_claim(_block(index), name_of(index % NODES)) for index in range(NODES * BLOCKS_EACH))
        await self._write_all(itertools.chain(map(_node, range(NODES)), claims))

    async def reached(self, routes: str) -> None:
        while True:
            found = read(self._kernel, {self._device(): VXLAN_DEVICE})
            whole = sum(route.source is not None for route in found.routes.values())
            if whole >= int(routes) and len(found.neighbours) >= NODES and len(found.tunnels) >= NODES:
                return
            await asyncio.sleep(0.02)

    async def blocks(self, count: str) -> dict[str, list[float]]:
        took: dict[str, list[float]] = {"claimed": [], "returned": []}
        for number in range(int(count)):
            cidr = _block(NODES * BLOCKS_EACH)
            for what, op in (
                ("claimed", _claim(cidr, name_of(number))),
                ("returned", Delete(keys.block_key(cidr))),
            ):
                await self._store.txn(Txn(then=(op,)))
                took[what].append(self._seconds_until(cidr[1], what == "claimed"))
                await asyncio.sleep(random.uniform(0.1, 0.3))
        return took

    async def populate(self) -> None:
        await self._write_all(_assigned(ip, node) for ip, node in _homes())

    async def churn(self, seconds: str) -> float:
        """Each address that is released is assigned anew a second later, each change in a transaction of its own."""
        homes = _homes()
        random.shuffle(homes)
        pairs = itertools.cycle(homes)
        waiting: list[tuple[IPv4Address, str]] = []
        free = asyncio.Semaphore(4 * WRITERS)
        under_way: set[asyncio.Task[None]] = set()
        begun = time.monotonic()
        for number in itertools.count():
            due = number / RATE
            if due >= float(seconds):
                break
            if (early := begun + due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if number % 2 == 0 or len(waiting) < RATE // 2:
                waiting.append(pair := next(pairs))
                op = _cooling(*pair)
            else:
                op = _assigned(*waiting.pop(0))
            await free.acquire()
            under_way.add(task := asyncio.create_task(self._change(op, free)))
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        return number / (time.monotonic() - begun)

    async def _change(self, op: Op, free: asyncio.Semaphore) -> None:
        """free: has been acquired."""
        try:
            await self._store.txn(Txn(then=(op,)))
        finally:
            free.release()

    async def _write_all(self, ops: Iterable[Op]) -> None:
        left = iter(ops)
        batches = iter(lambda: tuple(itertools.islice(left, MAX_OPS)), ())

        async def work() -> None:
            for batch in batches:
                await self._store.txn(Txn(then=batch))

        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(work())

    def _device(self) -> int:
        link = link_by_name(self._kernel.route, VXLAN_DEVICE)
        return link.index if link is not None else 0

    def _seconds_until(self, ip: IPv4Address, reached: bool) -> float:
        """Holds everything here up meanwhile: whoever is measured is another process."""
        begun = time.monotonic()
        while self._is_reached(ip) != reached:
            time.sleep(LOOK)
        return time.monotonic() - begun

    def _is_reached(self, ip: IPv4Address) -> bool:
        """Whether the kernel would send a packet for the address into the tunnel."""
        body = messages.ROUTE.pack(socket.AF_INET, ip.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        look = Request(messages.RTM_GETROUTE, 0, body + attribute(messages.RTA_DST, ip.packed), f"find {ip}")
        found = self._kernel.route.get(look)
        assert found is not None, "nothing is declared fine"
        values = codec.attributes(found.body, messages.ROUTE.size)
        return codec.as_u32(values.get(messages.RTA_OIF)) == self._device()


async def _commands() -> AsyncIterator[list[str]]:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield line.split()


async def _serve(url: str) -> None:
    store = await open_store(url)
    crowd = Crowd(store)
    try:
        async for command, *arguments in _commands():
            answer = await getattr(crowd, command)(*arguments)
            print(json.dumps(answer), flush=True)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
