"""STATUS of a real agent: an engine is told beforehand that an ADD would be refused."""

from __future__ import annotations

import contextlib

import pytest

from moorage.lab import Lab, LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


def test_an_exhausted_network_is_not_ready_and_the_others_are(node: LabNode) -> None:
    node.cli("network", "create", "small", "--pool", "10.66.0.0/30")
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(node.container()) for _ in range(3))
        assert (first.add("small").exit, second.add("small").exit) == (0, 0)
        assert third.status("small").exit == 0
        refused = third.add("small")
        assert refused.json["code"] == 11
        status = third.status("small")
        assert (status.exit, status.json["code"]) == (1, 50)
        assert status.json["msg"] == refused.json["msg"]
        assert [row["network"] for row in node.ask("status")["exhausted"]] == ["small"]
        assert third.status("web").exit == 0
        for container in (first, second):
            container.delete("small")


def test_a_drained_node_is_not_ready(node: LabNode) -> None:
    container = node.container()
    assert container.status("web").exit == 0
    node.cli("node", "drain", "node")
    status = container.status("web")
    assert status.json["code"] == 50
    assert "is drained" in status.json["msg"]
    node.cli("node", "drain", "node", "--undo")
    assert container.status("web").exit == 0


@pytest.mark.etcd
def test_without_its_store_a_node_is_ready_for_as_long_as_addresses_are_warm() -> None:
    with Lab(nodes=1) as lab, contextlib.ExitStack() as stack:
        lab.start()
        [node] = lab.nodes
        node.cli("network", "create", "web", "--pool", "10.64.0.0/24")
        containers = [stack.enter_context(node.container()) for _ in range(24)]
        assert containers[0].add("web").exit == 0
        eventually(lambda: any(row["state"] == "warm" for row in node.ask("status")["addresses"]))
        lab.etcd.kill()
        assert containers[0].status("web").exit == 0
        refused = next(answer for answer in (one.add("web") for one in containers[1:]) if answer.exit)
        assert refused.json["code"] == 11
        status = containers[0].status("web").json
        assert (status["code"], "is warm on node n1" in status["msg"]) == (50, True)


@pytest.mark.etcd
def test_a_gateway_is_never_ready_for_containers() -> None:
    with Lab(nodes=1, gateway=True) as lab:
        lab.start()
        assert lab.gateway is not None
        lab.gateway.cli("network", "create", "web", "--pool", "10.64.0.0/24")
        status = lab.gateway.container().status("web").json
        assert (status["code"], "is a gateway" in status["msg"]) == (50, True)
