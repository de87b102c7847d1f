"""A store dumped and loaded into another one, under containers that go on."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


def test_containers_go_on_with_a_loaded_store(node: LabNode) -> None:
    with node.container() as old, node.container() as new:
        ips = old.add("web").ips
        file = str(node.directory / "dump")
        assert "agents are running: node" in node.cli("store", "dump", file, check=False).stderr
        node.stop()
        assert node.ask("store", "dump", file)["count"] > 3
        node._store = f"sqlite://{node.directory}/other.db"
        node.cli("store", "load", file)
        node.start()
        eventually(lambda: node.ask("status")["problem"] == "")
        assert [row["state"] for row in node.ask("endpoint", "list")] == ["attached"]
        assert {row["address"] for row in node.ask("ip", "list", "--state", "assigned")} == {
            str(ip) for ip in ips.values()
        }
        assert node.namespace.pings(ips[4])
        assert new.add("web").exit == 0
        check = node.ask("ip", "check")
        assert (check["findings"], check["nodes_asked"]) == ([], 1)
        assert old.delete("web").exit == 0
        assert new.delete("web").exit == 0
