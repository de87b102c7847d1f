"""``moorage doctor`` on a node where something is wrong, and whether what it says helps."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.system.conftest import listening

pytestmark = pytest.mark.kernel


def test_a_drop_in_somebody_elses_table_is_found_with_the_command_that_helps(node: LabNode) -> None:
    with node.container("a") as a, node.container("b") as b:
        a.add("web")
        ips = b.add("web").ips
        node.cli("network", "set", "web", "--dns", "10.0.0.53")
        assert (
            node.cli("doctor").stdout
            == "agent, certificates, forwarding, firewalls, networks, ports: nothing is wrong.\n"
        )
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
    node.kill()
    node.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    rows = node.cli("doctor", "-o", "json", check=False)
    assert rows.returncode == 1
    for words in (
        "no agent answers",
        "net.ipv4.ip_forward is 0",
        "127.0.0.53",
        "sysctl -w net.ipv4.ip_forward=1",
    ):
        assert words in rows.stdout


def test_a_process_that_listens_on_a_mapped_port_in_vain_is_found(node: LabNode) -> None:
    node.cli("network", "set", "web", "--dns", "10.0.0.53")
    mapping = {"host_port": 31080, "container_port": 80, "protocol": "tcp"}
    with node.container() as container:
        assert container.add("web", port_mappings=[mapping]).exit == 0
        with listening(node, "tcp", "::1", 31080), listening(node, "udp", "0.0.0.0", 31080):
            assert node.cli("doctor").returncode == 0, "these lose nothing"
        with listening(node, "tcp", "0.0.0.0", 31080) as pid:
            (found,) = node.ask("doctor", check=False)
        assert found["check"] == "ports"
        for words in ("tcp port 31080", f"{container.id}/eth0", f"(pid {pid})", "another host port"):
            assert words in found["problem"]
        assert node.cli("doctor").returncode == 0


def test_a_mapping_of_an_address_that_the_node_lost_is_found(node: LabNode) -> None:
    node.cli("network", "set", "web", "--dns", "10.0.0.53")
    node.namespace.run("ip", "address", "add", "198.18.0.7/32", "dev", "lo")
    mapping = {"hostPort": 31080, "containerPort": 80, "hostIP": "198.18.0.7"}
    config = {"name": "web", "type": "moorage-cni", "cniVersion": "1.0.0", "socket": str(node.socket)}
    with node.container() as container:
        answer = container.call("ADD", {**config, "runtimeConfig": {"portMappings": [mapping]}})
        assert answer.exit == 0, answer.stdout
        node.namespace.run("ip", "address", "delete", "198.18.0.7/32", "dev", "lo")
        (found,) = node.ask("doctor", check=False)
        assert "does not have 198.18.0.7" in found["problem"]
