"""Two agents under one name: the newer one has it, the older one gives nothing out and says why."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


def test_the_older_of_two_agents_under_one_name_is_fenced_until_the_newer_one_ends(node: LabNode) -> None:
    with LabNode(node.name, store=node.store) as twin, node.container() as before, node.container() as after:
        ips = before.add("web").ips
        twin.start()
        eventually(lambda: "another agent" in node.ask("status")["problem"])
        refused = after.add("web")
        assert refused.json["code"] == 11
        assert "another agent" in refused.json["msg"]
        status = after.status("web").json
        assert (status["code"], "another agent" in status["msg"]) == (51, True)
        said = node.cli("ip", "check", check=False).stdout
        # By the command, of the agent beside it, or by that agent itself, if it answers in time.
        assert "is not in sync" in said or "out of sync with the store" in said
        assert node.namespace.pings(ips[4])
        assert before.delete("web").exit == 0
        assert twin.ask("status")["problem"] == ""
        twin.stop()
        eventually(lambda: node.ask("status")["problem"] == "")
        assert after.status("web").exit == 0
        assert after.add("web").exit == 0
        after.delete("web")
