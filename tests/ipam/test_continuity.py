"""Which stores a node doubts, by what it and others knew of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ipam import continuity, keys
from ipam.continuity import Continuity
from ipam.errors import Compacted
from ipam.grace import Grace
from ipam.records import Vouched
from ipam.store import Delete, Event, KeyValue, Page, Put, Store, Txn
from ipam.store.base import Standing, WatchBatch, prefix_end
from isolator.journal import Journal
from tests.ipam.faulty import FaultyStore
from tests.patience import PATIENCE

AT_FIRST = Standing(cluster="c1", term=2, revision=0, surplus=5, surplus_at_most=6)


@dataclass
class Servers(FaultyStore):
    """A store whose servers' log is what a test says; revisions are its own. compacted: nothing old can be read."""

    store: Store
    log: Standing = AT_FIRST
    compacted: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.store)

    async def standing(self) -> Standing:
        revision = (await self.store.page(keys.SCHEMA, prefix_end(keys.SCHEMA), limit=1)).revision
        return replace(self.log, revision=self.log.revision or revision)

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        if revision and self.compacted:
            raise Compacted("compacted (test)", revision + 1)
        return await super().page(start, end, limit=limit, revision=revision, keys_only=keys_only)


NewAgent = Callable[..., Continuity]


@pytest.fixture
def servers(store: Store) -> Servers:
    return Servers(store)


@pytest.fixture
def agent(tmp_path: Path, servers: Servers) -> NewAgent:
    """agent(name): one that starts, or starts again, as that node."""

    def start(name: str = "n1") -> Continuity:
        journal = Journal(tmp_path / f"{name}.db", "boot-1")
        return Continuity(servers, name, journal, Grace(journal, "boot-1"))

    return start


async def write(servers: Servers, key: str, value: bytes, *heard_by: Continuity) -> None:
    revision = (await servers.txn(Txn(then=(Put(key, value),)))).revision
    async for batch in servers.watch(key, revision):
        for one in heard_by:
            one.note(WatchBatch(batch.events, batch.revision))
        return


async def test_a_new_store_is_in_no_doubt_nor_is_it_after_a_restart(agent: NewAgent) -> None:
    for name in ("n1", "n2", "n1"):
        one = agent(name)
        await one.verify()
        assert (one.doubted, one.grace.left, one.incarnation) == (False, 0.0, "")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cluster": "c2"}, "its servers are others"),
        ({"term": 1}, "began anew"),
        ({"surplus": -20, "surplus_at_most": -20}, "began anew"),
        ({"revision": 1}, "it is at revision 1"),
    ],
)
async def test_what_goes_back_is_doubted_by_who_knew_it_and_all_hear_of_it(
    agent: NewAgent, servers: Servers, changed: dict[str, object], why: str
) -> None:
    one, other = agent("n1"), agent("n2")
    await write(servers, "addresses/x", b"1")
    await one.verify()
    await other.verify()
    servers.log = replace(servers.log, **changed)
    guard = other.guard
    await one.verify()
    assert one.doubted
    assert why in one.grace.why
    assert one.guard != guard, "what others write now is refused"
    await other.look()
    assert (other.doubted, other.incarnation, other.guard) == (True, one.incarnation, one.guard)


async def test_one_that_hears_of_a_doubt_over_its_new_connection_moves_nothing_once_more(
    agent: NewAgent, servers: Servers
) -> None:
    one, other = agent("n1"), agent("n2")
    await one.verify()
    await other.verify()
    servers.log = replace(servers.log, surplus=-20, surplus_at_most=-20)
    await one.verify()
    await other.verify()
    assert (other.doubted, other.incarnation) == (True, one.incarnation)


async def test_a_change_that_was_seen_and_is_gone_is_doubted_whatever_the_numbers_say(
    agent: NewAgent, servers: Servers
) -> None:
    one = agent()
    await one.verify()
    await write(servers, "addresses/x", b"here", one)
    await write(servers, "addresses/y", b"later")
    await one.verify()
    assert not one.doubted
    await write(servers, "addresses/x", b"newer")
    await one.verify()
    assert not one.doubted, "it is overwritten, and stands in the history"
    one.note(WatchBatch((), 1))
    await write(servers, "addresses/z", b"seen", one)
    # Another history has something else at that revision.
    assert one._newest is not None
    one._newest = replace(one._newest, value=b"what was seen")
    await one.verify()
    assert one.doubted


@pytest.mark.parametrize("vouched", [True, False])
async def test_a_compacted_history_is_doubted_by_who_was_out_of_touch_where_nobody_vouches(
    agent: NewAgent, servers: Servers, monkeypatch: pytest.MonkeyPatch, vouched: bool
) -> None:
    one, other = agent("n1"), agent("n2")
    await one.verify()
    await other.verify()
    await write(servers, "addresses/x", b"1", one)
    await write(servers, "addresses/x", b"2")
    servers.compacted = True
    servers.log = replace(servers.log, term=3)
    if vouched:
        await other.verify()
    now = continuity.time.monotonic()
    monkeypatch.setattr(continuity.time, "monotonic", lambda: now + continuity.TOUCH + 1)
    await one.verify()
    assert one.doubted is not vouched


async def test_a_change_that_was_deleted_since_is_not_missed_once_it_is_compacted(
    agent: NewAgent, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent()
    await one.verify()
    await write(servers, "addresses/x", b"1", one)
    revision = (await servers.txn(Txn(then=(Delete("addresses/x"),)))).revision
    one.note(WatchBatch((Event("addresses/x", revision, None),), revision))
    servers.compacted = True
    now = continuity.time.monotonic()
    monkeypatch.setattr(continuity.time, "monotonic", lambda: now + continuity.TOUCH + 1)
    servers.log = replace(servers.log, term=3)
    await one.verify()
    assert not one.doubted


async def test_servers_that_began_anew_are_believed_by_who_was_in_touch_and_then_by_all(
    agent: NewAgent, servers: Servers
) -> None:
    one = agent("n1")
    await one.verify()
    servers.log = replace(servers.log, term=3, surplus=9, surplus_at_most=9)
    await one.verify()
    for other in (agent("n2"), agent("n1")):
        await other.verify()
        assert not other.doubted
        assert other.grace.left == 0.0


@pytest.mark.parametrize("known", [True, False])
async def test_servers_that_began_anew_and_nobody_vouches_for_are_doubted_by_who_just_started(
    agent: NewAgent, servers: Servers, known: bool
) -> None:
    await agent("n1").verify()
    servers.log = replace(servers.log, term=3)
    one = agent("n1" if known else "n2")
    await one.verify()
    assert one.doubted
    assert one.grace.left > 20


async def test_one_that_was_out_of_touch_gives_the_others_time_and_vouches_then(
    agent: NewAgent, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent()
    await one.verify()
    now = [continuity.time.monotonic() + continuity.TOUCH + 1]
    monkeypatch.setattr(continuity.time, "monotonic", lambda: now[0])
    servers.log = replace(servers.log, term=3)
    for _ in range(2):
        await one.verify()
        assert not one.doubted
        assert 0 < one.grace.left <= continuity.PAUSE
        assert not _stands_vouched(await servers.get(keys.VOUCHED), 3), "those that saw more may doubt yet"
    now[0] += continuity.PAUSE
    await one.verify()
    late = agent("n2")
    await late.verify()
    assert not late.doubted


def _stands_vouched(vouched: KeyValue | None, term: int) -> bool:
    return vouched is not None and Vouched.decode(vouched.key, vouched.value).term == term


async def test_two_looks_at_once_doubt_once(agent: NewAgent, servers: Servers) -> None:
    one = agent()
    await one.verify()
    servers.verify_with(one.verify)
    await one.move("why")
    moved = one.incarnation
    await servers.get("k")
    assert one.incarnation == moved


async def test_a_second_doubt_is_heard_of_in_a_store_that_went_back(
    agent: NewAgent, servers: Servers
) -> None:
    one = agent()
    await write(servers, "addresses/x", b"1")
    await one.verify()
    following = asyncio.create_task(one.follow())
    try:
        # The watch is behind a revision that the store, restored, reaches much later.
        servers.log = replace(servers.log, surplus=-20, surplus_at_most=-20)
        await one.verify()
        one.asserted()
        other = agent("n2")
        await other.verify()
        await other.move("again")
        async with asyncio.timeout(PATIENCE):
            while not one.doubted:
                await asyncio.sleep(0.01)
    finally:
        following.cancel()
    assert one.incarnation == other.incarnation


async def test_a_doubt_outlives_a_restart_until_all_is_asserted(agent: NewAgent, servers: Servers) -> None:
    await agent().verify()
    servers.log = replace(servers.log, cluster="c2")
    one = agent()
    await one.verify()
    again = agent()
    await again.verify()
    assert again.doubted
    again.asserted()
    last = agent()
    await last.verify()
    assert not last.doubted


async def test_a_new_node_takes_nothing_at_once_in_a_store_that_was_ever_doubted(
    agent: NewAgent, servers: Servers
) -> None:
    one = agent("n1")
    await one.verify()
    servers.log = replace(servers.log, cluster="c2")
    await one.verify()
    new = agent("n2")
    await new.verify()
    assert not new.doubted, "it holds nothing that could be unknown"
    assert new.grace.left > 0


async def test_a_look_that_was_asked_before_a_move_does_not_bring_the_old_incarnation_back(
    agent: NewAgent, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent()
    await one.verify()
    get = servers.get

    async def slow(key: str) -> KeyValue | None:
        found = await get(key)
        monkeypatch.setattr(servers, "get", get)
        await one.move("why")
        one.asserted()
        return found

    monkeypatch.setattr(servers, "get", slow)
    await one.look()
    assert not one.doubted
    assert one.incarnation
