"""Nodes drained, removed and adopted, with real agents and containers, on both stores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from moorage.lab import Lab, LabNode
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel

NewNode = Callable[[int], LabNode]
"""Makes a node called ``node`` on the store of the test, at that place on the underlay; a context manager."""


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
def new_node(request: pytest.FixtureRequest) -> Iterator[NewNode]:
    with contextlib.ExitStack() as stack:
        if request.param == "etcd":
            lab = stack.enter_context(Lab(nodes=0))
            yield lambda host: LabNode("node", store=lab.etcd.url, switch=lab.switch, host=host)
        else:
            first = LabNode("node")
            yield lambda host: first if host == 1 else LabNode("node", store=first.store)


@pytest.fixture
def node(new_node: NewNode) -> Iterator[LabNode]:
    """A node whose agent serves the dual-stack network ``web``."""
    with new_node(1) as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        yield node


def test_a_drained_node_runs_its_containers_refuses_new_ones_and_is_removed_when_they_end(
    node: LabNode,
) -> None:
    with node.container() as old, node.container() as new:
        ips = old.add("web").ips
        drained = node.ask("node", "drain", "node")
        left = [(row["state"], row["count"]) for row in drained["left"] if row["state"] != "own"]
        assert left == [("assigned", 1), ("assigned", 1)]
        assert drained["blocks"] == 2
        refused = new.add("web")
        assert refused.json["code"] == 11
        assert "node node is drained" in refused.json["msg"]
        node.kill()
        node.start()
        assert node.ask("status")["drained"] is True
        assert new.add("web").json["code"] == 11
        assert node.namespace.pings(ips[4])
        assert old.delete("web").exit == 0
        eventually(lambda: {row["state"] for row in node.ask("ip", "list")} <= {"cooling"})
        assert node.stop() == 0
        removed = node.ask("node", "remove", "node")
        assert set(removed["addresses"]) <= {"cooling"}
        assert node.ask("node", "list") == node.ask("ip", "list") == []


def test_a_drain_is_undone(node: LabNode) -> None:
    with node.container() as container:
        node.cli("node", "drain", "node")
        node.cli("node", "drain", "node", "--undo")
        assert node.ask("node", "show", "node")["drained"] is False
        assert container.add("web").exit == 0
        container.delete("web")


def test_a_node_is_not_removed_while_it_lives_and_by_force_once_it_is_dead(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web").ips
        assert "is running" in node.cli("node", "remove", "node", check=False).stderr
        node.stop()
        refused = node.cli("node", "remove", "node", check=False)
        assert refused.returncode == 1
        assert "2 assigned" in refused.stderr
        removed = node.ask("node", "remove", "node", "--force", "--yes", "node")
        assert removed["addresses"]["assigned"] == 2
        assert node.ask("ip", "list") == []
        # It was alive after all: what its container uses is asserted anew.
        node.start()
        eventually(lambda: node.ask("status")["problem"] == "")
        eventually(
            lambda: (
                {
                    row["address"]
                    for row in node.ask("ip", "list", "--state", "assigned")
                    if row["ifname"] == "eth0"
                }
                == {str(ip) for ip in ips.values()}
            )
        )
        assert node.namespace.pings(ips[4])
        assert node.cli("ip", "check").returncode == 0
        assert container.delete("web").exit == 0


def test_an_adopted_name_is_the_next_agents_and_the_old_one_is_fenced(
    node: LabNode, new_node: NewNode
) -> None:
    with (
        new_node(2) as twin,
        node.container() as refused,
        twin.container() as served,
    ):
        assert node.ask("node", "adopt", "node", "--yes", "node")["was_alive"] is True
        eventually(lambda: "moorage node adopt" in node.ask("status")["problem"])
        answer = refused.add("web")
        assert answer.json["code"] == 11
        assert "moorage node adopt" in answer.json["msg"]
        twin.start()
        assert served.add("web").exit == 0
        assert twin.ask("status")["problem"] == ""
        assert node.ask("status")["problem"] != ""
        served.delete("web")


def test_a_block_is_released_once_its_containers_ended(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        (block,) = [row["block"] for row in node.ask("block", "list", "--pool", "10.64.0.0/16")]
        refused = node.cli("block", "release", block, check=False)
        assert refused.returncode == 1
        assert "is assigned to" in refused.stderr
        container.delete("web")
        eventually(
            lambda: node.cli("block", "release", block, check=False).returncode == 0, within=2 * PATIENCE
        )
        assert node.cli("ip", "check").returncode == 0
