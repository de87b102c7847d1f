"""What the Mesos stand-ins say has the shape of what a real master and agent said (tests/data/mesos)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conftest import ask, listen
from tests.standins.mesos_agent import Agent, Contained
from tests.standins.mesos_master import Instance, Master
from tests.standins.tasks import TaskInfo

DATA = Path(__file__).parent.parent / "data" / "mesos"

GIVEN = {
    "ip_addresses": [{"protocol": "IPv4", "ip_address": "10.211.55.2"}],
    "name": "mnet",
    "groups": ["g1", "g2"],
    "labels": {"labels": [{"key": "role", "value": "frontend"}, {"key": "novalue"}]},
    "port_mappings": [{"host_port": 31001, "container_port": 80, "protocol": "tcp"}],
}

Shape = Any


class Lazy(Agent):
    """Its containers are what a test says they are."""

    def _begin(self, container: Contained) -> None:
        container.pid = 25416

    def _end(self, container: Contained) -> None:
        self.forget(container)
        self.report(container, "TASK_FINISHED", "Command exited with status 0")

    def run(self, container: Contained) -> None:
        container.network_infos = (GIVEN,)
        self.report(container, "TASK_STARTING")
        self.report(container, "TASK_RUNNING")


class Plain:
    """A framework that launches one task."""

    framework = "0b12ab81-a07f-4439-83ed-c4a785a2cf2d-0000"
    name = "mesos-execute instance"

    def update(self, status: object) -> None:
        """It does not care."""


@pytest.fixture
def master() -> Iterator[Instance]:
    with Master().instance() as instance:
        instance.master.subscribe(Plain())
        yield instance


@pytest.fixture
def agent(master: Instance) -> Iterator[Lazy]:
    with Lazy(master.master, "localhost") as agent:
        yield agent


def launch(agent: Lazy, *labels: tuple[str, str]) -> Contained:
    wanted = {**GIVEN, "ip_addresses": [{"protocol": "IPv4"}]}
    task = TaskInfo("labelled-1", "labelled", Plain.framework, ("true",), (wanted,), labels)
    agent.master.launch(agent.id, [task])
    container = agent.of_task("labelled-1")
    assert container is not None
    return container


def recorded(name: str) -> Any:
    """A recording, less the host name that its task asked for: Marathon's do not."""
    text = (DATA / f"{name}.json").read_text()
    return json.loads(re.sub(r'"hostname": "my-host",', "", text))


def shape(value: Any) -> Shape:
    """Keys and types; of a list, the shapes of its elements that differ."""
    match value:
        case dict():
            return {key: shape(each) for key, each in value.items()}
        case list():
            shapes: list[Shape] = []
            for each in map(shape, value):
                if each not in shapes:
                    shapes.append(each)
            return sorted(shapes, key=repr)
        case bool() | str() | None:
            return type(value).__name__
        case _:
            return "number"


def differs(said: Shape, wanted: Shape, where: str = "") -> list[str]:
    """Where the two differ. What a real one says depends on the run too: lists may be empty in one of them."""
    if isinstance(said, dict) and isinstance(wanted, dict):
        found = [f"{where}.{key} is missing" for key in wanted.keys() - said.keys()]
        found += [f"{where}.{key} is too much" for key in said.keys() - wanted.keys()]
        for key in said.keys() & wanted.keys():
            found += differs(said[key], wanted[key], f"{where}.{key}")
        return found
    if isinstance(said, list) and isinstance(wanted, list):
        if not said or not wanted:
            return []
        return [
            min((differs(one, other, f"{where}[]") for other in wanted), key=len)[0]
            for one in said
            if all(differs(one, other) for other in wanted)
        ]
    return [] if said == wanted else [f"{where} is {said}, recorded {wanted}"]


def assert_like(said: Any, recording: Any) -> None:
    assert differs(shape(said), shape(recording)) == []


def test_the_comparison_sees_a_missing_a_strange_and_a_wrong_field() -> None:
    said, wanted = shape({"a": 1, "c": [{"d": 1}], "e": 0}), shape({"a": "1", "b": 2, "c": [{"d": "x"}]})
    assert sorted(differs(said, wanted)) == [
        ".a is number, recorded str",
        ".b is missing",
        ".c[].d is number, recorded str",
        ".e is too much",
    ]


def containers(agent: Lazy) -> Any:
    return ask(
        agent, "POST", "/api/v1", {"type": "GET_CONTAINERS", "get_containers": {"show_nested": True}}
    ).json


def test_get_containers_while_the_plugin_runs(agent: Lazy) -> None:
    launch(agent)
    assert_like(containers(agent), recorded("agent-get-containers.during-add"))


def test_get_containers_while_the_task_runs(agent: Lazy) -> None:
    agent.run(launch(agent))
    said, recording = containers(agent), recorded("agent-get-containers.running")
    # How much traffic it had is not simulated.
    for row in recording["get_containers"]["containers"]:
        for key in [key for key in row["resource_statistics"] if key.startswith("net_")]:
            del row["resource_statistics"][key]
    assert_like(said, recording)


@pytest.mark.parametrize("moment", ["during-add", "running"])
def test_state(agent: Lazy, moment: str) -> None:
    container = launch(agent, *([("task_label", "on-the-TaskInfo")] if moment == "running" else []))
    if moment == "running":
        agent.run(container)
    assert_like(ask(agent, "GET", "/state").json, recorded(f"agent-state.{moment}"))


def test_state_lists_what_has_ended_under_completed_frameworks(agent: Lazy) -> None:
    container = launch(agent, ("task_label", "on-the-TaskInfo"))
    agent.run(container)
    agent.kill("labelled-1")
    said = ask(agent, "GET", "/state").json
    wanted = recorded("agent-state.during-add")["completed_frameworks"]
    assert_like(said["completed_frameworks"], wanted)
    assert said["frameworks"] == []


def test_get_agents(master: Instance, agent: Lazy) -> None:
    assert_like(ask(master, "POST", "/api/v1", {"type": "GET_AGENTS"}).json, recorded("master-get-agents"))


def test_get_tasks(master: Instance, agent: Lazy) -> None:
    agent.run(launch(agent, ("task_label", "on-the-TaskInfo")))
    agent.kill("labelled-1")
    said = ask(master, "POST", "/api/v1", {"type": "GET_TASKS"}).json
    assert_like(said, recorded("master-get-tasks"))
    assert len(said["get_tasks"]["completed_tasks"]) == 1


def test_subscribe(master: Instance, agent: Lazy) -> None:
    agent.run(launch(agent, ("task_label", "on-the-TaskInfo")))
    with listen(master, "/api/v1", "POST", {"type": "SUBSCRIBE"}) as stream:
        subscribed, heartbeat = stream.record(), stream.record()
        agent.kill("labelled-1")
        updated = stream.record()
    events = {event["type"]: event for event in reversed(recorded("master-subscribe-events"))}
    assert_like(heartbeat, events["HEARTBEAT"])
    assert_like(updated, events["TASK_UPDATED"])
    # Offers and allocations are not simulated.
    wanted = events["SUBSCRIBED"]
    for agent_row in wanted["subscribed"]["get_state"]["get_agents"]["agents"]:
        del agent_row["allocated_resources"]
    assert_like(subscribed, wanted)


def test_a_pods_containers_are_nested_in_its_executors(agent: Lazy) -> None:
    tasks = [TaskInfo(f"pod.{name}", name, Plain.framework, executor="pod") for name in ("one", "two")]
    agent.master.launch(agent.id, tasks)
    (container,) = agent.containers.values()
    agent.run(container)
    listed = [row["container_id"] for row in containers(agent)["get_containers"]["containers"]]
    assert listed[0] == {"value": container.id}
    assert [id_["parent"] for id_ in listed[1:]] == [{"value": container.id}] * 2
    (executor,) = ask(agent, "GET", "/state").json["frameworks"][0]["executors"]
    assert (executor["id"], [task["id"] for task in executor["tasks"]]) == ("pod", ["pod.one", "pod.two"])
