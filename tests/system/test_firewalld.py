"""A node that firewalld guards: what it blocks is found, what helps is said, and its reloads take nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually
from tests.system.firewalld import Firewalld

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@pytest.fixture
def firewalld(node: LabNode) -> Iterator[Firewalld]:
    node.cli("network", "set", "web", "--dns", "10.0.0.53", "--allow-netgroup", "red")
    with Firewalld(node) as firewalld:
        yield firewalld


def test_what_firewalld_blocks_is_found_and_its_own_commands_let_it_pass(
    node: LabNode, firewalld: Firewalld
) -> None:
    with node.container("a") as a, node.container("b") as b, node.container("red") as red:
        a.add("web")
        ips = b.add("web").ips
        red.add("web", labels={"moorage.netgroups": "red"})
        assert not any(a.namespace.pings(ip, wait=1) for ip in ips.values())
        found = node.cli("doctor", check=False)
        assert found.returncode == 1
        first, *commands = found.stdout.splitlines()
        assert first.startswith(
            "firewall: chain filter_FORWARD of table inet firewalld drops containers' traffic"
        )
        for command in commands:
            firewalld.sh(command)
        assert node.cli("doctor").returncode == 0
        assert all(a.namespace.pings(ip) for ip in ips.values())
        assert not any(red.namespace.pings(ip, wait=1) for ip in ips.values()), "netgroups count as before"

        for reload in ("--reload", "--complete-reload"):
            firewalld.sh(f"firewall-cmd {reload}")
            eventually(lambda: all(a.namespace.pings(ip, wait=1) for ip in ips.values()))
            assert not any(red.namespace.pings(ip, wait=1) for ip in ips.values()), reload
            assert node.cli("doctor").returncode == 0
        assert "restored" not in node.log.read_text(), "a reload takes nothing of ours"

        # A flush takes firewalld's rules, too; it reloads them once there is a table for it to delete.
        firewalld.sh("nft flush ruleset")
        firewalld.sh("nft add table inet firewalld; firewall-cmd --reload")
        eventually(lambda: "restored" in node.log.read_text())
        eventually(lambda: all(a.namespace.pings(ip, wait=1) for ip in ips.values()))
        assert not any(red.namespace.pings(ip, wait=1) for ip in ips.values())
