"""Another process that uses the store: ``worker.py URL COMMAND ARGUMENT...``, see the functions.

Each says ``ready`` when the store is open and begins when it reads a line, so that processes start together.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from ipam.store import Compare, Get, Put, Store, Txn, open_store


async def increment(store: Store, key: str, times: str) -> None:
    """Add 1 to a counter by compare-and-swap, so many times."""
    for _ in range(int(times)):
        await increment_once(store, key)


async def increment_once(store: Store, key: str) -> None:
    found = await store.get(key)
    while True:
        value = int(found.value) if found else 0
        result = await store.txn(
            Txn(
                (Compare(key, found.mod_revision if found else 0),),
                (Put(key, str(value + 1).encode()),),
                (Get(key),),
            )
        )
        if result.succeeded:
            return
        found = result.results[0]


async def stamp(store: Store, prefix: str, times: str, seed: str) -> None:
    """Write the (system-wide) monotonic time of the write, at irregular moments."""
    chance = random.Random(int(seed))
    for i in range(int(times)):
        await asyncio.sleep(chance.uniform(0.01, 0.06))
        await store.txn(Txn(then=(Put(f"{prefix}{i:03}", str(time.monotonic()).encode()),)))


async def count(store: Store, prefix: str) -> None:
    """Write one number to two keys per transaction, and print each that was confirmed, for ever."""
    number = 0
    while True:
        number += 1
        value = str(number).encode()
        await store.txn(Txn(then=(Put(f"{prefix}a", value), Put(f"{prefix}b", value))))
        print(number, flush=True)


async def hold(store: Store, key: str, ttl: str) -> None:
    """Keep a key alive on a lease, for ever."""
    lease = await store.lease(float(ttl))
    await store.txn(Txn(then=(Put(key, b"held", lease.id),)))
    print("held", flush=True)
    await asyncio.Event().wait()


async def main(url: str, command: str, *arguments: str) -> None:
    store = await open_store(url)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await {"increment": increment, "stamp": stamp, "count": count, "hold": hold}[command](store, *arguments)
    await store.close()


asyncio.run(main(*sys.argv[1:]))
