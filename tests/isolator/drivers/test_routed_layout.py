"""What a routed endpoint is made of, before any kernel sees it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from isolator.drivers import Wiring
from isolator.drivers.naming import mac_for
from isolator.drivers.routed_layout import (
    container_requests,
    host_requests,
    peer_index,
    reroute_requests,
)


def wiring_of(*ips: str, default_route: bool = False, pools: tuple[str, ...] = (), hop: int = 1) -> Wiring:
    addresses = tuple(map(ip_address, ips))
    return Wiring(
        "mrga", "eth0", None, addresses, mac_for(addresses), 1450, default_route,
        next_hop=hop, pools=tuple(map(ip_network, pools)),
    )  # fmt: skip


def phrases(*ips: str, pools: tuple[str, ...] = (), hop: int = 1) -> list[str]:
    """What is done inside the container, in order."""
    return [request.doing for request in container_requests(wiring_of(*ips, pools=pools, hop=hop), 5)]


@pytest.mark.parametrize("index", [1 << 29, (1 << 30) - 1])
def test_the_ends_never_share_an_index_and_both_fit(index: int) -> None:
    assert index != peer_index(index) < 1 << 31


def test_ipv4_alone_asks_nothing_of_ipv6() -> None:
    assert phrases("10.0.0.5") == [
        "bring lo up",
        "turn off link-local addresses on eth0",
        "add the address 10.0.0.5 to eth0",
        "add the neighbour 169.254.1.1 to eth0",
        "add the rule for packets from 10.0.0.5",
        "bring eth0 up",
        "add the default route via 169.254.1.1 on eth0",
        "add the default route via 169.254.1.1 on eth0",
    ]


def test_pools_of_its_families_are_reached_by_the_next_hop_of_its_network_and_pools_of_others_are_not() -> (
    None
):
    pools = ("10.0.0.0/16", "fd00::/64", "10.9.0.0/24")
    assert phrases("10.0.0.5", pools=pools, hop=7)[-3:] == [
        "add the default route via 169.254.1.7 on eth0",
        "add the route to 10.0.0.0/16 via 169.254.1.7 on eth0",
        "add the route to 10.9.0.0/24 via 169.254.1.7 on eth0",
    ]
    assert phrases("fd00::5", pools=pools, hop=254)[-1] == "add the route to fd00::/64 via fe80::fe on eth0"


def test_pools_that_come_are_added_before_those_that_went_are_deleted() -> None:
    before = wiring_of("10.0.0.5", "fd00::5", pools=("10.0.0.0/16", "fd00::/64"))
    now = wiring_of("10.0.0.5", "fd00::5", pools=("fd00::/64", "10.9.0.0/24"))
    assert [request.doing for request in reroute_requests(before, now, 5)] == [
        "add the route to fd00::/64 via fe80::1 on eth0",
        "add the route to 10.9.0.0/24 via 169.254.1.1 on eth0",
        "delete the route to 10.0.0.0/16 on eth0",
    ]


def test_the_link_comes_up_after_its_addresses_and_neighbours() -> None:
    done = phrases("10.0.0.5", "fd00::5")
    up = done.index("bring eth0 up")
    assert {phrase.split()[2] for phrase in done[2:up]} == {"address", "neighbour", "rule"}
    assert all("route" in phrase or "deliver" in phrase for phrase in done[up + 1 :])


def test_the_node_has_a_neighbour_and_a_route_for_each_address() -> None:
    addresses = (ip_address("10.0.0.5"), ip_address("fd00::5"))
    wiring = Wiring("mrga", "eth0", None, addresses, mac_for(addresses), 1450)
    assert [request.doing for request in host_requests(wiring, 5)] == [
        "bring mrga up without ARP",
        "add the neighbour 10.0.0.5 to mrga",
        "add the route to 10.0.0.5 via mrga",
        "add the neighbour fd00::5 to mrga",
        "add the route to fd00::5 via mrga",
    ]
