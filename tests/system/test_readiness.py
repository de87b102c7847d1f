"""STATUS of a real agent: an engine is told beforehand that an ADD would be refused."""

from __future__ import annotations

import contextlib

import pytest

from moorage.lab import LabNode

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
