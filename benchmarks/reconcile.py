"""``reconcile``: 100,000 addresses against Marathon's 100,000 tasks, and its events.

The listener and the store are real; Marathon is the stand-in of the tests, and the nodes that release addresses are a
loop in this process that believes whatever it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import Budget, Row, Sample
from benchmarks.idle import megabytes, processor_seconds
from ipam import keys
from ipam.intents import IntentServer
from ipam.records import Address, AddressState, Alive, Intent, Node
from ipam.schema import ensure_schema
from ipam.store import MAX_OPS, Delete, Put, Store, Txn, open_store
from tests.standins.marathon import Marathon, Task
from tests.standins.tasks import TaskInfo

COUNT = 100_000
STALE = 100
NODES = 1_000
FRAMEWORK = "11111111-2222-3333-4444-555555555555-0000"
UUID = "3f2504e0-4f89-11d3-9a0c-{:012x}"

GRACE = 0.5
"""Seconds; it is no part of what is measured."""

RATE = 2_000
BUSY = 10.0
"""Events a second, for so many seconds."""


def rows(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measure(Path(directory), max(3, rounds // 20)))


async def _measure(directory: Path, rounds: int) -> list[Row]:
    url = f"sqlite://{directory}/store.db"
    store = await open_store(url)
    await ensure_schema(store)
    marathon = Marathon(framework=FRAMEWORK, keepalive=5.0)
    marathon.fill({"id": "/web"}, [_task(number) for number in range(STALE, COUNT)])
    (directory / "tasks.json").write_bytes(marathon.listed())
    await _fill(store)
    passes = [await _pass(url, directory / "tasks.json") for _ in range(rounds)]
    async with _listener(store, url, marathon) as pid:
        first = await _until(store, lambda told: told.get("counts", {}).get("live") == COUNT - STALE)
        released = [await _release(store, marathon, STALE + number) for number in range(rounds)]
        used, begun = processor_seconds(pid), time.monotonic()
        await _storm(marathon)
        share = (processor_seconds(pid) - used) / (time.monotonic() - begun)
        sent = marathon.streams.published
        told = await _until(store, lambda told: told["stream"]["events"] >= sent - 2 * rounds - 10)
        resident = megabytes(pid)
    await store.close()
    whole = [p["addresses"] + p["tasks"] + p["judge"] for p in passes]
    return [
        Row(f"full pass over {COUNT} addresses and as many tasks", "s", Sample(whole), budget=_at_most(2.0)),
        *(
            Row(f"  of that: {what}", "s", Sample([p[part] for p in passes]))
            for part, what in (
                ("addresses", "addresses from the store"),
                ("tasks", "Marathon's answer decoded"),
                ("judge", "judging"),
            )
        ),
        Row("  processor time, the program's start included", "s", Sample([p["processor"] for p in passes])),
        Row(
            "  the most memory it had", "MB", Sample([p["megabytes"] for p in passes]), budget=_at_most(300.0)
        ),
        Row("  the same in the listener: judging", "s", Sample([first["last_pass"]["seconds"]])),
        Row("event to verified release, without the grace", "s", Sample(released), budget=_at_most(1.0)),
        Row(
            f"{RATE} events/s for {BUSY:g} s: behind by",
            "s",
            Sample([told["stream"]["lag_seconds"]]),
            budget=_at_most(1.0),
        ),
        Row("  dropped", "", Sample([told["stream"]["dropped"]]), budget=_at_most(0.0)),
        Row("  of one core", "%", Sample([share * 100])),
        Row("  resident after that", "MB", Sample([resident])),
    ]


def _at_most(limit: float) -> Budget:
    return Budget(limit, of_peer=False)


def _id(number: int) -> str:
    return f"web.instance-{UUID.format(number)}._app.1"


def _task(number: int) -> Task:
    info = TaskInfo(_id(number), "web", FRAMEWORK)
    address = {"ip_address": _ip(number), "protocol": "IPv4"}
    return Task(
        info,
        "/web",
        f"S{number % NODES}",
        f"h{number % NODES}",
        "2026-01-01T00:00:00.000Z",
        "TASK_RUNNING",
        addresses=[address],
    )


def _ip(number: int) -> str:
    return str(ip_address("10.64.0.0") + number)


async def _fill(store: Store) -> None:
    """The addresses of all tasks, and of STALE more that have none."""
    puts = [
        Put(f"{keys.NODES}n{n}", Node(name=f"n{n}", version="1", mesos_agent=f"S{n}").encode())
        for n in range(NODES)
    ]
    puts += [Put(f"{keys.ALIVE}n{n}", Alive(instance="i", boot_id="b").encode()) for n in range(NODES)]
    puts += [
        Put(keys.address_key(ip_address(_ip(number))), _record(number).encode()) for number in range(COUNT)
    ]
    for start in range(0, len(puts), MAX_OPS):
        await store.txn(Txn(then=tuple(puts[start : start + MAX_OPS])))


def _record(number: int) -> Address:
    return Address(
        pool="10.64.0.0-15",
        state=AddressState.ASSIGNED,
        node=f"n{number % NODES}",
        id=f"{number:032x}",
        container_id=UUID.format(number),
        ifname="eth0",
        network="web",
        engine="mesos",
        netgroups=["web"],
        app="/web",
        task=_id(number),
        framework=FRAMEWORK,
        since=time.time(),
    )


async def _pass(url: str, file: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.reconciling", url, str(file), FRAMEWORK]
    done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    if found["found"] != STALE:
        raise RuntimeError(f"a pass found {found['found']} addresses stale where {STALE} are")
    return found


@contextlib.asynccontextmanager
async def _listener(store: Store, url: str, marathon: Marathon) -> AsyncIterator[int]:
    """A listener's pid. Stale addresses are kept by nodes that say they live."""

    async def answer(intent: Intent) -> dict[str, Any]:
        if intent.ip in kept:
            return {"done": False, "live": True, "why": "it lives"}
        await store.txn(Txn(then=(Delete(keys.address_key(ip_address(intent.ip))),)))
        return {"done": True, "why": ""}

    kept = {_ip(number) for number in range(STALE)}
    with marathon.instance() as one:
        # Every node's part, by one loop: intents of all nodes have a common prefix.
        servers = [asyncio.create_task(IntentServer(store, f"n{n}", answer).run()) for n in range(2 * STALE)]
        command = [sys.executable, "-m", "moorage", "--store", url, "marathon", "listen", "--url", one.url]
        options = ["--grace", str(GRACE), "--interval", "3600", "--log-level", "error"]
        process = await asyncio.create_subprocess_exec(*command, *options)
        try:
            yield process.pid
        finally:
            process.terminate()
            await process.wait()
            for server in servers:
                server.cancel()
            await asyncio.gather(*servers, return_exceptions=True)


async def _until(store: Store, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the listener tells, once that holds of it."""
    told: dict[str, Any] = {}
    async with asyncio.timeout(120):
        while True:
            kv = await store.get(keys.LISTENERS + FRAMEWORK)
            told = {} if kv is None else msgspec.json.decode(kv.value, type=dict[str, Any])
            if told and holds(told):
                return told
            await asyncio.sleep(0.1)


async def _release(store: Store, marathon: Marathon, number: int) -> float:
    """Seconds from a task's end to its address being free, but for the grace."""
    task = marathon.tasks.pop(_id(number))
    task.state = "TASK_KILLED"
    begun = time.monotonic()
    marathon._tell(task)
    key = keys.address_key(ip_address(_ip(number)))
    before = await store.get(key)
    if before is not None:
        async with asyncio.timeout(30):
            async for batch in store.watch(key, before.mod_revision + 1):
                if any(event.kv is None for event in batch.events):
                    break
    return time.monotonic() - begun - GRACE


async def _storm(marathon: Marathon) -> None:
    """Status updates of tasks that live, at RATE."""
    begun = time.monotonic()
    last = _id(COUNT - 1)
    chosen = [marathon.tasks[_id(number)] for number in range(COUNT - 5_000, COUNT)]
    sent = 0
    while sent < RATE * BUSY:
        due = min(int((time.monotonic() - begun) * RATE), int(RATE * BUSY))
        for number in range(sent, due):
            # Each says two things: a status update, and a change of its instance.
            if number % 2 == 0:
                marathon._tell(chosen[number // 2 % len(chosen)])
        sent = due
        await asyncio.sleep(0.005)
    assert marathon.tasks[last].state == "TASK_RUNNING", "nothing ended"
