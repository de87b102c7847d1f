"""A short random history with real agents, real containers and an etcd: the same two properties as in test_history.py.

What is really there is looked at: the namespaces that have a process, and the addresses in them. The exact bound in
time is test_history.py's; here the machine also wires containers, and every look takes a while.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.marathon.drawing import LENGTH, seed
from tests.marathon.witness import Witness
from tests.standins.lab import NETWORK, MesosLab, eventually
from tests.standins.mesos_agent import HookAgent

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("histories"),
]

GRACE = 2.0
STEPS = int(60 * LENGTH)
SECONDS = 60.0 * LENGTH
"""After so long no further step is begun, on a machine that is slow; but then something has to have been stale."""

RELEASED_WITHIN = GRACE + 20.0
"""Seconds (by the witness) from the first look that finds an address stale."""

Step = Callable[[MesosLab, random.Random], None]


@dataclass
class Looks:
    """What was seen, look after look. seen: (address, container) that the store once had as assigned."""

    cluster: MesosLab
    witness: Witness
    seen: set[tuple[str, str]] = field(default_factory=set)
    live: set[tuple[str, str]] = field(default_factory=set)
    stale: set[tuple[str, str]] = field(default_factory=set)
    released_live: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    _since: dict[tuple[str, str], float] = field(default_factory=dict)

    def look(self, *, judges_time: bool = True) -> set[tuple[str, str]]:
        """Look once; what is stale now. judges_time: whether everybody is there who is needed for a release."""
        before = self.witness.now()
        assigned = {(ip, row["container_id"]) for ip, row in self.cluster.assigned().items()}
        live = set(self.cluster.live_addresses().items())
        self.released_live += [f"{ip} of {c}" for ip, c in sorted((self.seen & live) - assigned)]
        self.seen |= assigned
        self.live |= live
        stale = {key for key in assigned - live if not self._is_wanted(key[1])}
        self.stale |= stale
        if not judges_time:
            self._since.clear()
        self._since = {key: self._since.get(key, self.witness.now()) for key in stale}
        for key, since in self._since.items():
            if judges_time and before - since > RELEASED_WITHIN:
                self.late.append(f"{key[0]} of {key[1]}, stale for {before - since:.0f} s")
        return stale

    def _is_wanted(self, container: str) -> bool:
        """Whether it is still being made, or its task is still one."""
        for agent in self.cluster.agents.values():
            found = agent.containers.get(container)
            if found is not None:
                return any(task.id in self.cluster.marathon.tasks for task in found.tasks)
        return False


def _scale(cluster: MesosLab, chance: random.Random) -> None:
    cluster.marathon.scale(chance.choice(["/a", "/b"]), chance.randrange(6))


def _kill(cluster: MesosLab, chance: random.Random) -> None:
    if tasks := sorted(cluster.marathon.tasks):
        cluster.marathon.kill(chance.choice(tasks))


def _lose_dels(cluster: MesosLab, chance: random.Random) -> None:
    chance.choice(_up(cluster)).lose_dels += 2


def _fail_dels(cluster: MesosLab, chance: random.Random) -> None:
    agent = chance.choice(_up(cluster))
    agent.hook_fails = not agent.hook_fails


def _mesos_crash(cluster: MesosLab, chance: random.Random) -> None:
    agent = chance.choice(_up(cluster))
    agent.crash()
    _kill(cluster, chance)
    agent.restart()


def _agent_crash(cluster: MesosLab, chance: random.Random) -> None:
    node = cluster.node(chance.choice(_up(cluster)).hostname)
    node.kill()
    _kill(cluster, chance)
    cluster.start_agent(node)


def _omit(cluster: MesosLab, chance: random.Random) -> None:
    agent = chance.choice(_up(cluster))
    agent.omits_all = not agent.omits_all


def _cut_off(cluster: MesosLab, chance: random.Random) -> None:
    """From its master; Marathon forgets its tasks, or has them back."""
    if not (found := _connected(cluster)):
        return
    agent = chance.choice(found)
    agent.reaches_master = False
    cluster.master.lose(agent.id)
    for task in [t for t, known in list(cluster.marathon.tasks.items()) if known.agent == agent.id]:
        if chance.random() < 0.5:
            cluster.marathon.expunge(task)


def _rejoin(cluster: MesosLab, chance: random.Random) -> None:
    for agent in cluster.agents.values():
        if not agent.reaches_master:
            agent.reaches_master = True


def _reboot(cluster: MesosLab, chance: random.Random) -> None:
    if not (found := _connected(cluster)):
        return
    agent = chance.choice(found)
    before, keeps = agent.id, chance.random() < 0.5
    cluster.power_off(agent.hostname)
    cluster.master.lose(before)
    cluster.power_on(agent.hostname, keeps_state=keeps)


def _fail_over(cluster: MesosLab, chance: random.Random) -> None:
    cluster.marathon.fail_over()


def _lose_events(cluster: MesosLab, chance: random.Random) -> None:
    faults = cluster.marathon.streams.faults
    faults.lose = 0.0 if faults.lose else 0.7


def _listener_dies(cluster: MesosLab, chance: random.Random) -> None:
    cluster.listener.kill()
    cluster.listener.start()


STEPS_AND_WEIGHTS: dict[Step, int] = {
    _scale: 12,
    _kill: 12,
    _lose_dels: 12,
    _fail_dels: 2,
    _mesos_crash: 2,
    _agent_crash: 2,
    _omit: 2,
    _cut_off: 2,
    _rejoin: 3,
    _reboot: 1,
    _fail_over: 1,
    _lose_events: 2,
    _listener_dies: 1,
}


def _up(cluster: MesosLab) -> list[HookAgent]:
    return [agent for agent in cluster.agents.values() if agent.is_running]


def _connected(cluster: MesosLab) -> list[HookAgent]:
    return [agent for agent in _up(cluster) if agent.reaches_master]


def heal(cluster: MesosLab) -> None:
    """Everything behaves again."""
    cluster.marathon.streams.faults.none()
    for agent in cluster.agents.values():
        agent.hook_fails = agent.omits_all = False
        agent.lose_dels = 0
        agent.reaches_master = True


@pytest.mark.history
def test_with_real_containers_too_live_addresses_are_kept_and_stale_ones_released(
    record_property: Callable[[str, object], None],
) -> None:
    drawn_from = seed()
    chance = random.Random(drawn_from)
    done: Counter[str] = Counter()
    networks = [{"mode": "container", "name": NETWORK}]
    with Witness() as witness, MesosLab(nodes=3, grace=GRACE, interval=1.0) as cluster:
        looks = Looks(cluster, witness)
        try:
            for app in ("/a", "/b", "/keeper"):
                cluster.deploy({"id": app, "cmd": "sleep 100000", "instances": 3, "networks": networks})
            assert eventually(lambda: cluster.running() == 9, 60)
            begun = time.monotonic()
            while done.total() < STEPS and not (looks.stale and time.monotonic() - begun > SECONDS):
                step = chance.choices(list(STEPS_AND_WEIGHTS), list(STEPS_AND_WEIGHTS.values()))[0]
                step(cluster, chance)
                done[step.__name__.strip("_")] += 1
                looks.look(judges_time=step in (_scale, _kill, _lose_dels, _omit, _rejoin))
            heal(cluster)
            deadline = witness.now() + 2 * RELEASED_WITHIN
            while left := looks.look():
                assert witness.now() < deadline, f"still stale:\n{describe(cluster, left)}"
        finally:
            saw = f"{done.total()} steps: {len(looks.live)} live and {len(looks.stale)} stale addresses"
            record_property("history", f"HISTORY_SEED={drawn_from}, {saw}\n  {dict(done)}")
        assert looks.released_live == []
        assert looks.late == []
        assert looks.stale, "no address was stale"


def describe(cluster: MesosLab, left: set[tuple[str, str]]) -> str:
    """What the listener says of these addresses, and what is left of their containers."""
    said = {row["address"]: f"{row['verdict']}: {row['why']}" for row in cluster.status().get("findings", [])}
    rows = []
    for ip, container in sorted(left):
        found = [
            f"{name}: {it}" for name, agent in cluster.agents.items() if (it := agent.whereabouts(container))
        ]
        rows.append(f"{ip} of {container}: {said.get(ip, 'no finding')}; {found or 'no agent ever had it'}")
    return "\n".join(rows)
