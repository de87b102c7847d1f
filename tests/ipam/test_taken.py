"""What a node's own networks use, as text and back."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.keys import IPNetwork
from ipam.records import Node
from ipam.taken import (
    FIRM,
    LIMIT,
    SINGLE,
    Kind,
    StoreEndpoint,
    Taken,
    aggregated,
    lines,
    parse,
    parse_all,
    taken,
)


@pytest.mark.parametrize(
    "text",
    [
        "address 198.18.0.1 eth0",
        "gateway 198.18.0.254 eth0",
        "resolver 198.18.0.53",
        "store 198.18.0.9 tcp/2379",
        "store fd00::9 tcp/2379",
        "connected 198.18.0.0/24 eth0",
        "several 198.18.0.0/28",
        "route 10.0.0.0/8 tun0",
    ],
)
def test_every_line_is_told_as_it_was_parsed(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "address",
        "address 198.18.0.0/24 eth0",
        "address 198.18.0.1  eth0",
        "address 198.18.0.1 eth0 more",
        "address 198.18.0.1 eth\n0",
        "address fe80::1 eth0",
        "address fd00::1%eth0 eth0",
        "address 127.0.0.1 lo",
        "resolver ::1",
        "connected 198.18.0.1/24 eth0",
        "connected 0.0.0.0/0 eth0",
        "connected ::/0 eth0",
        "lease 198.18.0.1",
        "aggregated 12",
    ],
)
def test_a_line_that_says_nothing_known_is_left_out(text: str) -> None:
    assert parse(text) is None


def test_what_a_newer_agent_says_does_not_hide_what_is_known() -> None:
    assert parse_all(["lease 198.18.0.1", "address 198.18.0.1 eth0"]) == (
        Taken(Kind.ADDRESS, ip_network("198.18.0.1"), "eth0"),
    )


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("store 198.18.0.9 tcp/2379", StoreEndpoint(ip_network("198.18.0.9").network_address, "tcp", 2379)),
        ("store 198.18.0.9 tcp/65536", None),
        ("store 198.18.0.9 2379", None),
        ("store 198.18.0.9", None),
        ("address 198.18.0.9 tcp/2379", None),
    ],
)
def test_a_store_says_where_it_listens(text: str, endpoint: StoreEndpoint | None) -> None:
    found = parse(text)
    assert found is not None
    assert found.endpoint == endpoint


def test_an_interface_with_an_odd_name_is_told_all_the_same() -> None:
    found = taken(Kind.ADDRESS, ip_network("198.18.0.1"), "a b\nc")
    assert str(found) == "address 198.18.0.1 a?b?c"
    assert parse(str(found)) == found


def test_a_node_record_without_surroundings_is_read() -> None:
    assert Node.decode("nodes/n1", b'{"name":"n1","version":"1"}').surroundings == []


def _networks(longest: int) -> st.SearchStrategy[IPNetwork]:
    def network(value: int, length: int) -> IPNetwork:
        return ip_network((0x0A000000 + value * 37, length), strict=False)

    return st.builds(network, st.integers(0, 1 << 18), st.integers(12, longest))


@st.composite
def entries(draw: st.DrawFn) -> Taken:
    kind = draw(st.sampled_from([*SINGLE, Kind.CONNECTED, Kind.ROUTE]))
    network = draw(_networks(32))
    if kind in SINGLE:
        network = ip_network(network.network_address)
    return Taken(kind, network, draw(st.sampled_from(["eth0", "eth1", "tcp/2379"])))


@given(st.lists(entries(), max_size=40), st.integers(8, 24))
def test_a_record_keeps_its_limit_and_says_when_it_does_not_say_all(found: list[Taken], limit: int) -> None:
    told = lines(found, limit)
    assert len(told) <= limit
    if len(set(found)) <= limit:
        assert set(parse_all(told)) == set(found)
        assert aggregated(told) == 0
    else:
        assert aggregated(told) == len(set(found) - set(parse_all(told)))


@given(st.lists(entries(), max_size=60, unique=True))
def test_neighbours_are_merged_into_what_keeps_them_protected(found: list[Taken]) -> None:
    protected = [one for one in found if one.kind is not Kind.ROUTE]
    told = parse_all(lines(found, 50))
    for one in protected:
        kinds = FIRM if one.kind in FIRM else {Kind.CONNECTED}
        assert any(_covers(other, one) for other in told if other.kind in kinds), one


def _covers(wider: Taken, narrower: Taken) -> bool:
    a, b = wider.network, narrower.network
    return a.version == b.version and a[0] <= b[0] and a[-1] >= b[-1]


def test_many_bridges_cost_the_difference_between_them_and_not_the_store() -> None:
    bridges = [
        Taken(kind, network, f"br{number}")
        for number in range(200)
        for kind, network in (
            (Kind.CONNECTED, ip_network(f"172.20.{number}.0/24")),
            (Kind.ADDRESS, ip_network(f"172.20.{number}.1")),
        )
    ]
    store = Taken(Kind.STORE, ip_network("198.18.0.9"), "tcp/2379")
    told = lines([*bridges, store])
    assert len(told) <= LIMIT
    assert str(store) in told
    assert all(any(_covers(other, one) for other in parse_all(told)) for one in bridges)


def test_routes_go_first_when_there_are_too_many() -> None:
    routes = [Taken(Kind.ROUTE, ip_network(f"10.{n}.0.0/17"), "tun0") for n in range(100)]
    address = Taken(Kind.ADDRESS, ip_network("198.18.0.1"), "eth0")
    told = lines([*routes, address])
    assert str(address) in told
    assert len(told) == LIMIT
