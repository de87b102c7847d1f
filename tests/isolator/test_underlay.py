"""What the node's own default route leads through."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ipam.errors import InvalidInput
from isolator.netlink import Node
from isolator.underlay import Underlay, underlay
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel


def see(room: Room) -> Underlay:
    with room.do(Node) as node:
        return room.do(underlay, node)


def link(room: Room, name: str, mtu: int, *ips: str) -> None:
    """A link that is up."""
    room.sh(
        f"ip link add {name} mtu {mtu} type veth peer name p-{name} mtu {mtu}; ip link set p-{name} up; "
        f"ip link set {name} up"
        + "".join(f"; ip addr add {ip} dev {name} {'nodad' * (':' in ip)}" for ip in ips)
    )


def test_without_a_default_route(container: Room) -> None:
    link(container, "up0", 1400, "192.0.2.1/24")
    assert see(container) == Underlay(links=(), mtu=1500, addresses=())


def test_of_the_default_route_with_the_lowest_metric(container: Room) -> None:
    link(container, "up0", 1400, "192.0.2.1/24", "2001:db8::1/64")
    link(container, "up1", 9000, "198.51.100.1/24")
    container.sh(
        "ip route add default via 192.0.2.2 metric 10; ip route add default via 198.51.100.2 metric 20"
    )
    found = see(container)
    assert (found.links, found.mtu) == (("up0",), 1400)
    assert found.addresses == (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
    assert found.link_local is not None
    assert found.link_local.is_link_local


def test_other_tables_say_nothing(container: Room) -> None:
    link(container, "vpn0", 1200, "198.51.100.1/24")
    link(container, "up0", 1400, "192.0.2.1/24")
    container.sh("ip route add default via 198.51.100.2 table 4711; ip route add default via 192.0.2.2")
    assert see(container).links == ("up0",)


def test_of_ipv6_if_there_is_no_ipv4(container: Room) -> None:
    link(container, "up0", 1280, "2001:db8::1/64")
    container.sh("ip -6 route add default via 2001:db8::2; ip route add unreachable default metric 7")
    found = see(container)
    assert (found.links, found.mtu, found.addresses) == (("up0",), 1280, (ip_address("2001:db8::1"),))


def test_several_next_hops_have_the_smallest_mtu(container: Room) -> None:
    link(container, "up0", 1400, "192.0.2.1/24")
    link(container, "up1", 9000, "198.51.100.1/24")
    container.sh("ip route add default nexthop via 192.0.2.2 nexthop via 198.51.100.2")
    found = see(container)
    assert (found.links, found.mtu) == (("up0", "up1"), 1400)


def test_a_named_link_is_taken_whatever_the_routes_say(container: Room) -> None:
    link(container, "up0", 1400, "192.0.2.1/24")
    link(container, "up1", 9000, "198.51.100.1/24")
    container.sh("ip route add default via 192.0.2.2")
    with container.do(Node) as node:
        assert container.do(underlay, node, "up1").links == ("up1",)
        with pytest.raises(InvalidInput, match="'up7' does not exist"):
            container.do(underlay, node, "up7")


@pytest.mark.parametrize("wanted", ["198.51.100.2", "198.51.100.0/24", "2001:db8:1::/64"])
def test_a_link_may_be_named_by_an_address_or_network_of_it(container: Room, wanted: str) -> None:
    link(container, "up0", 1400, "192.0.2.1/24")
    link(container, "up1", 9000, "198.51.100.2/24", "2001:db8:1::2/64")
    container.sh("ip route add default via 192.0.2.2")
    with container.do(Node) as node:
        assert container.do(underlay, node, wanted).links == ("up1",)


def test_of_several_addresses_the_one_that_was_named_comes_first(container: Room) -> None:
    link(container, "up0", 1400, "192.0.2.1/24", "203.0.113.9/24")
    with container.do(Node) as node:
        found = container.do(underlay, node, "203.0.113.0/24")
    assert found.addresses == (ip_address("203.0.113.9"), ip_address("192.0.2.1"))
