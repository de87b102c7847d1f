"""An agent that asks its Mesos agent: which task an address is for, and what is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moorage.lab import Container, LabNode
from tests.patience import PATIENCE
from tests.standins.service import Asked, Reply, Service, reply
from tests.system.conftest import assert_nothing_left, eventually

pytestmark = pytest.mark.kernel

TASK = "group_web.instance-3f2504e0-4f89-11d3-9a0c-0305e82c3301._app.1"


class MesosAgent(Service):
    """Says that it runs what is in ``running``, and that what is in ``over`` ended: container id -> task."""

    def __init__(self, **place: Any) -> None:
        super().__init__(**place)
        self.running: dict[str, str] = {}
        self.over: dict[str, str] = {}

    def answer(self, asked: Asked) -> Reply:
        if asked.path == "/api/v1":
            rows = [
                {"container_id": {"value": c}, "executor_id": {"value": t}, "framework_id": {"value": "F"}}
                for c, t in self.running.items()
            ]
            return reply({"type": "GET_CONTAINERS", "get_containers": {"containers": rows}})
        executors = [{"id": task, "container": name} for name, task in self.running.items()]
        completed = [{"id": task, "container": name} for name, task in self.over.items()]
        framework = {"id": "F", "executors": executors, "completed_executors": completed}
        return reply({"id": "S1", "hostname": "h1", "frameworks": [framework]})


@pytest.fixture
def told() -> Iterator[tuple[LabNode, MesosAgent]]:
    """A node with a Mesos agent beside ours."""
    options = ["--mesos-agent-url", "http://127.0.0.1:5051"]
    with LabNode("node", options=options) as node, MesosAgent(place=node.namespace.path, port=5051) as mesos:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        yield node, mesos


def assigned(node: LabNode) -> list[dict[str, Any]]:
    return node.ask("ip", "list", "--state", "assigned")


def add(node: LabNode, mesos: MesosAgent, container: Container, task: str = TASK) -> str:
    mesos.running[container.id] = task
    return container.add("web").ips[4]


def test_an_address_says_which_task_it_is_for(told: tuple[LabNode, MesosAgent]) -> None:
    node, mesos = told
    with node.container() as container:
        ip = add(node, mesos, container)
        eventually(lambda: [row for row in assigned(node) if row["task"]])
        row = node.ask("ip", "show", ip)
        assert (row["task"], row["app"], row["framework"]) == (TASK, "/group/web", "F")
        assert node.ask("node", "show", "node")["mesos_agent"] == "S1"
        # It is told once, and stays so over a restart.
        node.agent.kill()
        node.start()
        assert node.ask("ip", "show", ip)["task"] == TASK
        container.delete("web")
        assert_nothing_left(node)


def test_a_task_that_ended_before_anybody_asked_is_told_all_the_same(
    told: tuple[LabNode, MesosAgent],
) -> None:
    node, mesos = told
    with node.container() as container:
        mesos.faults.status = 503
        add(node, mesos, container)
        mesos.over[container.id] = mesos.running.pop(container.id)
        mesos.faults.none()
        eventually(lambda: [row for row in assigned(node) if row["task"] == TASK])


@pytest.mark.slow
def test_a_lost_del_is_made_up_for_when_no_process_is_left(told: tuple[LabNode, MesosAgent]) -> None:
    node, mesos = told
    with node.container() as over, node.container() as going, node.container() as left_out:
        processes = [c.namespace.start("sleep", "1000") for c in (going, left_out)]
        gone, kept, unseen = (add(node, mesos, c) for c in (over, going, left_out))
        eventually(lambda: all(row["task"] for row in assigned(node)) and len(assigned(node)) == 3)
        for container in (over, going):
            mesos.over[container.id] = mesos.running.pop(container.id)
        del mesos.running[left_out.id]  # as for a caller that may not see it
        eventually(lambda: {row["address"] for row in assigned(node)} == {kept, unseen}, within=2 * PATIENCE)
        assert all(node.namespace.pings(ip) for ip in (kept, unseen))
        processes[0].kill()
        processes[0].wait()
        eventually(lambda: {row["address"] for row in assigned(node)} == {unseen}, within=2 * PATIENCE)
        assert gone not in {row["address"] for row in assigned(node)}
        processes[1].kill()
        processes[1].wait()
