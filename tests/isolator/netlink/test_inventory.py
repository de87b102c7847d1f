"""What the kernel holds for us: found, and removed."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from isolator.netlink import delete_links, delete_routes, name_back, our_links, our_routes, our_rules
from isolator.netlink.inventory import link_by_name
from tests.isolator.rooms import NOTHING, Machine, Room

pytestmark = pytest.mark.kernel


def test_endpoints_links_and_routes_are_found(machine: Machine, container: Room) -> None:
    names = [machine.attach(container, f"eth{i}", f"10.0.0.{i}", f"fd00::{i}").host_ifname for i in (1, 2)]
    links = machine.do(our_links, machine.node)
    assert sorted(links) == sorted(names)
    first = links[names[0]]
    assert (first.up, first.mac, first.mtu) == (True, "ee:ee:ee:ee:ee:ee", 1450)
    routes = {(route.destination, route.index, route.table) for route in machine.do(our_routes, machine.node)}
    assert routes == {
        (ip_network(f"{prefix}{i}"), links[name].index, 254)
        for prefix in ("10.0.0.", "fd00::")
        for i, name in enumerate(names, 1)
    }


def test_a_link_that_somebody_renamed_is_found_by_its_own_name_and_named_back(
    machine: Machine, container: Room
) -> None:
    name = machine.attach(container, "eth0", "10.0.0.1").host_ifname
    machine.sh(f"ip link set {name} name lan0")
    (link,) = machine.do(our_links, machine.node).values()
    assert (link.own_name, link.name) == (name, "lan0")
    assert machine.do(name_back, machine.node, [link]) == []
    assert machine.do(our_links, machine.node)[name].name == name
    assert name in machine.sh("ip route show 10.0.0.1")


def test_a_link_whose_name_another_one_has_keeps_the_one_it_was_given(
    machine: Machine, container: Room
) -> None:
    name = machine.attach(container, "eth0", "10.0.0.1").host_ifname
    machine.sh(f"ip link set {name} name lan0")
    link = machine.do(our_links, machine.node)[name]
    machine.sh(f"ip link add {name} type veth peer name peer")
    assert machine.do(our_links, machine.node)[name].name == name, "the one that has the name now"
    assert len(machine.do(name_back, machine.node, [link])) == 1
    machine.sh(f"ip link delete {name}")
    assert machine.do(name_back, machine.node, [link]) == []


def test_a_link_of_somebody_else_is_not_taken_for_ours_by_its_alias(machine: Machine) -> None:
    machine.sh("ip link add other type veth peer name peer; ip link set other alias 'moorage other'")
    assert machine.do(our_links, machine.node) == {}


def test_what_a_container_wrote_on_an_interface_that_it_moved_here_is_nobodys_word(
    machine: Machine, container: Room
) -> None:
    name = machine.attach(container, "eth0", "10.0.0.1").host_ifname
    ours = machine.do(our_links, machine.node)[name]
    # It may read what is written here, and choose indexes.
    container.sh(
        f"ip link add evil index 4711 type veth peer name inside; ip link set evil alias '{ours.alias}'\n"
        f"ip link add again index {ours.index} type veth peer name inside2; ip link set again alias '{ours.alias}'"
    )
    container.sh(f"ip link set evil netns {machine.name}")
    assert machine.do(our_links, machine.node) == {name: ours}
    machine.sh(f"ip link delete {name}")
    container.sh(f"ip link set again netns {machine.name}")
    moved = machine.do(lambda: link_by_name(machine.node.route, "again"))
    assert moved is not None
    assert (moved.index, moved.alias) == (ours.index, ours.alias)
    assert machine.do(our_links, machine.node) == {}


def test_routes_of_every_table_and_kind_are_found_and_deleted(machine: Machine) -> None:
    machine.sh(
        "ip route add 10.9.0.0/24 dev uplink proto 157 table 4711\n"
        "ip route add blackhole 10.9.1.0/24 proto 157\n"
        "ip route add 10.9.2.0/24 via 192.0.2.2 proto 157 metric 5\n"
        "ip -6 route add blackhole fd09::/64 proto 157\n"
        "ip route add 10.9.3.0/24 dev uplink\n"
    )
    routes = machine.do(our_routes, machine.node)
    assert {(str(route.destination), route.table, bool(route.index)) for route in routes} == {
        ("10.9.0.0/24", 4711, True),
        ("10.9.1.0/24", 254, False),
        ("10.9.2.0/24", 254, True),
        ("fd09::/64", 254, True),
    }
    for _ in range(2):
        machine.do(delete_routes, machine.node, routes)
        assert machine.do(our_routes, machine.node) == []
    assert "10.9.3.0/24" in machine.sh("ip route")


def test_our_rules_are_found(machine: Machine) -> None:
    machine.sh(
        "ip rule add from 10.9.0.1 lookup 4711 prio 99 proto 157; ip rule add from 10.9.0.2 lookup 4711"
    )
    machine.sh("ip -6 rule add from fd09::/64 lookup 4711 prio 98 proto 157")
    rules = machine.do(our_rules, machine.node)
    assert [(rule.family, rule.priority, rule.table, str(rule.source)) for rule in rules] == [
        (4, 99, 4711, "10.9.0.1/32"),
        (6, 98, 4711, "fd09::/64"),
    ]


def test_only_endpoints_links_are_ever_deleted(machine: Machine, container: Room) -> None:
    names = [machine.attach(container, f"eth{i}", f"10.0.0.{i}").host_ifname for i in range(3)]
    machine.do(delete_links, machine.node, ["uplink"])
    machine.do(delete_links, machine.node, [*names, "uplink", "mrgnothing"])
    assert "uplink" in machine.sh("ip link")
    assert machine.holds()["links"] == []


def test_nothing_to_delete_is_fine(machine: Machine) -> None:
    machine.do(delete_links, machine.node, [])
    machine.do(delete_links, machine.node, ["mrgnothing"])
    machine.do(delete_links, machine.node, ["mrgnothing", "mrgnothing2"])
    machine.do(delete_routes, machine.node, [])
    assert machine.holds() == NOTHING
