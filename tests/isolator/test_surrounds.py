"""What a node's own networks use, read from a real kernel."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

from ipam.taken import parse_all
from isolator.netlink import Node
from isolator.surrounds import kept, surroundings
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel


def see(room: Room, *resolvers: Path) -> list[str]:
    with room.do(Node) as node:
        return [str(one) for one in room.do(surroundings, node, resolvers).taken]


def link(room: Room, name: str, *ips: str) -> None:
    room.sh(
        f"ip link add {name} type veth peer name p-{name[:10]}; ip link set p-{name[:10]} up; ip link set {name} up"
        + "".join(f"; ip addr add {ip} dev {name} {'nodad' * (':' in ip)}" for ip in ips)
    )


def test_addresses_prefixes_and_the_gateway_of_both_families(container: Room) -> None:
    link(container, "up0", "198.18.0.1/24", "fd98::1/64")
    container.sh("ip route add default via 198.18.0.254; ip -6 route add default via fd98::fe")
    assert see(container) == [
        "address 198.18.0.1 up0",
        "address fd98::1 up0",
        "connected 198.18.0.0/24 up0",
        "connected fd98::/64 up0",
        "gateway 198.18.0.254 up0",
        "gateway fd98::fe up0",
    ]


def test_bridges_of_other_engines_count_and_our_own_links_do_not(container: Room) -> None:
    link(container, "docker0", "172.17.0.1/16")
    link(container, "mrg0123456789", "10.64.0.1/32")
    link(container, "mfbvxlan", "10.64.0.2/32", "fd64::2/128")
    container.sh("ip route add 10.64.3.0/26 dev docker0 proto 157 metric 2048")
    assert see(container) == ["address 172.17.0.1 docker0", "connected 172.17.0.0/16 docker0"]


def test_an_address_that_is_routed_to_the_node_stands_on_its_loopback(container: Room) -> None:
    container.sh("ip addr add 192.0.2.1/32 dev lo")
    assert see(container) == ["address 192.0.2.1 lo"]


def test_the_other_end_of_a_point_to_point_link_is_a_gateway(container: Room) -> None:
    container.sh(
        "ip link add ppp0 type veth peer name p-ppp0; ip link set ppp0 up; "
        "ip addr add 192.0.2.1 peer 192.0.2.9/32 dev ppp0"
    )
    assert see(container) == ["address 192.0.2.1 ppp0", "gateway 192.0.2.9 ppp0"]


def test_routes_with_all_their_next_hops_and_those_on_a_link(container: Room) -> None:
    link(container, "up0", "198.18.0.1/24")
    link(container, "tun0")
    container.sh(
        "ip route add 10.0.0.0/8 dev tun0; "
        "ip route add 172.16.0.0/12 nexthop via 198.18.0.7 nexthop via 198.18.0.8; "
        "ip route add 172.32.0.0/16 via 198.18.0.9 table 4711; ip route add unreachable 192.168.0.0/16"
    )
    assert see(container) == [
        "address 198.18.0.1 up0",
        "connected 198.18.0.0/24 up0",
        "gateway 198.18.0.7 up0",
        "gateway 198.18.0.8 up0",
        "route 10.0.0.0/8 tun0",
        "route 172.16.0.0/12 up0",
    ]


def test_name_servers_but_not_a_local_stub(container: Room, tmp_path: Path) -> None:
    here, behind = tmp_path / "resolv.conf", tmp_path / "stub"
    here.write_text(
        "nameserver 127.0.0.53\nnameserver ::1\nnameserver fe80::1%up0\nsearch 192.0.2.1\nnameserver x\n"
    )
    behind.write_text("# hello\nnameserver 198.18.0.53\nnameserver fd98::53\n")
    assert see(container, here, behind, tmp_path / "none") == ["resolver 198.18.0.53", "resolver fd98::53"]


KNOWN = (
    "address 198.18.0.1 up0",
    "connected 198.18.0.0/24 up0",
    "gateway 198.18.0.254 up0",
    "address 172.17.0.1 docker0",
    "connected 172.17.0.0/16 docker0",
)


@pytest.mark.parametrize("lost", [("up0",), ("up0", "docker0")], ids=["one interface", "all"])
def test_an_interface_between_two_states_unsays_nothing(lost: tuple[str, ...]) -> None:
    """A DHCP client that renews, a link that is down: its address and gateway are nobody else's meanwhile."""
    found = [text for text in KNOWN if not text.endswith(lost)]
    assert {*still(found, {"up0", "docker0"})} == {*KNOWN}


def test_a_gateway_stays_while_its_link_is_down() -> None:
    assert {*still([t for t in KNOWN if not t.startswith("gateway")], {"up0", "docker0"})} == {*KNOWN}


def test_an_interface_with_another_address_or_gone_has_not_what_it_had() -> None:
    other = ["address 192.0.2.7 up0", "connected 192.0.2.0/24 up0", "gateway 192.0.2.1 up0"]
    assert still(other, {"up0"}) == other
    assert still([], set()) == []


def still(found: Iterable[str], links: Collection[str]) -> list[str]:
    return [str(one) for one in kept(parse_all(KNOWN), parse_all(found), links)]
