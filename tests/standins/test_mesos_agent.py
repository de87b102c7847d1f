"""The stand-in Mesos agent runs containers as docs/facts/mesos.md says, against a real node."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from moorage.lab import LabNode, Namespace
from tests.standins.conftest import ask
from tests.standins.marathon import Instance, Marathon
from tests.standins.mesos_agent import HookAgent
from tests.standins.mesos_master import Master
from tests.system.conftest import assert_nothing_left, eventually

pytestmark = pytest.mark.kernel

APP = {"id": "/web", "cmd": "sleep 1000", "networks": [{"mode": "container", "name": "web"}]}


@pytest.fixture
def node() -> Iterator[LabNode]:
    """A node whose agent serves the networks ``web``, for both families, and ``other``."""
    with LabNode("node") as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/24", "--pool", "fd64::/64")
        node.cli("network", "create", "other", "--pool", "10.65.0.0/24")
        yield node


@pytest.fixture
def agent(node: LabNode) -> Iterator[HookAgent]:
    # Asked from here, so it listens here.
    with HookAgent(Master(), node, 0, place=None, host="127.0.0.1") as agent:
        yield agent


@pytest.fixture
def marathon(agent: HookAgent) -> Iterator[Instance]:
    with Marathon(agent.master).instance() as marathon:
        yield marathon


def deploy(marathon: Instance, **app: object) -> None:
    marathon.marathon.deploy({**APP, **app})
    wanted = {**APP, **app}.get("instances", 1)
    eventually(lambda: states(marathon) == ["TASK_RUNNING"] * int(str(wanted)))


def states(marathon: Instance) -> list[str]:
    return [task["state"] for task in ask(marathon, "GET", "/v2/tasks").json["tasks"]]


def assigned(node: LabNode) -> list[str]:
    return sorted(row["address"] for row in node.ask("ip", "list", "--state", "assigned"))


def test_a_task_has_the_addresses_that_the_hook_gave_it(marathon: Instance, agent: HookAgent) -> None:
    deploy(marathon)
    (task,) = ask(marathon, "GET", "/v2/tasks").json["tasks"]
    v4, v6 = (address["ipAddress"] for address in task["ipAddresses"])
    # IPv6 keeps its prefix length on its way through Mesos.
    assert sorted([v4, v6.removesuffix("/128")]) == assigned(agent.node)
    assert v6.endswith("/128")
    (container,) = agent.containers
    assert agent.live_addresses() == {v4: container, v6.removesuffix("/128"): container}
    marathon.marathon.destroy("/web")
    eventually(lambda: agent.containers == {})
    assert agent.live_addresses() == {}
    assert_nothing_left(agent.node)


def test_several_networks_are_joined_at_once_and_left(marathon: Instance, agent: HookAgent) -> None:
    deploy(marathon, networks=[{"mode": "container", "name": name} for name in ("web", "other")])
    (container,) = agent.containers.values()
    assert [info["name"] for info in container.network_infos] == ["web", "other"]
    marathon.marathon.destroy("/web")
    eventually(lambda: len(agent.calls) == 4)
    assert {(command, ifname) for command, _, ifname, _ in agent.calls} == {
        (command, ifname) for command in ("ADD", "DEL") for ifname in ("eth0", "eth1")
    }


def test_a_failed_add_fails_the_task_and_is_followed_by_a_del(marathon: Instance, agent: HookAgent) -> None:
    marathon.marathon.deploy({**APP, "networks": [{"mode": "container", "name": "nowhere"}]})
    eventually(lambda: len(agent.calls) >= 2)
    marathon.marathon.destroy("/web")
    assert [call[0] for call in agent.calls[:2]] == ["ADD", "DEL"]
    assert agent.calls[0][3] != 0
    failed = agent.master.completed[0].statuses[-1]
    assert (failed.state, failed.reason) == ("TASK_FAILED", "REASON_CONTAINER_LAUNCH_FAILED")
    assert "nowhere" in failed.message


def test_a_lost_del_leaves_the_namespace_and_the_address(marathon: Instance, agent: HookAgent) -> None:
    deploy(marathon)
    held = assigned(agent.node)
    agent.lose_dels = 1
    marathon.marathon.destroy("/web")
    eventually(lambda: agent.containers == {})
    assert states(marathon) == []
    assert agent.live_addresses() == {}
    assert agent.lost[0].hooked.namespace.exists
    assert assigned(agent.node) == held


def test_a_failed_del_is_repeated_when_the_agent_restarts(marathon: Instance, agent: HookAgent) -> None:
    deploy(marathon)
    (container,) = agent.containers
    agent.hook_fails = True
    marathon.marathon.destroy("/web")
    eventually(lambda: agent.containers == {})
    eventually(lambda: states(marathon) == [])  # the task reports its end all the same
    assert agent.calls[-1][0::3] == ("DEL", 1)
    agent.hook_fails = False
    agent.crash()
    agent.restart()
    assert agent.calls[-1] == ("DEL", container, "eth0", 0)
    assert_nothing_left(agent.node)


def test_containers_outlive_their_agent_and_are_destroyed_when_it_is_back(
    marathon: Instance, agent: HookAgent
) -> None:
    deploy(marathon, instances=2)
    first, second = agent.containers.values()
    agent.crash()
    assert len(set(agent.live_addresses().values())) == 2
    agent.end_process(first)
    eventually(lambda: agent.live_addresses().keys() == set(second.addresses))
    assert len(agent.containers) == 2, "nobody saw it end"
    marathon.marathon.apps["/web"]["instances"] = 1
    agent.restart()
    eventually(lambda: list(agent.containers.values()) == [second])
    assert agent.calls[-1][:2] == ("DEL", first.id)


def test_a_container_that_is_destroyed_while_it_is_started_leaves_no_process(
    marathon: Instance, agent: HookAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    create, created = Namespace.create, []

    def slowly(namespace: Namespace) -> None:
        entered.set()
        assert go_on.wait(30)
        created.append(namespace)
        create(namespace)

    monkeypatch.setattr(Namespace, "create", slowly)
    marathon.marathon.deploy(APP)
    assert entered.wait(30)
    marathon.marathon.apps["/web"]["instances"] = 0
    agent.crash()
    agent.restart()
    time.sleep(1.0)  # its destruction has begun
    go_on.set()
    eventually(lambda: agent.containers == {} and states(marathon) == [])
    eventually(lambda: not any(namespace.exists and namespace.processes() for namespace in created))
    eventually(lambda: assigned(agent.node) == [])
    assert_nothing_left(agent.node)


@pytest.mark.parametrize("keeps_state", [True, False])
def test_a_reboot_ends_everything(marathon: Instance, agent: HookAgent, keeps_state: bool) -> None:
    deploy(marathon)
    before = agent.id
    agent.power_off()
    marathon.marathon.apps["/web"]["instances"] = 0
    agent.node.kill()
    assert agent.live_addresses() == {}
    agent.node.start()
    agent.power_on(keeps_state=keeps_state)
    assert agent.containers == {}
    assert (agent.id == before) == keeps_state
    assert [call[0] for call in agent.calls] == (["ADD", "DEL"] if keeps_state else ["ADD"])
    if keeps_state:
        assert states(marathon) == [], "its tasks are TASK_GONE"
    else:
        agent.master.lose(before)
        assert states(marathon) == ["TASK_UNREACHABLE"]


def test_its_answers_may_omit_containers(marathon: Instance, agent: HookAgent) -> None:
    deploy(marathon, instances=2)
    one, other = agent.containers

    def listed() -> set[str]:
        said = ask(agent, "POST", "/api/v1", {"type": "GET_CONTAINERS"}).json["get_containers"]["containers"]
        return {row["container_id"]["value"] for row in said}

    assert listed() == {one, other}
    agent.omitted = {one}
    assert listed() == {other}
    agent.omits_all = True
    assert listed() == set()
    assert ask(agent, "GET", "/state").json["frameworks"] == []
