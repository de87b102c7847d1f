"""What has to be in the kernel, worked out of other nodes' facts, whatever is in those."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.keys import Family, IPNetwork
from ipam.ranges import Range, Ranges
from ipam.records import Node
from isolator.fabric.plan import (
    SECOND_DEVICE,
    VXLAN_DEVICE,
    Here,
    Hop,
    Piece,
    Plan,
    Remote,
    Route,
    Station,
    at_home,
    cut,
    host,
    mac_of,
    next_hop,
    parse_peer,
    released,
    towards,
    tunnel_family,
)

B4, B6 = ip_network("10.64.3.0/26"), ip_network("fd64::c0/122")
S4, S6 = ip_address("10.64.0.1"), ip_address("fd64::1")
FIRST = {4: VXLAN_DEVICE}
HERE = Here("n1", (4, 6), FIRST, link="eth0", sources={4: S4, 6: S6})
MAC = mac_of("n2")
HOP = next_hop(MAC)
BEHIND = Station(VXLAN_DEVICE, MAC)


def node(**facts: Any) -> Node:
    """What a node says of itself, which is all one needs to know unless told otherwise."""
    known: dict[str, Any] = {
        "underlay": ["192.0.2.2", "2001:db8::2", "fe80::2"],
        "mac": MAC,
        "vxlan_port": 4789,
    }
    return Node(name="n2", version="1", **{**known, **facts})


def plan(fabric: str, here: Here = HERE, **facts: Any) -> tuple[Plan, list[str]]:
    return towards(parse_peer(node(**facts)), [Piece(B4, fabric), Piece(B6, fabric)], here)


def test_a_tunnel_is_one_next_hop_for_both_families() -> None:
    assert plan("vxlan") == (
        Plan(
            routes={B4: Route(B4, HOP, VXLAN_DEVICE, S4), B6: Route(B6, HOP, VXLAN_DEVICE, S6)},
            neighbours={Hop(VXLAN_DEVICE, HOP): MAC},
            tunnels={BEHIND: Remote(ip_address("192.0.2.2"), 0)},
        ),
        [],
    )


FAMILIES: tuple[tuple[Family, ...], ...] = ((), (4,), (6,), (4, 6), (6, 4))


@pytest.mark.parametrize("one", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_two_nodes_with_a_family_in_common_agree_on_one_and_with_equal_underlays_on_the_first(
    one: tuple[Family, ...], other: tuple[Family, ...]
) -> None:
    family = tunnel_family(one, other)
    assert family == tunnel_family(other, one)
    assert (family is not None) == bool(set(one) & set(other))
    assert family is None or (family in one and family in other)
    if one == other and one:
        assert family == one[0]


def test_a_node_that_has_only_the_other_family_is_led_to_through_the_second_device() -> None:
    here = Here("n1", (4, 6), {4: VXLAN_DEVICE, 6: SECOND_DEVICE[6]}, sources={4: S4, 6: S6})
    found, problems = plan("vxlan", here, underlay=["2001:db8::2"])
    device = SECOND_DEVICE[6]
    assert problems == []
    assert found.routes[B4] == Route(B4, HOP, device, S4)
    assert found.neighbours == {Hop(device, HOP): MAC}
    assert found.tunnels == {Station(device, MAC): Remote(ip_address("2001:db8::2"), 0)}


def test_a_node_without_ipv4_leads_ipv4_to_the_ipv6_address_of_one_that_has_both() -> None:
    found, problems = plan("hostgw", Here("n1", (6,), link="eth0"))
    assert {route.via for route in found.routes.values()} == {ip_address("2001:db8::2")}
    assert problems == []


def test_a_node_without_ipv6_leads_ipv6_to_the_link_local_address() -> None:
    found, problems = plan("hostgw", Here("n1", (4,), link="eth0"))
    assert (found.routes[B4].via, found.routes[B6].via) == (ip_address("192.0.2.2"), ip_address("fe80::2"))
    assert problems == []


def test_the_next_hop_is_the_link_local_address_of_the_mac() -> None:
    assert next_hop("06:bc:73:63:2c:ee") == IPv6Address("fe80::4bc:73ff:fe63:2cee")


def test_a_mac_follows_from_the_name_and_is_one_hosts_own() -> None:
    macs = {mac_of(f"node-{number}") for number in range(2000)}
    assert len(macs) == 2000
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)
    assert mac_of("node-1") == mac_of("node-1")


def test_hostgw_leads_to_the_nodes_own_addresses() -> None:
    routes = {
        B4: Route(B4, ip_address("192.0.2.2"), "eth0"),
        B6: Route(B6, ip_address("2001:db8::2"), "eth0"),
    }
    assert plan("hostgw") == (Plan(routes=routes), [])


def test_hostgw_needs_no_ipv6_address_but_the_link_local_one() -> None:
    found, problems = plan("hostgw", underlay=["192.0.2.2", "fe80::2"])
    assert found.routes[B6].via == ip_address("fe80::2")
    assert problems == []


def test_hostgw_carries_ipv4_over_a_segment_that_has_only_ipv6() -> None:
    found, problems = plan("hostgw", underlay=["2001:db8::2", "fe80::2"])
    assert {route.via for route in found.routes.values()} == {ip_address("2001:db8::2")}
    assert problems == []


def test_a_family_that_a_node_has_no_way_to_is_a_problem_and_the_other_goes_on() -> None:
    found, (problem,) = plan("hostgw", underlay=["192.0.2.2"])
    assert set(found.routes) == {B4}
    assert "fd64::c0/122 of node n2 is unreachable" in problem
    assert "--underlay" in problem


def test_tunnels_of_different_ports_say_which_and_equal_ones_do_not() -> None:
    found, _ = plan("vxlan", vxlan_port=8472)
    assert found.tunnels[BEHIND].port == 8472
    found, _ = plan("vxlan", Here("n1", (4,), FIRST, port=8472), vxlan_port=8472)
    assert found.tunnels[BEHIND].port == 0


def test_a_tunnel_over_ipv6_leads_to_the_ipv6_address() -> None:
    found, _ = plan("vxlan", Here("n1", (6,), {6: VXLAN_DEVICE}))
    assert found.tunnels[BEHIND].ip == ip_address("2001:db8::2")


@pytest.mark.parametrize(
    ("here", "facts", "why"),
    [
        (Here("n1", (4, 6)), {}, "this node has no VXLAN device over IPv4"),
        (HERE, {"mac": ""}, "that node has no VXLAN device"),
        (HERE, {"mac": "07:00:00:00:00:01"}, "that node has no VXLAN device"),
        (HERE, {"underlay": ["2001:db8::2"]}, "this node has no VXLAN device over IPv6"),
        (
            Here("n1", (6,), {6: VXLAN_DEVICE}),
            {"underlay": ["192.0.2.2", "fe80::2"]},
            "the underlay of this node has IPv6, and that node's IPv4",
        ),
        (HERE, {"underlay": []}, "the underlay of this node has IPv4 and IPv6, and that node's no address"),
    ],
)
def test_why_there_is_no_tunnel_is_said(here: Here, facts: dict[str, Any], why: str) -> None:
    found, problems = plan("vxlan", here, **facts)
    assert found == Plan()
    assert len(problems) == 2
    assert all(why in problem for problem in problems)


def test_nothing_leads_to_a_network_without_a_fabric() -> None:
    assert plan("none") == (Plan(), [])
    assert at_home([Piece(B4, "none"), Piece(B6, "vxlan")]) == Plan({B6: Route(B6)})


def test_one_address_is_a_network_of_its_own() -> None:
    assert [str(host(ip)) for ip in (S4, S6)] == ["10.64.0.1/32", "fd64::1/128"]


@pytest.mark.parametrize(
    "text",
    ["", "eth0", "192.0.2.2/24", "0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "ff02::1", "255.255.255.255",
     "::ffff:192.0.2.9", "fe80::2%eth0", "192.0.2.2; reboot"],
)  # fmt: skip
def test_what_no_other_host_can_have_is_no_underlay_address(text: str) -> None:
    peer = parse_peer(node(underlay=[text]))
    assert (dict(peer.underlay), peer.link_local) == ({}, None)


@given(st.lists(st.text(max_size=20) | st.ip_addresses().map(str)), st.text(max_size=20), st.integers())
def test_whatever_a_node_says_the_plan_is_one_that_the_kernel_gives_back_alike(
    underlay: list[str], mac: str, port: int
) -> None:
    found, _ = plan("vxlan", underlay=underlay, mac=mac, vxlan_port=port)
    for (_, mac_there), remote in found.tunnels.items():
        assert mac_there == bytes.fromhex(mac_there.replace(":", "")).hex(":")
        assert 0 <= remote.port < 65536
        assert ip_address(remote.ip.packed) == remote.ip
    assert {Station(VXLAN_DEVICE, mac_there) for mac_there in found.neighbours.values()} == set(found.tunnels)


def test_a_mac_in_capitals_is_the_same_mac() -> None:
    found, _ = plan("vxlan", mac=MAC.upper())
    assert set(found.tunnels) == {BEHIND}


CUT = st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), max_size=5)


@given(CUT, st.sets(st.integers(0, 63), max_size=4), st.sampled_from([B4, B6]))
def test_a_route_leads_to_all_of_a_block_but_what_is_closed(
    pairs: list[tuple[int, int]], assigned: set[int], block: IPNetwork
) -> None:
    base = int(block.network_address)
    closed = Ranges(Range(base + min(pair), base + max(pair)) for pair in pairs)
    kept = [block[number] for number in assigned if base + number in closed]
    parts = cut(Piece(block, "vxlan"), closed, kept)
    led_to = [ip for part in parts for ip in part.destination]
    assert len(led_to) == len(set(led_to)), "no address has two routes"
    assert set(led_to) == {ip for ip in block if int(ip) not in closed} | set(kept)
    assert {part.fabric for part in parts} <= {"vxlan"}


@given(CUT, st.sampled_from([B4, B6]), st.booleans())
def test_what_an_earlier_agent_left_is_cut_back_and_leads_where_it_led(
    pairs: list[tuple[int, int]], block: IPNetwork, drops: bool
) -> None:
    base = int(block.network_address)
    closed = Ranges(Range(base + min(pair), base + max(pair)) for pair in pairs)
    route = Route(block) if drops else Route(block, HOP, VXLAN_DEVICE)
    left = Plan({block: route}, {Hop(VXLAN_DEVICE, HOP): MAC}, {BEHIND: Remote(ip_address("192.0.2.2"), 0)})

    def closed_in(network: IPNetwork) -> Ranges:
        return closed.within(int(network[0]), int(network[-1]))

    kept = released(left, closed_in, lambda _: False)
    assert {ip for part in kept.routes for ip in part} == {ip for ip in block if int(ip) not in closed}
    assert all(replace(of, destination=block) == route for of in kept.routes.values())
    assert (kept.neighbours, kept.tunnels) == (left.neighbours, left.tunnels)
    assert released(kept, closed_in, lambda _: False) == kept


def test_a_route_to_one_address_goes_only_if_it_is_a_nodes_very_own() -> None:
    firm, connected = host(ip_address("10.64.3.1")), host(ip_address("10.64.3.2"))
    left = Plan({firm: Route(firm, HOP, VXLAN_DEVICE), connected: Route(connected, HOP, VXLAN_DEVICE)})
    closed = Ranges([Range(int(B4[0]), int(B4[-1]))])
    kept = released(left, lambda _: closed, lambda ip: ip == firm.network_address)
    assert set(kept.routes) == {connected}
