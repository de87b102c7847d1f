"""``moorage doctor`` on a node where something is wrong, and whether what it says helps."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode

pytestmark = pytest.mark.kernel


def test_a_drop_in_somebody_elses_table_is_found_with_the_command_that_helps(node: LabNode) -> None:
    with node.container("a") as a, node.container("b") as b:
        a.add("web")
        ips = b.add("web").ips
        node.cli("network", "set", "web", "--dns", "10.0.0.53")
        assert node.cli("doctor").stdout == "agent, forwarding, firewalls, networks: nothing is wrong.\n"
        node.namespace.run(
            "nft", "table inet theirs { chain f { type filter hook forward priority 0; policy drop; }; }"
        )
        assert not a.namespace.pings(ips[4], wait=1)
        found = node.cli("doctor", check=False)
        assert found.returncode == 1
        first, *commands = found.stdout.splitlines()
        assert first.startswith("firewall: chain f of table inet theirs drops containers' traffic")
        for command in commands:
            node.namespace.run("sh", "-ec", command)
        assert a.namespace.pings(ips[4])
        assert node.cli("doctor").returncode == 0


def test_what_is_off_is_found(node: LabNode) -> None:
    node.cli("network", "set", "web", "--dns", "127.0.0.53")
    node.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    node.kill()
    rows = node.cli("doctor", "-o", "json", check=False)
    assert rows.returncode == 1
    for words in (
        "no agent answers",
        "net.ipv4.ip_forward is 0",
        "127.0.0.53",
        "sysctl -w net.ipv4.ip_forward=1",
    ):
        assert words in rows.stdout
