"""One leads at a time, whatever happens to it; on both stores."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ipam import keys
from ipam.errors import InvalidInput, Overtaken
from ipam.store import Delete, Put, Store, Txn, open_store
from marathon import leader
from marathon.leader import Leadership
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]

WORKER = """
import asyncio, sys
from ipam.errors import Overtaken
from ipam.store import Put, Txn, open_store
from marathon.leader import Leadership
from moorage import log

async def main(url):
    store = await open_store(url)
    one = Leadership(store, "F", "worker", "a worker")
    await one.campaign()
    number = 0
    while True:
        # What a leader that was paused does first: it acts on what it believed before.
        guards = one.guards if number == 0 else kept
        kept = guards
        number += 1
        result = await store.txn(Txn(guards, (Put("deed", str(number).encode()),)))
        print("did" if result.succeeded else "refused", number, flush=True)
        if not result.succeeded:
            return
        await asyncio.sleep(0.1)

log.configure("error", "console")
asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def url(store_url: Callable[[Path], str], tmp_path: Path) -> str:
    return store_url(tmp_path)


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = await open_store(url)
    yield store
    await store.close()


def candidate(store: Store, name: str = "one", framework: str = "F") -> Leadership:
    return Leadership(store, framework, name, f"{name}'s place")


async def test_one_leads_and_the_next_waits_until_it_resigns(store: Store) -> None:
    one, other = candidate(store), candidate(store, "other")
    assert await one.take()
    assert not await other.take()
    waiting = asyncio.create_task(other.campaign())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await one.resign()
    await asyncio.wait_for(waiting, PATIENCE)
    assert (one.held, other.held) == (False, True)
    found = await one.leader()
    assert found is not None
    assert found.where == "other's place"
    await other.resign()


async def test_frameworks_have_leaders_of_their_own(store: Store) -> None:
    one, other = candidate(store), candidate(store, framework="F2")
    assert await one.take()
    assert await other.take()
    await one.resign()
    await other.resign()


async def test_who_does_not_lead_has_no_guards_and_tells_nothing(store: Store) -> None:
    one = candidate(store)
    with pytest.raises(Overtaken):
        _ = one.guards
    with pytest.raises(Overtaken):
        await one.tell({})


async def test_whose_key_was_taken_away_learns_it_by_itself(store: Store) -> None:
    one = candidate(store)
    assert await one.take()
    await one.tell({"phase": "steady"})
    guards = one.guards
    await store.txn(Txn(then=(Delete(keys.LEADERS + "F"),)))
    with pytest.raises(Overtaken):
        await one.tell({"phase": "steady"})
    assert not (await store.txn(Txn(guards, (Put("deed", b"x"),)))).succeeded
    await asyncio.wait_for(one.lost(), PATIENCE)
    await one.resign()


async def test_what_a_leader_told_goes_with_it(store: Store) -> None:
    one = candidate(store)
    assert await one.take()
    await one.tell({"phase": "steady"})
    assert await store.get(keys.LISTENERS + "F") is not None
    await one.resign()
    assert await store.get(keys.LISTENERS + "F") is None


@pytest.mark.parametrize("framework", ["", "a/b", "../x", "a b", "x" * 200, "a\n"])
def test_a_framework_id_that_could_be_no_key_is_refused(framework: str) -> None:
    with pytest.raises(InvalidInput, match="framework id"):
        leader.check_framework(framework)


@pytest.mark.slow
async def test_a_paused_leader_that_wakes_up_cannot_act_and_another_took_over_meanwhile(
    store: Store, url: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "did 1\n"
        other = candidate(store, "other")
        waiting = asyncio.create_task(other.campaign())
        process.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(waiting, PATIENCE)
        done = await store.get("deed")
        process.send_signal(signal.SIGCONT)
        said = await asyncio.to_thread(process.stdout.read)
        assert said.splitlines()[-1].startswith("refused")
        assert await store.get("deed") == done
        await other.resign()
    finally:
        process.kill()
        process.communicate()
