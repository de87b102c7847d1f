"""The listener, from the event or the silence to the released address; on the embedded store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ipam import keys
from ipam.errors import TryAgain
from ipam.records import Node
from ipam.store import Delete, Store, Txn, read_prefix
from marathon import actions, feed, http, listener, once, passes
from marathon.client import Marathon
from marathon.listener import Listener
from marathon.mesos import Master
from marathon.reconcile import Timing
from tests.marathon.scene import FRAMEWORK, Idle, Scene, ip_of, task, task_id
from tests.standins.marathon import Instance
from tests.standins.mesos_master import Master as MasterStandIn

GRACE = 0.5
SOON = Timing(grace=GRACE, interval=1.0, gone_after=GRACE)
RARELY = Timing(grace=GRACE, interval=3600.0, gone_after=GRACE)
"""So that what happens is by events alone."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECT_WITHIN", 1.0)
    monkeypatch.setattr(feed, "LONGEST_PAUSE", 0.5)
    monkeypatch.setattr(passes, "RETRY", 0.3)
    monkeypatch.setattr(listener, "TELL_EVERY", 0.1)
    monkeypatch.setattr(listener, "RETRY", 0.3)


@pytest.fixture
async def scene(store: Store) -> AsyncIterator[Scene]:
    async with Scene(store) as scene:
        await scene.node("n1")
        yield scene


@pytest.fixture
async def one(scene: Scene) -> AsyncIterator[Instance]:
    with scene.marathon.instance() as one:
        yield one


def client(one: Instance) -> Marathon:
    return Marathon([one.url], keep_alive=0.3)


def listen(
    scene: Scene, one: Instance, timing: Timing = SOON, master: Master | None = None
) -> asyncio.Task[None]:
    return scene.run(Listener(scene.store, client(one), master, timing).run())


async def test_a_task_that_marathon_does_not_know_loses_its_address(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1, 2)
    listen(scene, one, RARELY)
    await scene.left(1)
    assert [(i.ip, i.kind.value) for i in scene.asked] == [(ip_of(2), "verify")]
    assert "Marathon does not know its task" in scene.asked[0].evidence["why"]


async def test_an_event_alone_leads_to_the_release(scene: Scene, one: Instance) -> None:
    scene.listed(1, 2)
    await scene.assigned(1, 2)
    listen(scene, one, RARELY)
    await scene.counts(live=2)
    begun = time.monotonic()
    scene.over(2)
    await scene.left(1)
    assert time.monotonic() - begun >= GRACE


async def test_a_lost_event_is_made_up_for_by_the_next_full_pass(scene: Scene, one: Instance) -> None:
    scene.listed(1, 2)
    await scene.assigned(1, 2)
    listen(scene, one)
    await scene.counts(live=2)
    scene.marathon.streams.faults.lose = 1.0
    scene.over(2)
    await scene.left(1)


async def test_what_happened_while_the_stream_was_away_is_found_when_it_is_back(
    scene: Scene, one: Instance
) -> None:
    scene.listed(1, 2)
    await scene.assigned(1, 2)
    listen(scene, one, RARELY)
    await scene.counts(live=2)
    one.stop()
    scene.over(2)
    one.start()
    await scene.left(1)


async def test_a_live_container_is_kept_and_shown_as_an_orphan(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    scene.living.add(ip_of(2))
    await scene.assigned(1, 2)
    listen(scene, one)
    await scene.counts(live=1, orphan=1)
    [row] = (await scene.told())["findings"]
    assert (row["address"], row["verdict"]) == (ip_of(2), "orphan")
    await scene.until(lambda: len(scene.asked) >= 3)
    [row] = (await scene.told())["findings"]
    assert row["why"].count("is carried by a live container") == 1
    assert row["why"].count("Marathon does not know its task") == 1
    scene.living.clear()
    await scene.left(1)


async def test_an_orphan_whose_task_is_listed_again_is_live(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    scene.living.add(ip_of(2))
    await scene.assigned(1, 2)
    listen(scene, one)
    await scene.counts(orphan=1)
    scene.listed(2)
    await scene.counts(live=2, orphan=0)


async def test_unreachable_unknown_and_foreign_addresses_are_kept_and_counted(
    scene: Scene, one: Instance
) -> None:
    scene.listed(1)
    scene.listed(2, state="TASK_UNREACHABLE")
    scene.listed(3, state="TASK_UNKNOWN")
    await scene.assigned(1, 2, 3)
    await scene.assigned(4, framework="another")
    await scene.assigned(5, engine="cni", framework="", task="")
    await scene.assigned(6, framework="", task="")
    listen(scene, one)
    await scene.counts(live=1, unreachable=1, unknown=1, other_framework=2, facts_missing=1)
    await asyncio.sleep(3 * GRACE)
    assert (await scene.addresses(), scene.asked) == ({ip_of(n) for n in range(1, 7)}, [])


async def test_a_list_without_any_of_our_tasks_releases_nothing(scene: Scene, one: Instance) -> None:
    await scene.assigned(1, 2)
    listen(scene, one)
    await scene.counts(facts_missing=2)
    await asyncio.sleep(3 * GRACE)
    assert scene.asked == []


async def test_marathons_silence_on_the_line_is_no_silence_about_tasks(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1, 2)
    one.faults.status = 503
    listen(scene, one)
    await asyncio.sleep(3 * GRACE)
    assert scene.asked == []
    one.faults.none()
    await scene.left(1)


async def test_a_task_that_starts_behind_the_snapshot_is_not_suspected(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1)
    listen(scene, one, RARELY)
    await scene.counts(live=1)
    await scene.assigned(2)
    scene.listed(2)
    scene.marathon._tell(scene.marathon.tasks[task_id(2)])
    await asyncio.sleep(3 * GRACE)
    assert scene.asked == []


async def test_events_late_and_twice_end_no_task_that_lives(scene: Scene, one: Instance) -> None:
    scene.listed(1, 2)
    await scene.assigned(1, 2)
    listen(scene, one)
    await scene.counts(live=2)
    running = scene.marathon.tasks[task_id(2)]
    running.state = "TASK_KILLED"  # an event that was never true
    scene.marathon._tell(running)
    running.state = "TASK_RUNNING"
    scene.living.add(ip_of(2))
    await scene.counts(live=2)
    assert await scene.addresses() == {ip_of(1), ip_of(2)}


async def test_a_node_whose_agent_is_away_is_asked_when_it_is_back(scene: Scene, one: Instance) -> None:
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1)
    await scene.assigned(1)
    await scene.assigned(2, node="n2")
    listen(scene, one, RARELY)
    await scene.counts(live=1, unreachable=1)
    await asyncio.sleep(2 * GRACE)
    await scene.node("n2", mesos_agent="S2")
    await scene.left(1)


async def test_a_node_that_its_master_calls_gone_is_freed_wholly(scene: Scene, one: Instance) -> None:
    master = MasterStandIn()
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1)
    scene.listed(2, state="TASK_UNREACHABLE")
    await scene.assigned(1)
    await scene.assigned(2, node="n2")
    await scene.assigned(3, node="n2", framework="another")
    with master.instance() as leading:
        for agent in ("S1", "S2"):
            master.register(Idle(), agent)
        master.lose("S2")
        listen(scene, one, master=Master([leading.url]))
        await scene.counts(live=1, unreachable=1, other_framework=1)
        master.mark_gone("S2")
        await scene.left(1)
        for prefix in (keys.NODES, keys.WRITERS):
            await scene.until(lambda prefix=prefix: _absent(scene.store, prefix + "n2"))
        assert await scene.store.get(keys.NODES + "n1") is not None


async def test_a_node_that_is_called_gone_is_kept_while_its_agent_is_only_away_for_a_moment(
    scene: Scene, one: Instance
) -> None:
    master = MasterStandIn()
    await scene.node("n2", mesos_agent="S2")
    scene.listed(1)
    await scene.assigned(1)
    await scene.assigned(2, 3, node="n2", framework="another")
    with master.instance() as leading:
        for agent in ("S1", "S2"):
            master.register(Idle(), agent)
        master.mark_gone("S2")
        patient = Timing(grace=0.0, interval=1.0, gone_after=2.5)
        listen(scene, one, patient, Master([leading.url]))
        await scene.counts(live=1, other_framework=2)
        for _ in range(3):
            await scene.lose_sight_of("n2")
            await scene.until(lambda: _shows(scene, "n2", "doubted"))
            await scene.show_life_of("n2")
            await scene.until(lambda: _shows(scene, "n2", ""))
        assert await scene.addresses() == {ip_of(1), ip_of(2), ip_of(3)}
        begun = time.monotonic()
        await scene.lose_sight_of("n2")
        await scene.left(1)
        assert time.monotonic() - begun >= patient.gone_after


async def test_an_agent_that_registers_in_the_last_moment_keeps_what_its_node_holds(
    scene: Scene, one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = MasterStandIn()
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1)
    await scene.assigned(1)
    await scene.assigned(2, node="n2", framework="another")

    async def late(store: Store, name: str, **options: Any) -> object:
        await scene.node(name, alive=False, mesos_agent="S7")  # it was there, and is away again
        return await remove_node(store, name, **options)

    remove_node = actions.remove_node
    monkeypatch.setattr(actions, "remove_node", late)
    with master.instance() as leading:
        for agent in ("S1", "S2"):
            master.register(Idle(), agent)
        master.mark_gone("S2")
        listen(scene, one, master=Master([leading.url]))
        await scene.until(lambda: _knows_as(scene, "n2", "S7"))
        await asyncio.sleep(3 * GRACE)
        assert await scene.addresses() == {ip_of(1), ip_of(2)}


async def _knows_as(scene: Scene, node: str, mesos_agent: str) -> bool:
    kv = await scene.store.get(keys.NODES + node)
    return kv is not None and Node.decode(kv.key, kv.value).mesos_agent == mesos_agent


async def _shows(scene: Scene, node: str, state: str) -> bool:
    """Whether the leader tells that of a node that Mesos calls gone; "": nothing."""
    told = {row["name"]: row["state"] for row in (await scene.told()).get("gone", [])}
    return told.get(node, "") == state


async def _absent(store: Store, key: str) -> bool:
    return await store.get(key) is None


async def test_one_task_reported_gone_does_not_free_a_node_that_is_only_away(
    scene: Scene, one: Instance
) -> None:
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1, 2)
    await scene.assigned(1)
    await scene.assigned(2, 3, node="n2")
    scene.listed(3)
    listen(scene, one)
    await scene.counts(live=3)
    scene.over(2, "TASK_GONE", agent="S2")
    await scene.counts(live=2, unreachable=1)
    await asyncio.sleep(3 * GRACE)
    assert len(await scene.addresses()) == 3


async def test_an_operators_word_that_an_agent_is_gone_comes_by_event_too(
    scene: Scene, one: Instance
) -> None:
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1, 2)
    await scene.assigned(1)
    await scene.assigned(2, 3, node="n2")
    listen(scene, one, RARELY)
    await scene.counts(live=2)
    scene.over(2, "TASK_GONE_BY_OPERATOR", agent="S2")
    await scene.left(1)


async def test_a_marathon_that_is_another_framework_by_now_judges_nothing_of_the_old_one(
    scene: Scene, one: Instance
) -> None:
    scene.listed(1)
    await scene.assigned(1)
    listen(scene, one)
    await scene.counts(live=1)
    scene.marathon.framework = "another"
    scene.marathon.tasks.clear()
    scene.listed(7)
    await scene.until(lambda: _present(scene.store, keys.LISTENERS + "another"))
    await scene.assigned(7, framework="another")
    await asyncio.sleep(3 * GRACE)
    assert (await scene.addresses(), scene.asked) == ({ip_of(1), ip_of(7)}, [])


async def _present(store: Store, key: str) -> bool:
    return await store.get(key) is not None


async def test_a_big_cluster_is_looked_at_less_often(
    scene: Scene, one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "ROWS_A_SECOND", 4)
    scene.listed(*range(1, 7))
    await scene.assigned(*range(1, 7))
    listen(scene, one, Timing(grace=GRACE, interval=0.1))
    await scene.counts(live=6)
    # It looks once more when the stream is open.
    await scene.until(lambda: one.asked.count("GET /v2/tasks") >= 1)
    await asyncio.sleep(1.0)
    before, since = one.asked.count("GET /v2/tasks"), time.monotonic()
    await scene.until(lambda: one.asked.count("GET /v2/tasks") >= before + 2)
    assert time.monotonic() - since >= 12 / listener.ROWS_A_SECOND


# -- two listeners


async def test_the_second_listener_takes_over_and_only_then_acts(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1)
    first = listen(scene, one)
    await scene.counts(live=1)
    second = listen(scene, one)
    await asyncio.sleep(0.5)
    before = await scene.store.get(keys.LEADERS + FRAMEWORK)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await scene.until(lambda: _led_by_another(scene.store, before))
    await scene.assigned(2)
    await scene.left(1)
    second.cancel()


async def _led_by_another(store: Store, before: object) -> bool:
    found = await store.get(keys.LEADERS + FRAMEWORK)
    return found is not None and found != before


async def test_a_listener_whose_leadership_was_taken_away_stands_again(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1)
    listen(scene, one)
    await scene.counts(live=1)
    before = await scene.store.get(keys.LEADERS + FRAMEWORK)
    await scene.store.txn(Txn(then=(Delete(keys.LEADERS + FRAMEWORK),)))
    await scene.until(lambda: _led_by_another(scene.store, before))
    await scene.counts(live=1)


# -- app labels


async def test_an_apps_labels_reach_its_running_endpoints(scene: Scene, one: Instance) -> None:
    await scene.network(allow_netgroups=["a", "b"])
    scene.marathon.fill({"id": "/web", "labels": {"MOORAGE_NETGROUPS": "a, b"}}, [])
    scene.marathon.fill({"id": "/db"}, [])
    scene.marathon.tasks.update({t.info.id: t for t in (task(1), task(2, "/db"))})
    await scene.assigned(1)
    await scene.assigned(2, app="/db")
    listen(scene, one)
    await scene.until(lambda: scene.asked)
    await asyncio.sleep(1.5)
    assert [(i.kind.value, i.ip, i.evidence["netgroups"]) for i in scene.asked] == [
        ("labels", ip_of(1), ["a", "b"])
    ]


async def test_an_apps_labels_wait_for_the_agent_of_its_endpoints_node(scene: Scene, one: Instance) -> None:
    await scene.network(allow_netgroups=["a"])
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.marathon.fill({"id": "/web", "labels": {"MOORAGE_NETGROUPS": "a"}}, [])
    scene.marathon.tasks.update({t.info.id: t for t in (task(1), task(2))})
    await scene.assigned(1)
    await scene.assigned(2, node="n2")
    listen(scene, one)
    await scene.until(lambda: [i.ip for i in scene.asked] == [ip_of(1)])
    assert [key for key in await _intents(scene.store) if "/n2/" in key] == []
    await scene.node("n2", mesos_agent="S2")
    await scene.until(lambda: [i.ip for i in scene.asked] == [ip_of(1), ip_of(2)])


async def _intents(store: Store) -> list[str]:
    items, _ = await read_prefix(store, keys.INTENTS)
    return [kv.key for kv in items]


async def test_a_label_that_the_network_does_not_allow_is_told_and_not_applied(
    scene: Scene, one: Instance
) -> None:
    await scene.network(allow_netgroups=["a"])
    scene.marathon.fill({"id": "/web", "labels": {"MOORAGE_NETGROUPS": "secret"}}, [])
    scene.marathon.tasks.update({t.info.id: t for t in (task(1),)})
    await scene.assigned(1)
    listen(scene, one)

    async def told() -> bool:
        return "does not allow netgroup secret" in str((await scene.told()).get("refused_labels"))

    await scene.until(told)
    assert scene.asked == []


# -- once


async def test_a_dry_run_tells_and_changes_nothing_also_beside_a_leader(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1, 2)
    told = await once.look(scene.store, client(one), None, SOON)
    assert (told["counts"]["live"], told["counts"]["stale"]) == (1, 1)
    assert [row["address"] for row in told["findings"]] == [ip_of(2)]
    assert (await scene.addresses(), scene.asked) == ({ip_of(1), ip_of(2)}, [])


async def test_one_reconciliation_waits_for_the_grace_and_acts(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1, 2)
    told = await once.reconcile(scene.store, client(one), None, SOON)
    assert told["done"] == {"released": 1}
    assert await scene.addresses() == {ip_of(1)}
    assert await scene.store.get(keys.LEADERS + FRAMEWORK) is None


async def test_one_reconciliation_waits_for_a_node_that_is_called_gone(scene: Scene, one: Instance) -> None:
    master = MasterStandIn()
    await scene.node("n2", alive=False, mesos_agent="S2")
    scene.listed(1)
    await scene.assigned(1)
    await scene.assigned(2, node="n2")
    with master.instance() as leading:
        master.register(Idle(), "S2")
        master.mark_gone("S2")
        patient = Timing(grace=GRACE, interval=1.0, gone_after=2.0)
        looked = await once.look(scene.store, client(one), Master([leading.url]), patient)
        assert [(row["name"], row["state"]) for row in looked["gone"]] == [("n2", "doubted")]
        told = await once.reconcile(scene.store, client(one), Master([leading.url]), patient)
    assert (told["done"], told["gone"]) == ({"nodes removed": 1}, [])
    assert await scene.addresses() == {ip_of(1)}


async def test_nobody_reconciles_beside_a_listener(scene: Scene, one: Instance) -> None:
    scene.listed(1)
    await scene.assigned(1)
    listen(scene, one)
    await scene.counts(live=1)
    with pytest.raises(TryAgain, match="a listener reconciles"):
        await once.reconcile(scene.store, client(one), None, SOON)
