"""What a routed endpoint is made of, before any kernel sees it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from isolator.drivers import Wiring
from isolator.drivers.naming import mac_for
from isolator.drivers.routed_layout import container_requests, host_requests, peer_index


def phrases(*ips: str, default_route: bool = False) -> list[str]:
    """What is done inside the container, in order."""
    addresses = tuple(map(ip_address, ips))
    wiring = Wiring("mrga", "eth0", None, addresses, mac_for(addresses), 1450, default_route)
    return [request.doing for request in container_requests(wiring, 5)]


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
