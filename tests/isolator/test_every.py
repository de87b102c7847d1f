"""Work at fixed times is due however often its loop is woken for something else."""

from __future__ import annotations

import asyncio
import contextlib

from isolator.every import Every


async def test_events_that_come_all_the_time_put_nothing_off() -> None:
    events: asyncio.Queue[None] = asyncio.Queue()
    every = Every(0.1)
    due = 0
    begun = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < begun + 1:
        asyncio.get_running_loop().call_later(0.01, events.put_nowait, None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every.left()):
                await events.get()
        due += every.is_due()
    assert due > 1


async def test_a_queue_that_is_never_empty_puts_nothing_off_either() -> None:
    every = Every(0.05)
    begun = asyncio.get_running_loop().time()
    while not every.is_due():
        assert asyncio.get_running_loop().time() < begun + 30
        await asyncio.sleep(0)
    assert every.left() > 0
