"""Whatever happens to a cluster: what lives keeps its address, and what is stale is released in time.

The hosts are simulated (hosts.py); listeners are real processes, and so are HTTP, the store and the agents' addresses.
drawing.py says how one is drawn again, or made longer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ipam.records import Intent
from tests.marathon import drawing, history, hosts, oracle
from tests.marathon.history import World

GRACE = 1.5
GONE_AFTER = 20.0
STEPS = int(2500 * drawing.LENGTH)
PAUSE = 0.03
SECONDS = 240.0 + STEPS * PAUSE
"""After so long no further step is begun, on a machine that is slow."""

SETTLES = 15.0
"""Seconds (by the witness) after the last disturbance until a stale address has to be gone, beyond the grace: a
listener may have to take over first.
"""

ENOUGH = 100
"""Of each kind of address, for a history to have shown anything."""

MARGIN = 20
"""What it goes on for beyond that."""

KINDS = ("stale", "unreachable", "falsely suspected", "released in time")

# Histories never run side by side: each has the machine busy by itself.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("histories")]


@pytest.fixture(autouse=True)
def leases_end_when_the_history_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipam.membership.LEASE", hosts.LEASE)


@pytest.mark.history
async def test_in_a_long_random_history_live_addresses_are_kept_and_stale_ones_released_in_time(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = drawing.seed()
    begun = time.monotonic()
    async with history.world(
        tmp_path, random.Random(seed), hosts=8, grace=GRACE, gone_after=GONE_AFTER
    ) as world:
        try:
            await history.live_on(world, STEPS, PAUSE, SECONDS, lambda: has_shown(world, ENOUGH + MARGIN))
            left = await history.settle(world, GRACE + SETTLES)
        finally:
            saw = f"{time.monotonic() - begun:.0f} s: {history.summary(world)}"
            record_property("history", f"HISTORY_SEED={seed}, {saw}\n  {dict(world.done)}")
        assert world.broken == []
        assert world.watched.released_live == []
        assert world.oracle.released_live == []
        assert world.truth.carried_twice == []
        assert world.oracle.late == []
        assert left == set()
        assert has_shown(world, ENOUGH), "too few addresses of one kind"


def has_shown(world: World, least: int) -> bool:
    counts = history.summary(world)
    return all(counts[kind] >= least for kind in KINDS)


# -- the oracle sees what it is for


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[World]:
    """Two hosts that lose every DEL, and an app whose tasks end now and then."""
    async with history.world(tmp_path, random.Random(1), hosts=2, grace=0.5, gone_after=GONE_AFTER) as world:
        for host in world.hosts:
            host.loses, host.forgets, host.slow = 1.0, 0.0, 0.0
        networks = [{"mode": "container", "name": history.NETWORK}]
        world.marathon.deploy({"id": "/keeper", "instances": 6, "networks": networks, "cmd": "x"})
        await until(lambda: all(t.state == "TASK_RUNNING" for t in world.marathon.tasks.values()))
        yield world


async def until(holds: Any, within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.1)


async def test_an_agent_that_releases_without_looking_is_caught(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in small.hosts:
        answer = host._answer

        async def releases(intent: Intent, host: Any = host, answer: Any = answer) -> Any:
            carried = dict(host._truth.carried)
            host._truth.carried.clear()
            try:
                return await answer(intent)
            finally:
                host._truth.carried.update(carried)

        monkeypatch.setattr(host, "_answer", releases)
        await host.kill_agent()
        await host.start_agent()
    small.marathon.forget(min(small.marathon.tasks))
    await until(lambda: small.watched.released_live and small.oracle.released_live)


async def test_a_stale_address_that_nobody_releases_is_caught(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "ALLOWANCE", 1.0)

    async def keeps(intent: Intent) -> dict[str, Any]:
        return {"done": False, "live": True, "why": "it is kept"}

    for host in small.hosts:
        monkeypatch.setattr(host, "_answer", keeps)
        await host.kill_agent()
        await host.start_agent()
    _, container = small.containers()[0]
    await asyncio.sleep(1.0)
    next(host for host in small.hosts if container.id in host.containers).die(container)
    await until(lambda: small.oracle.late)
