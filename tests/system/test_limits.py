"""What apps ask for beyond an address: refused until the network allows it, and then kept to."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from moorage.lab import Container, LabNode
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = pytest.mark.kernel

BANDWIDTH = {"moorage.bandwidth.ingress": "10mbit", "moorage.bandwidth.egress": "20mbit"}


def buckets(node: LabNode) -> list[str]:
    """The rates of all token buckets on the node, with the beginning of the interface's name."""
    shown = node.namespace.run("tc", "qdisc").stdout.splitlines()
    words = [line.split() for line in shown if line.startswith("qdisc tbf")]
    return sorted(f"{line[line.index('dev') + 1][:4]} {line[line.index('rate') + 1]}" for line in words)


def shapers(node: LabNode) -> list[str]:
    return [name for name in links(node) if name.startswith("mrg-")]


ASKED: list[dict[str, Any]] = [
    {"labels": {"moorage.netgroups": "web,db"}},
    {"labels": {"moorage.netgroups": "public"}},
    {"labels": {"moorage.mac": "02:00:00:00:00:01"}},
    {"labels": {"moorage.ip": "10.66.3.9"}},
    {"labels": {"moorage.bandwidth.egress": "2gbit"}},
    {"groups": ["db"]},
    {"ip_addresses": [{"ip_address": "10.66.6.9"}]},
    {"port_mappings": [{"host_port": 8080, "container_port": 80}]},
]


def test_what_a_network_does_not_allow_is_refused_until_its_operator_does_as_the_error_says(
    node: LabNode,
) -> None:
    with node.container() as container:
        for number, asked in enumerate(ASKED):
            name = f"n{number}"
            limit = ("--max-bandwidth", "1gbit") if "bandwidth" in str(asked) else ()
            node.cli("network", "create", name, "--pool", f"10.66.{number}.0/24", *limit)
            answer = container.add(name, **asked)
            assert answer.json["code"] == 106, asked
            assert links(node) == []
            node.cli(*shlex.split(answer.json["msg"].partition("`moorage ")[2].rstrip("`")))
            eventually(lambda name=name, asked=asked: container.add(name, **asked).exit == 0)
            container.delete(name, **asked)
            eventually(lambda: links(node) == [])
        assert_nothing_left(node)


def test_limits_stand_while_their_endpoint_does(node: LabNode) -> None:
    with node.container() as container, node.container() as dying:
        both = ["mrg- 20Mbit", "mrg- 20Mbit"]
        assert container.add("web", labels=BANDWIDTH).exit == 0
        assert dying.add("web", labels={"moorage.bandwidth.egress": "20mbit"}).exit == 0
        kept = [name for name in buckets(node) if name.startswith("mrg-")]
        assert kept == both
        assert len(buckets(node)) == 3
        node.kill()
        node.start()
        assert len(buckets(node)) == 3
        assert node.cli("ip", "check").returncode == 0
        dying.namespace.delete()
        eventually(lambda: len(shapers(node)) == 1)
        container.delete("web", labels=BANDWIDTH)
        assert_nothing_left(node)


def test_limits_that_somebody_removes_are_restored_within_seconds(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web", labels=BANDWIDTH).ips
        (name,) = (name for name in links(node) if not name.startswith("mrg-"))
        whole = buckets(node)
        node.namespace.run("tc", "qdisc", "del", "dev", name, "root")
        eventually(lambda: buckets(node) == whole)
        node.namespace.run("ip", "link", "del", shapers(node)[0])
        eventually(lambda: buckets(node) == whole)
        eventually(lambda: node.namespace.pings(ips[4]))
        container.delete("web", labels=BANDWIDTH)
        assert_nothing_left(node)


def test_a_limit_without_an_endpoint_is_found_and_repaired(node: LabNode) -> None:
    node.namespace.run("ip", "link", "add", "mrg-aaaaaaaaaaa", "type", "ifb")
    found = node.cli("ip", "check", check=False)
    assert found.returncode == 1
    assert "mrg-aaaaaaaaaaa" in found.stdout
    assert "is a limit without an endpoint" in found.stdout
    assert node.cli("ip", "check", "--repair").returncode == 0
    assert shapers(node) == []


def test_a_network_limits_who_asks_for_nothing(node: LabNode) -> None:
    node.cli("network", "set", "web", "--max-bandwidth", "50mbit")
    with node.container() as container:
        eventually(lambda: _added_with_limits(node, container))
        assert {bucket.split()[1] for bucket in buckets(node)} == {"50Mbit"}
        container.delete("web")
        assert_nothing_left(node)


def _added_with_limits(node: LabNode, container: Container) -> bool:
    container.add("web")
    if len(buckets(node)) == 2:
        return True
    container.delete("web")
    return False
