"""GC of a real agent: what a CNI runtime does not list is taken away, and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from moorage.lab import Container, LabNode
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = pytest.mark.kernel


def config(node: LabNode, name: str = "web", **fields: Any) -> dict[str, Any]:
    """What a runtime other than Mesos sends."""
    return {
        "cniVersion": "1.1.0",
        "name": name,
        "type": "moorage-cni",
        "socket": str(node.socket),
        **fields,
    }


def listing(*containers: Container, ifname: str = "eth0") -> dict[str, Any]:
    attachments = [{"containerID": container.id, "ifname": ifname} for container in containers]
    return {"cni.dev/valid-attachments": attachments}


def test_what_the_runtime_does_not_list_is_gone_and_the_rest_goes_on(node: LabNode) -> None:
    with contextlib.ExitStack() as stack:
        kept, left, of_mesos, elsewhere = (stack.enter_context(node.container()) for _ in range(4))
        for container in (kept, left):
            assert container.call("ADD", config(node)).exit == 0
        assert left.call("ADD", config(node), "eth1").exit == 0
        assert of_mesos.add("web").exit == 0
        assert elsewhere.call("ADD", config(node, "pods", network="web")).exit == 0
        ips = kept.call("ADD", config(node), "eth1").json["ips"]

        gc = kept.call("GC", config(node, **listing(kept), runtimeConfig={}))
        assert (gc.exit, gc.stdout) == (0, "")
        owners = {(row["container_id"], row["ifname"]) for row in node.ask("endpoint", "list")}
        assert owners == {(kept.id, "eth0"), (of_mesos.id, "eth0"), (elsewhere.id, "eth0")}
        assert len(links(node)) == 3
        assert not node.namespace.pings(ips[0]["address"].split("/")[0], wait=1)

        refused = kept.call("GC", config(node))
        assert (refused.exit, refused.json["code"]) == (1, 7)
        assert len(node.ask("endpoint", "list")) == 3

        assert kept.call("GC", config(node, **listing())).exit == 0
        assert kept.call("GC", config(node, "pods", **listing())).exit == 0
        assert [row["container_id"] for row in node.ask("endpoint", "list")] == [of_mesos.id]
        of_mesos.delete("web")
        assert_nothing_left(node)


def test_garbage_of_before_a_restart_is_collected_after_it(node: LabNode) -> None:
    with node.container() as kept, node.container() as left:
        for container in (kept, left):
            assert container.call("ADD", config(node)).exit == 0
        node.kill()
        assert kept.call("GC", config(node, **listing(kept))).json["code"] == 11
        node.start()
        assert kept.call("GC", config(node, **listing(kept))).exit == 0
        assert [row["container_id"] for row in node.ask("endpoint", "list")] == [kept.id]
        assert kept.call("DEL", config(node)).exit == 0
        assert_nothing_left(node)


def test_an_add_under_way_while_garbage_is_collected_succeeds(node: LabNode) -> None:
    with contextlib.ExitStack() as stack:
        containers = [stack.enter_context(node.container()) for _ in range(12)]
        adding = [container.start_call("ADD", config(node)) for container in containers]
        collecting = [node.container().start_call("GC", config(node, **listing())) for _ in range(4)]
        for call in collecting:
            assert Container.finish_call(call).exit == 0
        answers = [Container.finish_call(call) for call in adding]
        assert {answer.exit for answer in answers} == {0}
        # What had been attached when a GC was asked for is gone again; what was attached later is there, and works.
        for row in node.ask("endpoint", "list"):
            assert node.namespace.pings(row["addresses"][0])
        for container in containers:
            assert container.call("DEL", config(node)).exit == 0
        assert_nothing_left(node)


def test_status_says_why_an_add_would_fail(node: LabNode) -> None:
    container = node.container()
    assert container.call("STATUS", config(node)).exit == 0
    unknown = container.call("STATUS", config(node, "wbe")).json
    assert (unknown["code"], unknown["details"]) == (7, "known networks: web")
    node.kill()
    away = container.call("STATUS", config(node)).json
    assert away["code"] == 50
    assert "no moorage agent answers" in away["msg"]
    node.start()
    eventually(lambda: container.call("STATUS", config(node)).exit == 0)
