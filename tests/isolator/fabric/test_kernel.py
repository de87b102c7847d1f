"""A plan in a real kernel: made, kept, and what it is for, packets between nodes."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from isolator.fabric.kernel import read
from isolator.fabric.plan import VXLAN_DEVICE, VXLAN_DEVICES, Plan, Route, mac_of, next_hop
from isolator.netlink import Node
from tests.isolator.fabric.segment import LINK, Place, Segment

pytestmark = pytest.mark.kernel


@pytest.fixture
def pair() -> Iterator[tuple[Place, Place]]:
    """Two nodes on one segment."""
    with Segment((4, 6), (4, 6)) as segment:
        one, other = segment.places
        yield one, other


def held(place: Place) -> Plan:
    """What the kernel of a node holds of the fabric."""
    with place.do(Node) as node:
        links = place.sh("ip -o link").splitlines()
        names = {int(line.split(":")[0]): line.split(":")[1].split("@")[0].strip() for line in links}
        return place.do(read, node, names)


async def establish(place: Place, plan: Plan) -> None:
    """Devices and plan, as a fabric does it."""
    tunnelled = {route.device for route in plan.routes.values() if route.is_tunnelled}
    for name in VXLAN_DEVICES:
        if name in tunnelled:
            assert (await place.kernel.ensure_device(place.device(name))).refused == ()
        else:
            await place.kernel.remove_device(name)
    assert (await place.kernel.resync(plan, keep=False)).refused == []


async def finds_nothing(place: Place, plan: Plan, *, keep: bool = False) -> bool:
    """Whether a comparison has nothing to do."""
    found = await place.kernel.resync(plan, keep=keep)
    return (found.done, found.refused) == ([], [])


@pytest.mark.parametrize("fabric", ["vxlan", "hostgw"])
async def test_the_kernel_holds_the_plan_and_a_second_comparison_finds_nothing(
    pair: tuple[Place, Place], fabric: str
) -> None:
    one, other = pair
    plan = one.plan(fabric, other)
    await establish(one, plan)
    assert held(one) == plan
    assert await finds_nothing(one, plan)


@pytest.mark.parametrize(
    ("families", "fabric"),
    [((4,), "vxlan"), ((6,), "vxlan"), ((4, 6), "vxlan"), ((6,), "hostgw"), ((4, 6), "hostgw")],
)
async def test_packets_of_both_families_arrive_over_an_underlay_of_either(
    families: tuple[int, ...], fabric: str
) -> None:
    with Segment(*[families] * 3) as segment:
        for place in segment.places:
            others = [other for other in segment.places if other is not place]
            await establish(place, place.plan(fabric, *others))
        for place in segment.places:
            for other in segment.places:
                for ip, source in zip(other.ips, place.ips, strict=True):
                    assert place.reaches(ip, source), f"{place.node} -> {ip}"


async def test_a_node_with_both_families_reaches_one_that_has_either_alone() -> None:
    with Segment((4, 6), (4,), (6,), (4, 6)) as segment:
        both, four, six, also = segment.places
        pairs = [(both, four), (both, six), (both, also), (also, four), (also, six)]
        for place in segment.places:
            others = [other for pair in pairs if place in pair for other in pair if other is not place]
            await establish(place, place.plan("vxlan", *others))
        for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
            for ip, source in zip(other.ips, one.ips, strict=True):
                assert one.reaches(ip, source), f"{one.node} -> {ip}"


async def test_without_its_device_routes_through_the_tunnel_are_left_out_and_all_others_are_there(
    pair: tuple[Place, Place],
) -> None:
    one, other = pair
    plan = one.plan("vxlan", other)
    direct = Route(ip_network("10.64.9.0/26"), ip_address("192.0.2.2"), LINK)
    plan.routes[direct.destination] = direct
    taken = one.udp(ip_address("0.0.0.0"), 4789)
    made = await one.kernel.ensure_device(one.device(VXLAN_DEVICE))
    assert len(made.refused) == 1
    assert (await one.kernel.resync(plan, keep=False)).refused == []
    assert held(one).routes == {d: route for d, route in plan.routes.items() if not route.is_tunnelled}
    taken.close()
    await establish(one, plan)
    assert held(one) == plan


async def test_a_nodes_own_packets_come_from_its_devices_address(pair: tuple[Place, Place]) -> None:
    one, other = pair
    await establish(one, one.plan("vxlan", other))
    for ip, source in zip(other.ips, one.ips, strict=True):
        assert f" src {source} " in one.sh(f"ip route get {ip}")


async def test_what_nobody_has_of_an_own_block_goes_nowhere(pair: tuple[Place, Place]) -> None:
    one, other = pair
    await establish(one, one.plan("vxlan", other))
    one.sh(f"ip route add default dev {LINK}; ip -6 route add default dev {LINK}")
    for ip in ("10.64.1.9", "fd64::109"):
        assert "via" not in one.sh(f"ip route get {ip} 2>&1 || true")
        assert LINK not in one.sh(f"ip route get {ip} 2>&1 || true")


MAC = mac_of("n2")
HOP = next_hop(MAC)

DAMAGE = {
    "routes": "ip -4 route flush proto 157; ip -6 route flush proto 157",
    "neighbours": f"ip -6 neigh flush dev {VXLAN_DEVICE} nud permanent",
    "tunnels": f"bridge fdb show dev {VXLAN_DEVICE} | while read m r; do bridge fdb del $m dev {VXLAN_DEVICE}; done",
    "another next hop": "ip route replace 10.64.2.0/26 via 192.0.2.9 dev up0 proto 157 metric 2048",
    "no next hop": "ip route replace 10.64.2.0/26 dev up0 proto 157 metric 2048",
    "dropped": "ip route del 10.64.2.0/26; ip route add blackhole 10.64.2.0/26 proto 157 metric 2048",
    "unreachable": "ip route del 10.64.2.0/26; ip route add unreachable 10.64.2.0/26 proto 157 metric 2048",
    "own block led away": "ip route del 10.64.1.0/26; ip route add 10.64.1.0/26 dev up0 proto 157 metric 2048",
    "another source": (
        f"ip route replace 10.64.2.0/26 via inet6 {HOP} dev {VXLAN_DEVICE} onlink "
        "src 192.0.2.1 proto 157 metric 2048"
    ),
    "another tunnel": f"bridge fdb replace {MAC} dev {VXLAN_DEVICE} dst 192.0.2.9 port 8472",
    "another MAC": f"ip neigh replace {HOP} lladdr 02:00:00:00:00:09 dev {VXLAN_DEVICE} nud permanent",
    "strange ones": (
        "ip route add 10.64.9.0/26 via 192.0.2.9 proto 157 metric 2048; "
        "ip route add prohibit 10.64.10.0/26 proto 157 metric 2048; "
        "ip -6 route add unreachable fd64::900/122 proto 157 metric 2048; "
        f"ip -6 route add fd64::a00/122 dev {VXLAN_DEVICE} proto 157 metric 2048; "
        f"bridge fdb append 00:00:00:00:00:00 dev {VXLAN_DEVICE} dst 192.0.2.9; "
        f"bridge fdb append 00:00:00:00:00:00 dev {VXLAN_DEVICE} dst 192.0.2.10; "
        f"ip neigh add fe80::9 lladdr 02:00:00:00:00:09 dev {VXLAN_DEVICE} nud permanent"
    ),
    "device down and up": f"ip link set {VXLAN_DEVICE} down; ip link set {VXLAN_DEVICE} up",
    "device gone": f"ip link delete {VXLAN_DEVICE}",
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_a_comparison_restores_everything(pair: tuple[Place, Place], what: str) -> None:
    one, other = pair
    plan = one.plan("vxlan", other)
    await establish(one, plan)
    one.sh(DAMAGE[what])
    assert held(one) != plan
    await establish(one, plan)
    assert held(one) == plan
    assert await finds_nothing(one, plan)


async def test_one_plan_is_turned_into_another(pair: tuple[Place, Place]) -> None:
    one, other = pair
    before, after = one.plan("vxlan", other), one.plan("vxlan")
    await establish(one, before)
    assert await one.kernel.apply(before, after) == []
    assert held(one) == after
    assert await one.kernel.apply(after, before) == []
    assert held(one) == before


@pytest.mark.parametrize("way", [("vxlan", "hostgw"), ("hostgw", "vxlan")])
async def test_a_fabric_takes_the_others_place(pair: tuple[Place, Place], way: tuple[str, str]) -> None:
    one, other = pair
    for fabric in way:
        await establish(one, one.plan(fabric, other))
    assert held(one) == one.plan(way[1], other)


async def test_nothing_is_withdrawn_while_it_is_to_be_kept(pair: tuple[Place, Place]) -> None:
    one, other = pair
    both = one.plan("vxlan", other)
    await establish(one, both)
    assert await finds_nothing(one, one.plan("vxlan"), keep=True)
    assert held(one) == both


async def test_routes_of_endpoints_and_of_others_are_left_alone(pair: tuple[Place, Place]) -> None:
    one, other = pair
    strange = "ip -4 route show table all proto {0}; ip -6 route show table all proto {0}"
    one.sh(
        f"ip route add 10.64.1.7 dev {LINK} proto 157; ip -6 route add fd64::107 dev {LINK} proto 157; "
        f"ip route add 10.64.1.0/26 dev {LINK} proto static metric 9"
    )
    before = one.sh(strange.format("static")) + one.sh(strange.format("157"))
    await establish(one, one.plan("vxlan", other))
    await establish(one, Plan())
    assert one.sh(strange.format("static")) + one.sh(strange.format("157")) == before


async def test_next_hops_that_are_not_on_the_segment_are_told_and_the_others_work(
    pair: tuple[Place, Place],
) -> None:
    one, other = pair
    one.sh(f"ip route add default via 192.0.2.254; ip -6 route add default via 2001:db8::fe dev {LINK}")
    plan = one.plan("hostgw", other)
    beyond = [ip_network("10.64.9.0/26"), ip_network("fd64::900/122")]
    for destination, hop in zip(beyond, ("198.51.100.9", "2001:db8:9::9"), strict=True):
        plan.routes[destination] = Route(destination, ip_address(hop), LINK)
    refused = (await one.kernel.resync(plan, keep=False)).refused
    assert [error.errno in (101, 113) for error in refused] == [True, True]
    for destination, error in zip(beyond, refused, strict=True):
        assert f"could not add the route to {destination} via" in str(error)
    assert held(one) == one.plan("hostgw", other)
