"""Tasks that fail are told, tried again and logged once, whatever way they end in."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from ipam import supervision
from ipam.errors import StoreUnavailable
from ipam.supervision import Supervision
from tests.patience import PATIENCE


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervision, "LONGER", 0.05)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "way", ["raises", "returns", "is cancelled by what it waits for", "runs out of memory"]
)
async def test_whatever_way_a_task_ends_in_it_is_told_and_tried_again(way: str) -> None:
    supervised, mended = Supervision(), False

    async def job() -> None:
        if mended:
            await asyncio.Event().wait()
        match way:
            case "raises":
                raise StoreUnavailable("etcd is away")
            case "runs out of memory":
                raise MemoryError
            case "is cancelled by what it waits for":
                other = asyncio.get_running_loop().create_future()
                other.cancel()
                await other

    with capture_logs() as logs:
        task = supervised.start("fabric", job)
        await until(supervised.failing)
        assert "the agent's task fabric failed" in supervised.failing()[0]
        mended = True
        await until(lambda: not supervised.failing())
        await end(task)
    assert [(one["event"], one["task"]) for one in logs] == [
        ("task failed; it is tried again", "fabric"),
        ("task works again", "fabric"),
    ]


async def test_pauses_double_up_to_the_longest_and_begin_anew_once_it_worked() -> None:
    supervised = Supervision()
    began: list[float] = []
    now = asyncio.get_running_loop().time

    async def job() -> None:
        began.append(now())
        if len(began) == 7:
            await asyncio.sleep(0.1)
        raise RuntimeError(f"number {len(began)}")

    task = supervised.start("spool", job, longest=0.04)
    await until(lambda: len(began) >= 9)
    await end(task)
    pauses = [after - before for before, after in itertools.pairwise(began)]
    # A busy machine makes them longer, never shorter.
    assert [pause >= least for pause, least in zip(pauses, (0.01, 0.02, 0.04, 0.04), strict=False)] == [
        True
    ] * 4
    assert pauses[7] >= 0.01
    assert supervised.failing() == []


async def test_one_that_may_end_ends_and_one_that_is_cancelled_is_forgotten() -> None:
    supervised = Supervision()

    async def ends() -> None:
        pass

    async def fails() -> None:
        raise RuntimeError

    await asyncio.wait_for(supervised.start("lease", ends, ends=True), PATIENCE)
    task = supervised.start("lease", fails)
    await until(supervised.failing)
    await end(task)
    assert supervised.failing() == []


async def test_a_task_that_fails_regularly_is_told_all_the_time() -> None:
    supervised, runs = Supervision(), 0

    async def job() -> None:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0.2)  # longer than any fixed time after which it would count as working
        raise RuntimeError

    task = supervised.start("mending", job)
    await until(supervised.failing)
    told = []
    while runs < 4:
        told.append(bool(supervised.failing()))
        await asyncio.sleep(0.01)
    await end(task)
    assert all(told)
