"""What a look at the table says for one endpoint, whatever of the table somebody took."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from isolator.drivers.naming import mac_for
from isolator.errors import KernelRefused
from isolator.model import PortMapping
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import Admission, Hosts, Policy, Surroundings
from isolator.policy.names import set_of_netgroup
from isolator.policy.table import wrong_in
from tests.isolator.rooms import POOLS, Room, wrong_sets

pytestmark = pytest.mark.kernel

AROUND = Surroundings(
    pools=POOLS,
    nat_pools=(POOLS[0], POOLS[2]),
    open_pools=(ip_network("10.1.0.0/16"), ip_network("fd00:0:0:0:1::/80")),
    tunnelled_pools=(POOLS[0], POOLS[2]),
    store_pools=(POOLS[0], POOLS[2]),
)
PORTS = (PortMapping("tcp", 8080, 80), PortMapping("udp", 53, 53, ip_address("192.0.2.1")),
         PortMapping("udp", 53, 53, ip_address("2001:db8::1")))  # fmt: skip
HOSTS = Hosts(
    nodes=frozenset([ip_address("192.0.2.9"), ip_address("2001:db8::9")]),
    underlays=frozenset([ip_address("192.0.2.9"), ip_address("2001:db8::9")]),
    here=frozenset([ip_address("192.0.2.1"), ip_address("2001:db8::1")]),
    tunnels=frozenset([4789]),
    tunnel=4789,
    stores=frozenset([(ip_address("192.0.2.8"), 2379), (ip_address("2001:db8::8"), 2379)]),
)
OTHERS = (
    (ip_address("10.0.9.9"), ("web", "db", "public")),
    (ip_address("fd00::9:9"), ("web", "db", "public")),
)


def endpoint(number: int, *netgroups: str) -> Admission:
    """One of many dual-stack endpoints."""
    ips = (ip_address("10.0.0.0") + number, ip_address("fd00::") + number)
    return Admission(f"mrg{number:012d}", mac_for(ips), ips, "web", netgroups or ("web",))


DB4 = set_of_netgroup("db", 4)
ONE, OTHER = replace(endpoint(1), ports=PORTS), endpoint(2, "db")


@pytest.fixture
def policy(container: Room) -> Iterator[Policy]:
    """A table in which nothing is empty, with two endpoints that share no netgroup."""
    policy = container.do(Policy)
    container.do(policy.restore, [ONE, OTHER], AROUND)
    container.do(policy.set_hosts, HOSTS)
    container.do(policy.set_others, OTHERS)
    assert container.do(wrong_sets, policy) == {}
    yield policy
    container.do(policy.close)


def differences(container: Room, policy: Policy, endpoint: Admission) -> list[str]:
    wrong = container.do(wrong_sets, policy)
    return container.do(policy.differences, endpoint.host_ifname, wrong)


def listed(container: Room, kind: str) -> list[str]:
    """Names of all chains, sets or maps of the table."""
    table = json.loads(container.sh("nft -j list table inet moorage"))["nftables"]
    return [entry[kind]["name"] for entry in table if kind in entry]


def test_every_chain_that_was_emptied_is_named(container: Room, policy: Policy) -> None:
    chains = listed(container, "chain")
    assert len(chains) > 20
    for chain in chains:
        container.sh(f"nft flush chain inet moorage {chain}")
        assert differences(container, policy, ONE) == [f"the firewall's chain {chain} is gone or was changed"]
        container.do(policy.restore, [ONE, OTHER], AROUND)
        assert differences(container, policy, ONE) == []


def test_every_set_that_was_emptied_is_named(container: Room, policy: Policy) -> None:
    emptied = 0
    for kind in ("set", "map"):
        for name in listed(container, kind):
            if name == "over_limit" or name in ("halted", set_of_netgroup("db", 4), set_of_netgroup("db", 6)):
                continue  # its elements go by themselves; another endpoint's; empty as it should be
            assert "elements" in container.sh(f"nft list {kind} inet moorage {name}"), name
            container.sh(f"nft flush {kind} inet moorage {name}")
            found = differences(container, policy, ONE)
            assert found, name
            assert all(f"set {name} " in sentence for sentence in found)
            emptied += 1
            container.do(policy.restore, [ONE, OTHER], AROUND)
            assert differences(container, policy, ONE) == []
    assert emptied > 30


def test_what_concerns_another_endpoint_alone_is_not_held_against_this_one(
    container: Room, policy: Policy
) -> None:
    container.sh(f"nft flush set inet moorage {DB4}")
    container.sh(f"nft 'delete element inet moorage endpoints4 {{ \"{OTHER.host_ifname}\" . 10.0.0.2 }}'")
    assert differences(container, policy, ONE) == []
    assert differences(container, policy, OTHER) == [
        f'the firewall\'s set endpoints4 lacks "{OTHER.host_ifname}" . 10.0.0.2',
        f"the firewall's set {DB4} does not hold what it should",
    ]


def test_an_endpoint_that_nobody_admitted_is_named(container: Room, policy: Policy) -> None:
    assert container.do(policy.differences, "mrgstranger", {}) == [
        "the firewall admits nothing on mrgstranger"
    ]
    container.sh("nft delete table inet moorage")
    gone = ["the firewall's table inet moorage is gone or was made by somebody else"]
    assert differences(container, policy, ONE) == gone


@pytest.mark.parametrize(
    ("name", "element"),
    [("halted", f'"{ONE.host_ifname}"'), ("endpoints4", f'"{ONE.host_ifname}" . 10.0.0.9'),
     ("hairpin6", "fd00::1 . fd00::9")],
)  # fmt: skip
def test_what_somebody_added_for_the_endpoint_is_named(
    container: Room, policy: Policy, name: str, element: str
) -> None:
    container.sh(f"nft 'add element inet moorage {name} {{ {element} }}'")
    assert differences(container, policy, ONE) == [
        f"the firewall's set {name} holds {element}, which it should not"
    ]
    assert differences(container, policy, OTHER) == []


def test_a_snapshot_is_not_held_against_what_came_after_it(container: Room, policy: Policy) -> None:
    container.sh("nft add table inet other")
    snapshot = container.do(policy.snapshot)
    assert snapshot is not None
    container.do(policy.admit, endpoint(3))
    assert not container.do(policy.is_still, snapshot)
    netfilter = container.do(NetlinkSocket, NETLINK_NETFILTER)
    assert wrong_in(netfilter, snapshot), "ours that came in between looks like somebody's"
    netfilter.close()
    container.do(policy.trust_sets, snapshot)
    assert container.do(policy.snapshot) is not None, "and nothing was trusted that was not looked at"


OWN_SETS = (
    "senders4", "senders6", "endpoints4", "receivers6", "quoted4", "connections", "ports4", "portsat6", "hairpin4",
    set_of_netgroup("web", 4), set_of_netgroup("web", 6), "pools4", "pools6", "nat4", "nat6", "tunnelled4", "tostore6",
)  # fmt: skip


@pytest.mark.parametrize("name", OWN_SETS)
def test_an_admission_that_is_not_in_place_is_noticed_at_once(
    container: Room, policy: Policy, name: str
) -> None:
    container.do(policy.verify, ONE.host_ifname)
    container.sh("nft add table inet other")
    container.do(policy.verify, ONE.host_ifname)
    container.sh(f"nft flush set inet moorage {name} 2>/dev/null || nft flush map inet moorage {name}")
    with pytest.raises(KernelRefused, match=name) as refused:
        container.do(policy.verify, ONE.host_ifname)
    assert refused.value.errno == errno.ENOENT
    assert name in container.do(wrong_sets, policy)
    container.do(policy.restore, [ONE, OTHER], AROUND)
    container.do(policy.verify, ONE.host_ifname)


def test_a_chain_that_was_emptied_is_noticed_by_the_next_admission(container: Room, policy: Policy) -> None:
    container.sh("nft flush chain inet moorage leaving")
    with pytest.raises(KernelRefused, match="inet moorage") as refused:
        container.do(policy.verify, ONE.host_ifname)
    assert refused.value.errno == errno.ENOENT


def test_an_address_that_is_to_be_in_no_such_network_is_noticed(container: Room, policy: Policy) -> None:
    container.sh("nft 'add element inet moorage open4 { 10.0.0.0/24 }'")
    with pytest.raises(KernelRefused, match="open4"):
        container.do(policy.verify, ONE.host_ifname)


def test_changes_of_others_are_told_from_our_own(container: Room, policy: Policy) -> None:
    """Or every container that comes and goes would have all firewalls of the node read."""
    before = container.do(policy.changes_of_others)
    container.do(policy.admit, endpoint(3, "db"))
    container.do(policy.set_others, [(ip_address("10.0.9.8"), ("web",))])
    container.do(policy.revoke, [endpoint(3).host_ifname])
    container.do(policy.restore, [ONE, OTHER], AROUND)
    assert container.do(policy.changes_of_others) == before
    container.sh("nft add table inet other")
    assert container.do(policy.changes_of_others) != before
