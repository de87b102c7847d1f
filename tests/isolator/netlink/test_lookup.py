"""What the kernel would do with a packet."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from isolator.errors import NamespaceGone
from isolator.netlink import Node
from isolator.netlink.lookup import Lookup, look_up, look_up_inside, neighbour_state
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel

HERE, NEXT, FAR = ip_address("192.0.2.1"), ip_address("192.0.2.2"), ip_address("198.51.100.7")


@pytest.fixture
def node(container: Room) -> Room:
    container.sh(
        "ip link add up0 type veth peer name p0; ip link set p0 up; ip link set up0 up; "
        f"ip address add {HERE}/24 dev up0"
    )
    return container


def ask(room: Room, *question: object) -> Lookup:
    with room.do(Node) as node:
        return room.do(look_up, node, *question)


def test_on_the_link_and_behind_a_gateway(node: Room) -> None:
    assert ask(node, NEXT, None, "") == Lookup("up0", source=HERE)
    node.sh(f"ip route add default via {NEXT}")
    assert ask(node, FAR, None, "") == Lookup("up0", NEXT, source=HERE)
    assert str(ask(node, FAR, None, "")) == f"via {NEXT} on up0"


def test_an_ipv4_route_may_have_an_ipv6_next_hop(node: Room) -> None:
    node.sh(f"ip route add {FAR}/32 via inet6 fe80::7 dev up0 onlink")
    assert ask(node, FAR, None, "") == Lookup("up0", ip_address("fe80::7"), source=HERE)


def test_inside_a_container_it_is_asked_of_that_ones_kernel_in_both_families(
    make_container: MakeRoom, node: Room
) -> None:
    inside = make_container()
    inside.sh(
        f"ip link add eth0 type veth peer name mrgpeer netns {node.name}; ip link set eth0 up; "
        "ip address add 10.0.0.5/24 dev eth0; ip address add fd00::5/64 dev eth0 nodad"
    )
    node.sh("ip link set mrgpeer up")
    inside.delivers("fd00::5")
    with node.do(Node) as own:
        for target, source in (("10.0.0.9", "10.0.0.5"), ("fd00::9", "fd00::5")):
            found = node.do(look_up_inside, own, inside.path, "mrgpeer", ip_address(target))
            assert found == Lookup("eth0", source=ip_address(source))
        assert node.do(look_up_inside, own, inside.path, "mrgpeer", FAR).why == "there is no route"
        stranger = make_container()
        stranger.sh("ip link add eth0 type bridge")
        with pytest.raises(NamespaceGone, match="leads to another namespace"):
            node.do(look_up_inside, own, stranger.path, "mrgpeer", FAR)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("true", "there is no route"),
        (f"ip route add blackhole {FAR}", "it is dropped (blackhole)"),
        (f"ip address add {FAR}/32 dev lo", "it is the node's own"),
    ],
)
def test_a_packet_that_goes_nowhere(node: Room, command: str, why: str) -> None:
    node.sh(command)
    found = ask(node, FAR, None, "")
    assert (found.device, str(found)) == ("", why)


def test_a_packet_of_a_link_that_is_not_there(node: Room) -> None:
    assert str(ask(node, NEXT, HERE, "mrgnothing")) == "there is no link mrgnothing"


def test_what_is_known_of_a_neighbour(node: Room) -> None:
    with node.do(Node) as own:
        assert node.do(neighbour_state, own, NEXT, "up0") == ""
        node.sh(f"ip neigh add {NEXT} lladdr 02:00:00:00:00:07 dev up0 nud permanent")
        assert node.do(neighbour_state, own, NEXT, "up0") == "permanent"
        assert node.do(neighbour_state, own, NEXT, "up7") == ""
