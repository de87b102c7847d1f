"""Which interface and address an unbound socket of a container uses, as moorage lays its routes."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from isolator.unbound import Interface, Unbound, unbound


def interface(ifname: str, *ips: str, pools: tuple[str, ...] = (), default_route: bool = False) -> Interface:
    return Interface(ifname, tuple(map(ip_address, ips)), tuple(map(ip_network, pools)), default_route)


WEB = interface("eth0", "10.0.0.5", "fd00::5", pools=("10.0.0.0/16", "fd00::/64"))
DB = interface("eth1", "10.1.0.5", "10.1.0.6", pools=("10.1.0.0/16", "10.9.0.0/24"))


@pytest.mark.parametrize(
    ("destination", "ifname", "source", "on_network"),
    [
        ("10.0.7.7", "eth0", "10.0.0.5", True),
        ("10.1.7.7", "eth1", "10.1.0.5", True),
        ("10.9.0.9", "eth1", "10.1.0.5", True),
        ("192.0.2.1", "eth0", "10.0.0.5", False),
        ("fd00::77", "eth0", "fd00::5", True),
        ("2001:db8::1", "eth0", "fd00::5", False),
    ],
)
def test_a_networks_pools_go_by_its_interface_and_the_rest_by_the_default_route(
    destination: str, ifname: str, source: str, on_network: bool
) -> None:
    for interfaces in ([WEB, DB], [DB, WEB]):
        assert unbound(interfaces, ip_address(destination)) == Unbound(ifname, ip_address(source), on_network)


def test_the_interface_that_was_chosen_has_the_default_route_and_no_others_pools() -> None:
    chosen = interface("eth1", "10.1.0.5", pools=("10.1.0.0/16",), default_route=True)
    assert unbound([WEB, chosen], ip_address("192.0.2.1")) == Unbound("eth1", ip_address("10.1.0.5"), False)
    assert unbound([WEB, chosen], ip_address("10.0.7.7")) == Unbound("eth0", ip_address("10.0.0.5"), True)


def test_a_family_that_it_does_not_have_is_not_reached() -> None:
    assert unbound([DB], ip_address("fd00::77")) is None
    assert unbound([], ip_address("10.0.0.1")) is None
