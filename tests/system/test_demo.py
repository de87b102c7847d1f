"""The demo as a user runs it, beside an agent with live containers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moorage.lab import LabNode
from tests.system.conftest import elements, links, routes

pytestmark = pytest.mark.kernel


def machine(node: LabNode) -> tuple[object, ...]:
    """Everything of ours that can be seen from where the demo runs."""
    return (
        links(node),
        routes(node),
        elements(node),
        node.namespace.run("ip", "rule").stdout,
        node.ask("ip", "list"),
    )


def test_the_demo_ends_with_0_and_leaves_an_agent_beside_it_and_its_containers_alone(node: LabNode) -> None:
    with node.container("a") as a, node.container("b") as b:
        a.add("web")
        ips = b.add("web").ips
        node.cli("ip", "check")
        before = machine(node)
        ping = a.namespace.start("ping", "-n", "-q", "-i", "0.05", "-w", "60", ips[4], stdout=subprocess.PIPE)
        demo = node.namespace.run(sys.executable, "-m", "moorage.lab.demo", check=False)
        ping.terminate()
        ping.communicate()
        assert demo.returncode == 0, demo.stdout + demo.stderr
        assert machine(node) == before
        assert a.namespace.pings(ips[4])
        assert a.namespace.pings(ips[6])
        for each in (a, b):
            each.delete("web")
