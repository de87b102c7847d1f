"""A container on several networks of one node: what it sends without choosing an address is taken for its own by the
network that it is sent to."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode

pytestmark = pytest.mark.kernel


def test_an_unbound_connection_to_a_member_of_another_network_of_its_own_gets_there(node: LabNode) -> None:
    node.cli("network", "create", "db", "--pool", "10.65.0.0/16", "--pool", "fd65::/64")
    with node.container() as both, node.container() as member:
        both.add("web", "eth0")
        both.add("db", "eth1")
        for ip in member.add("db").ips.values():
            assert both.namespace.pings(ip, wait=2), ip
