"""Every call that was recorded from a real Mesos agent, in order, against the real hook and agent.

stdin is sent byte for byte; only the namespace paths are replaced by live ones. What has to come out
stands in tests/data/mesos/expectations.json.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moorage.lab import LabNode, Namespace, unique
from moorage.lab.container import HOOK
from tests.system.conftest import assert_nothing_left

pytestmark = pytest.mark.kernel

DATA = Path(__file__).parent.parent / "data" / "mesos"


def test_every_recorded_call_is_answered_as_mesos_needs_it() -> None:
    calls = json.loads((DATA / "cni-calls.json").read_text())
    table = json.loads((DATA / "expectations.json").read_text())
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(LabNode("replay"))
        node.start()
        for name, pools in table["networks"].items():
            rules = ("--allow-static", "all", "--allow-netgroup", "*")
            node.cli("network", "create", name, *rules, *(w for pool in pools for w in ("--pool", pool)))
        namespaces: dict[str, Namespace] = {}
        for call, expected in zip(calls, table["calls"], strict=True):
            assert (call["run"], call["call"]) == (expected["run"], expected["call"])
            _replay(node, stack, namespaces, call, expected)
        assert_nothing_left(node)


def _replay(
    node: LabNode,
    stack: contextlib.ExitStack,
    namespaces: dict[str, Namespace],
    call: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    environment = {**call["env"], "MOORAGE_SOCKET": str(node.socket)}
    container = environment["CNI_CONTAINERID"]
    if "CNI_NETNS" in environment:
        if container not in namespaces:
            namespaces[container] = stack.enter_context(Namespace(unique("replay")))
        environment["CNI_NETNS"] = str(namespaces[container].path)
    result = subprocess.run([HOOK], env=environment, input=call["stdin"], text=True, capture_output=True)
    where = f"{call['run']} {call['call']}"
    assert result.returncode == expected["exit"], f"{where}: {result.stdout}"
    if expected["command"] != "ADD":
        assert result.stdout == expected["stdout"], where
        return
    answer = json.loads(result.stdout)
    assert ("ip4" in answer, "ip6" in answer) == (expected["ip4"], expected["ip6"]), where
    assert answer["cniVersion"] == expected["cniVersion"], where
    ips = [answer[field]["ip"].split("/")[0] for field in ("ip4", "ip6") if field in answer]
    assert set(expected["static"]) <= set(ips), where
    for ip in ips:
        assert node.namespace.pings(ip), f"{where}: {ip} does not answer"
    row = node.ask("ip", "show", ips[0])
    record = row[0] if isinstance(row, list) else row
    assert record["container_id"] == container, where
    assert record["network"] == expected["network"], where
    recorded = [(label["key"], label.get("value")) for label in record["labels"]]
    assert recorded == [tuple(label) for label in expected["labels"]], where
    if expected["netgroups"]:
        assert record["netgroups"] == expected["netgroups"], where
