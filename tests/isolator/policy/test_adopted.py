"""A table of an earlier agent lets nodes' own networks go."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from ipam.keys import IPNetwork
from ipam.ranges import Ranges, range_of
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import Surroundings
from isolator.policy.adopted import let_go
from isolator.policy.kernel import intervals
from tests.isolator.rooms import Machine

pytestmark = pytest.mark.kernel


def held(machine: Machine, name: str) -> Ranges:
    with machine.do(NetlinkSocket, NETLINK_NETFILTER) as netfilter:
        return machine.do(intervals, netfilter, name)


def ranges(*networks: str) -> Ranges:
    return Ranges(range_of(ip_network(network)) for network in networks)


def networks(*cidrs: str) -> tuple[IPNetwork, ...]:
    return tuple(map(ip_network, cidrs))


def test_what_the_kernel_holds_is_read_as_it_was_written(machine: Machine) -> None:
    pools = networks("10.0.0.0/24", "10.0.1.0/26", "10.0.9.9/32", "fd00::/64", "2000::/3")
    machine.do(machine.policy.set_surroundings, Surroundings(pools=pools))
    assert held(machine, "pools4") == ranges("10.0.0.0/24", "10.0.1.0/26", "10.0.9.9/32")
    assert held(machine, "pools6") == ranges("fd00::/64", "2000::/3")
    assert held(machine, "nat4") == Ranges()
    assert held(machine, "nothing4") == Ranges()


def test_only_nodes_own_networks_leave_the_pools(machine: Machine) -> None:
    pools = networks("10.0.0.0/24", "198.18.0.0/24", "fd98::/64")
    machine.do(machine.policy.set_surroundings, Surroundings(pools=pools, nat_pools=pools[:1]))
    closed = {4: ranges("198.18.0.0/24", "10.0.0.5/32"), 6: ranges("fd98::/64")}
    assert set(machine.do(let_go, closed)) == {"pools4", "pools6", "nat4"}
    rest = list(ip_network("10.0.0.0/24").address_exclude(ip_network("10.0.0.5/32")))
    assert held(machine, "pools4") == held(machine, "nat4") == ranges(*map(str, rest))
    assert held(machine, "pools6") == Ranges()
    assert machine.do(let_go, closed) == []
