"""A random history of a cluster: apps come and go, hooks' DELs are lost, and everything fails that can.

Steps are drawn from a seeded generator. What fails comes back after a while by itself, so that there is always
something to judge. Two frameworks share the hosts and the pools, each with a Marathon and two listeners of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipam import keys
from ipam.store import Store, open_store
from tests.ipam.nodes import network
from tests.marathon.hosts import Host, Truth
from tests.marathon.listening import Listening
from tests.marathon.oracle import Framework, Oracle, WatchedStore
from tests.marathon.witness import Witness
from tests.standins.marathon import Instance, Marathon
from tests.standins.mesos_agent import Contained
from tests.standins.mesos_master import Instance as MasterInstance
from tests.standins.mesos_master import Master

NETWORK = "prod"
MOST_INSTANCES = 8

BACK_AFTER = (0.5, 5.0)
"""Seconds until something that failed is back, shortest and longest."""

DEAD_FOR = (4.0, 50.0)
"""Seconds for which a machine stays dead that was declared gone, shortest and longest."""


@dataclass
class Site:
    """A Marathon with all that is run for it."""

    marathon: Marathon
    instances: list[Instance]
    listeners: list[Listening]


@dataclass
class World:
    """Everything there is.

    sites: the first one is the bigger. done: steps by name. broken: what bringing something back failed on, a bug of
    the test's.
    """

    store: Store
    watched: WatchedStore
    truth: Truth
    master: Master
    masters: list[MasterInstance]
    sites: list[Site]
    hosts: list[Host]
    oracle: Oracle
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    _coming_back: set[asyncio.Task[None]] = field(default_factory=set)

    def later(self, *back: Callable[[], Any]) -> None:
        """Undo something after a while."""

        async def work() -> None:
            await asyncio.sleep(self.chance.uniform(*BACK_AFTER))
            try:
                for one in back:
                    undone = one()
                    if isinstance(undone, Awaitable):
                        await undone
            except Exception:
                self.broken.append(traceback.format_exc())

        task = asyncio.create_task(work())
        self._coming_back.add(task)
        task.add_done_callback(self._coming_back.discard)

    async def everything_is_back(self) -> None:
        """Returns when nothing is away any more. Fails with what does not come back."""
        missing = set(self._coming_back)
        if missing:
            _, missing = await asyncio.wait(missing, timeout=ALL_BACK_WITHIN)
        assert not missing, f"not back: {[_where(task) for task in missing]}"

    @property
    def marathon(self) -> Marathon:
        return self.sites[0].marathon

    @property
    def listeners(self) -> list[Listening]:
        return [listener for site in self.sites for listener in site.listeners]

    def site(self) -> Site:
        """One of them: two of three times the first."""
        return self.chance.choice([self.sites[0], *self.sites])

    def running_tasks(self) -> list[tuple[Marathon, str]]:
        return [
            (site.marathon, task)
            for site in self.sites
            for task, known in sorted(site.marathon.tasks.items())
            if known.state == "TASK_RUNNING"
        ]

    @property
    def disturbances(self) -> int:
        return len(self._coming_back)

    def containers(self) -> list[tuple[Host, Contained]]:
        return [
            (host, container)
            for host in self.hosts
            if host.is_on
            for container in host.containers.values()
            if self.truth.lives[container.id].is_live
        ]


@contextlib.asynccontextmanager
async def world(
    directory: Path, chance: random.Random, *, hosts: int, grace: float, gone_after: float
) -> AsyncIterator[World]:
    """A cluster where everything runs."""
    async with contextlib.AsyncExitStack() as stack:
        url = f"sqlite://{directory}/store.db"
        store = await open_store(url)
        stack.push_async_callback(store.close)
        prod = await network(store, "10.64.0.0/21", name=NETWORK, block_size=26, warm=8)
        truth = Truth()
        watched = WatchedStore(store, truth)
        master = Master()
        masters = [stack.enter_context(master.instance()) for _ in range(2)]
        made = [
            Host(
                master,
                f"n{number}",
                store=watched,
                network=prod,
                directory=directory,
                truth=truth,
                chance=random.Random(chance.random()),
            )
            for number in range(1, hosts + 1)
        ]
        for host in made:
            stack.push_async_callback(host.power_off)
            await host.power_on()
        sites = []
        for name in ("first", "other"):
            marathon = Marathon(master, name=name, keepalive=1.0, chance=random.Random(chance.random()))
            instances = [
                stack.enter_context(marathon.instance(redirect=redirect)) for redirect in (False, True)
            ]
            listeners = [
                Listening(
                    url,
                    [one.url for one in instances],
                    [one.url for one in masters],
                    directory / f"listener-{name}-{number}.log",
                    grace=grace,
                    interval=1.0,
                    gone_after=gone_after,
                    keep_alive=1.0,
                )
                for number in range(2)
            ]
            sites.append(Site(marathon, instances, listeners))
            for listener in listeners:
                stack.callback(listener.kill)
                listener.start()
        leading = {site.marathon.framework: Framework(site.marathon) for site in sites}
        oracle = Oracle(
            store,
            truth,
            {host.name: host for host in made},
            leading,
            master,
            grace,
            gone_after,
            stack.enter_context(Witness()),
        )
        tasks = [asyncio.create_task(oracle.run())]
        tasks += [
            asyncio.create_task(_follow_leader(store, leading[site.marathon.framework], site.listeners))
            for site in sites
        ]
        try:
            yield World(store, watched, truth, master, masters, sites, made, oracle, chance)
            for task in tasks:
                assert not task.done(), task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _where(task: asyncio.Task[None]) -> list[str]:
    """What a task waits in, the innermost last."""
    found = []
    waiting: Any = task.get_coro()
    while waiting is not None:
        if (frame := getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)) is not None:
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return found


async def _follow_leader(store: Store, framework: Framework, listeners: list[Listening]) -> None:
    """Keep up which listener leads, as the store says; until cancelled."""
    while True:
        kv = await store.get(keys.LEADERS + framework.marathon.framework)
        working = [listener.pid for listener in listeners if listener.works]
        named = [pid for pid in working if kv is not None and f'pid {pid}"'.encode() in kv.value]
        leader = named[0] if named else None
        if leader != framework.pid:
            framework.pid, framework.since = leader, time.monotonic()
        await asyncio.sleep(0.1)


# -- steps; each does one thing, and has what failed come back


async def _deploy(world: World) -> None:
    marathon = world.site().marathon
    app = f"/app-{world.chance.randrange(15)}"
    networks = [{"mode": "container", "name": NETWORK}]
    marathon.deploy(
        {"id": app, "instances": world.chance.randrange(MOST_INSTANCES), "networks": networks, "cmd": "x"}
    )


async def _scale(world: World) -> None:
    marathon = world.site().marathon
    if apps := sorted(set(marathon.apps) - {"/keeper"}):
        marathon.scale(world.chance.choice(apps), world.chance.randrange(MOST_INSTANCES))


async def _destroy(world: World) -> None:
    marathon = world.site().marathon
    if apps := sorted(set(marathon.apps) - {"/keeper"}):
        marathon.destroy(world.chance.choice(apps))


async def _kill(world: World) -> None:
    if tasks := world.running_tasks():
        marathon, task = world.chance.choice(tasks)
        marathon.kill(task)


async def _die(world: World) -> None:
    if found := world.containers():
        host, container = world.chance.choice(found)
        host.die(container)


async def _gone_alone(world: World) -> None:
    """TASK_GONE of one task on a host that is well."""
    found = [(host, c) for host, c in world.containers() if host.is_running and host.reaches_master]
    if found:
        host, container = world.chance.choice(found)
        host.report_gone(container)


async def _amnesia(world: World) -> None:
    """Marathon forgets a task that runs, as when its state is restored from a backup; later it is killed."""
    known = {task: marathon for marathon, task in world.running_tasks()}
    found = [(h, c) for h, c in world.containers() if c.tasks[0].id in known and c.tasks[0].name != "keeper"]
    if found:
        host, container = world.chance.choice(found)
        task = container.tasks[0].id
        known[task].forget(task)
        world.later(lambda: host.die(container))


async def _cut_off(world: World) -> None:
    """A host's Mesos agent cannot be reached; sometimes for so long that Marathon replaces or forgets its tasks."""
    host = world.chance.choice(world.hosts)
    if not (host.is_on and host.is_running and host.reaches_master):
        return
    host.reaches_master = False
    world.master.lose(host.id)
    for marathon in (site.marathon for site in world.sites):
        for task in [t for t, known in marathon.tasks.items() if known.agent == host.id]:
            if world.chance.random() < 0.4:
                marathon.expunge(task)
            else:
                marathon.replace(task)

    world.later(lambda: setattr(host, "reaches_master", True))


async def _expelled(world: World) -> None:
    """An operator marks an agent gone that is only cut off: its containers live on until it is back and shut down.

    Its moorage agent lives, so nothing of the node is freed; not either if its sign of life is gone for a while, as
    when its machine is so busy that the lease is over.
    """
    host = world.chance.choice(world.hosts)
    if not (host.serves and host.is_running and host.reaches_master):
        return
    host.has_to_serve = True
    host.reaches_master = False
    world.master.mark_gone(host.id)
    lapse = world.chance.uniform(0.0, world.oracle.gone_after / 4)
    lapsed = asyncio.create_task(host.lapse(lapse))

    async def back() -> None:
        await lapsed
        host.reaches_master = True
        host.has_to_serve = False

    world.later(back)


async def _mesos_crash(world: World) -> None:
    host = world.chance.choice(world.hosts)
    if host.is_on and host.is_running:
        host.crash()
        world.later(lambda: host.is_on and not host.is_running and host.restart())


async def _agent_crash(world: World) -> None:
    host = world.chance.choice(world.hosts)
    if host.serves and not host.has_to_serve:
        await host.kill_agent()

        async def back() -> None:
            if host.is_on and not host.serves:
                await host.start_agent()

        world.later(back)


async def _power_cut(world: World) -> None:
    """A host dies. It comes back, with or without its state, or is declared gone first."""
    host = world.chance.choice(world.hosts)
    if not host.is_on or host.has_to_serve or sum(one.is_on for one in world.hosts) <= len(world.hosts) // 2:
        return
    agent = host.id
    await host.power_off()
    keeps, gone = world.chance.random() < 0.5, world.chance.random() < 0.6

    async def back() -> None:
        known = world.master.agents.get(agent)
        if known is not None and known.state != "unreachable" and not gone:
            world.master.lose(agent)
        if gone:
            world.master.mark_gone(agent)
            await asyncio.sleep(world.chance.uniform(*DEAD_FOR))
        await host.power_on(keeps_state=keeps and not gone)

    if agent in world.master.agents and world.chance.random() < 0.7:
        world.master.lose(agent)
    world.later(back)


async def _marathon_stops(world: World) -> None:
    running = [one for one in world.site().instances if one.is_running]
    if running:
        one = world.chance.choice(running)
        one.stop()
        world.later(lambda: one.is_running or one.start())


async def _marathon_fails_over(world: World) -> None:
    world.site().marathon.fail_over()


async def _marathon_misbehaves(world: World) -> None:
    one = world.chance.choice(world.site().instances)
    match world.chance.randrange(3):
        case 0:
            one.faults.status = 503
        case 1:
            one.faults.truncate = True
        case _:
            one.faults.delay = 1.0
    world.later(one.faults.none)


async def _stream_misbehaves(world: World) -> None:
    streams = world.site().marathon.streams
    faults = streams.faults
    match world.chance.randrange(7):
        case 0:
            faults.lose = 0.5
        case 1:
            faults.duplicate = 0.5
        case 2:
            faults.delay, faults.late = 0.7, 3.0
        case 3:
            faults.garble = 0.3
        case 4:
            faults.cut = 0.1
        case 5:
            streams.silence.on = True
        case _:
            faults.lose = 1.0
    world.later(faults.none, lambda: setattr(streams.silence, "on", False))


async def _master_fails_over(world: World) -> None:
    world.master.fail_over()
    world.later(world.master.recover)


async def _listener_pauses(world: World) -> None:
    one = world.chance.choice(world.listeners)
    if one.works:
        one.pause()
        world.later(one.resume)


async def _listener_dies(world: World) -> None:
    one = world.chance.choice(world.listeners)
    if one.is_running:
        one.kill()
        world.later(lambda: one.is_running or one.start())


STEPS: dict[Callable[[World], Awaitable[None]], int] = {
    _deploy: 200,
    _scale: 200,
    _destroy: 40,
    _kill: 250,
    _die: 200,
    _gone_alone: 70,
    _amnesia: 200,
    _cut_off: 45,
    _expelled: 12,
    _mesos_crash: 12,
    _agent_crash: 12,
    _power_cut: 10,
    _marathon_stops: 4,
    _marathon_fails_over: 5,
    _marathon_misbehaves: 3,
    _stream_misbehaves: 15,
    _master_fails_over: 4,
    _listener_pauses: 4,
    _listener_dies: 4,
}
"""Steps and how often each is done."""

ALL_BACK_WITHIN = 80.0
"""Seconds until everything that failed is back."""

MOST_DISTURBANCES = 60
"""Things that may be away at a time."""


async def live_on(world: World, steps: int, pause: float, within: float, enough: Callable[[], bool]) -> None:
    """So many steps, ``pause`` seconds apart on the average, and more until it is enough.

    None is begun after ``within`` seconds.
    """
    deadline = asyncio.get_running_loop().time() + within
    keeper = {
        "id": "/keeper",
        "instances": 3,
        "networks": [{"mode": "container", "name": NETWORK}],
        "cmd": "x",
    }
    for site in world.sites:
        site.marathon.deploy(keeper)
    names, weights = list(STEPS), list(STEPS.values())
    while (world.done.total() < steps or not enough()) and asyncio.get_running_loop().time() < deadline:
        step = world.chance.choices(names, weights)[0]
        if world.disturbances < MOST_DISTURBANCES:
            await step(world)
            world.done[step.__name__.strip("_")] += 1
        await asyncio.sleep(world.chance.uniform(0, 2 * pause))


def summary(world: World) -> dict[str, float]:
    """How much of what happened."""
    oracle, truth = world.oracle, world.truth
    return {
        "steps": sum(world.done.values()),
        "stale": len(oracle.stale),
        "of gone nodes": len(oracle.gone),
        "unreachable": len(oracle.unreachable),
        "falsely suspected": len(truth.suspected),
        "released in time": oracle.in_time,
        "slowest": round(oracle.slowest, 1),
        "by the wall": round(oracle.slowest_by_the_wall, 1),
        "speed of the machine": round(oracle.witness.speed(), 2),
        "lost DELs": truth.lost_dels,
        "looks": oracle.looks,
    }


async def settle(world: World, within: float) -> set[tuple[str, str]]:
    """Everything is back and behaves; returns what is provably stale after ``within`` seconds all the same."""
    await world.everything_is_back()
    witness = world.oracle.witness
    deadline = witness.now() + within
    while (left := await world.oracle.look()) and witness.now() < deadline:
        await asyncio.sleep(0.2)
    return left
