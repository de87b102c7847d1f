"""Whatever happens to a cluster: what lives keeps its address, and what is stale is released in time."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.marathon import history

GRACE = 1.5
STEPS = 3000
PAUSE = 0.03

pytestmark = pytest.mark.slow


async def test_in_a_long_random_history_live_addresses_are_kept_and_stale_ones_released_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host that died is known to be dead after this; 15 s would only make the history longer.
    monkeypatch.setattr("ipam.membership.LEASE", 3.0)
    seed = random.randrange(1 << 32)
    begun = time.monotonic()
    with capsys.disabled():
        print(f"\n  seed {seed}")
    async with history.world(tmp_path, random.Random(seed), hosts=8, grace=GRACE) as world:
        oracle, truth = world.oracle, world.truth
        try:
            await history.live_on(world, STEPS, PAUSE)
            left = await history.settle(world, GRACE + history.SETTLES)
        finally:
            counts = {
                "steps": sum(world.done.values()),
                "stale": len(oracle.stale),
                "gone": len(oracle.gone),
                "unreachable": len(oracle.unreachable),
                "falsely suspected": len(truth.suspected),
                "lost DELs": truth.lost_dels,
                "slowest release": f"{oracle.slowest:.1f} s",
                "looks": oracle.looks,
            }
            with capsys.disabled():
                print(f"  {counts}, {time.monotonic() - begun:.0f} s\n  {dict(world.done)}")
                for listener in world.listeners:
                    print(listener.log.read_text()[-1500:]) if left_over(world) else None
        assert world.watched.released_live == []
        assert oracle.released_live == []
        assert truth.carried_twice == []
        assert oracle.late == []
        assert left == set()
        for count in ("stale", "unreachable", "falsely suspected"):
            assert counts[count] >= 100, f"{count} is too rare to have shown anything"
        await asyncio.sleep(0)


def left_over(world: history.World) -> bool:
    return bool(world.watched.released_live or world.oracle.late or world.oracle.released_live)
