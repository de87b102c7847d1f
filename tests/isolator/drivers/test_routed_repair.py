"""What the driver puts back of an endpoint's wiring, what it leaves alone, and what it says of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from isolator.drivers import Repair, Wiring, routed_check
from isolator.netlink import HostRoute
from isolator.netlink.codec import Message
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import WORLD4, WORLD6, Machine, Room, heard

pytestmark = pytest.mark.kernel

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"


def talks(machine: Machine, container: Room, wiring: Wiring) -> bool:
    """Whether the container hears the world, over each of its addresses."""
    worlds = {4: WORLD4, 6: WORLD6}
    return all(heard(container, ip, machine.world, worlds[ip.version], within=2) for ip in wiring.ips)


def mended(machine: Machine, wiring: Wiring) -> Repair:
    """A repair as isolator/kernel.py makes one of it."""
    before = machine.do(machine.driver.damage, wiring)
    refused = machine.do(machine.driver.repair, wiring)
    return Repair(tuple(before), (*machine.do(machine.driver.damage, wiring), *refused))


@pytest.mark.parametrize("path", [None, "/run/netns/mrg-not-there", "another"])
def test_the_nodes_side_is_mended_whatever_became_of_the_containers_path(
    machine: Machine, container: Room, make_container: MakeRoom, path: str | None
) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    known = replace(wiring, netns=make_container().path if path == "another" else path)
    machine.sh(f"ip route del {A4}; ip -6 route del {A6}; ip -6 neigh del {A6} dev {wiring.host_ifname}")
    assert not talks(machine, container, wiring)

    repair = mended(machine, known)
    assert talks(machine, container, wiring)
    assert set(repair.mended) == {
        f"the node lacks the route to {A4} via {wiring.host_ifname}",
        f"the node lacks the route to {A6} via {wiring.host_ifname}",
        f"the node lacks the permanent neighbour {A6} at {wiring.mac} on {wiring.host_ifname}",
    }
    assert len(repair.after) == 1, "what of the container cannot be seen is said once"


def test_a_stranger_at_the_recorded_path_is_left_alone(
    machine: Machine, container: Room, make_container: MakeRoom
) -> None:
    other = make_container()
    wiring = machine.attach(container, "eth0", A4, A6)
    stranger = machine.attach(other, "eth0", B4, B6)
    before = other.sh("ip link show eth0; ip address; ip rule; ip route show table all; ip neigh")

    mistaken = replace(wiring, netns=other.path)
    repair = mended(machine, mistaken)
    assert other.sh("ip link show eth0; ip address; ip rule; ip route show table all; ip neigh") == before
    assert talks(machine, other, stranger)
    says = (
        f"the container's side is not seen: {other.path} leads to another namespace by now: the other end of "
        f"{wiring.host_ifname} is not in it"
    )
    assert repair.after == (says,)
    assert machine.do(machine.driver.check, mistaken) == [says]


DAMAGE: dict[str, Callable[[Machine, Room, Wiring], object]] = {
    "the inner MTU too small for IPv6": lambda _, c, w: c.sh("ip link set eth0 mtu 1000"),
    "the inner MTU too large": lambda _, c, w: c.sh("ip link set eth0 mtu 9000"),
    "the node's MTU": lambda m, _, w: m.sh(f"ip link set {w.host_ifname} mtu 600"),
    "the inner MAC": lambda _, c, w: c.sh("ip link set eth0 address 02:00:00:00:00:01"),
    "the node's MAC": lambda m, _, w: m.sh(f"ip link set {w.host_ifname} address 02:00:00:00:00:01"),
    "IPv6 inside": lambda _, c, w: c.sh("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1"),
    "IPv6 on the node": lambda m, _, w: m.sh(f"sysctl -qw net.ipv6.conf.{w.host_ifname}.disable_ipv6=1"),
    "the loopback": lambda _, c, w: c.sh("ip link set lo down"),
    "every route and rule inside": lambda _, c, w: c.sh(
        "ip route flush table all; ip -6 route flush table all; ip rule flush; ip rule add pref 32766 table main"
    ),
    "the default route, by another's": lambda _, c, w: c.sh(
        "ip route del default; ip route add default via 169.254.1.1 dev eth0 onlink"
    ),
    "every neighbour inside": lambda _, c, w: c.sh("ip neigh flush all nud permanent"),
    "the link's state": lambda m, _, w: m.sh(f"ip link set {w.host_ifname} down"),
    "silence of ARP": lambda m, _, w: m.sh(f"ip link set {w.host_ifname} arp on"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_one_repair_puts_everything_back(machine: Machine, container: Room, what: str) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    DAMAGE[what](machine, container, wiring)
    assert machine.do(machine.driver.damage, wiring), "it counts as damage"

    repair = mended(machine, wiring)
    assert repair.mended == repair.before
    assert repair.after == ()
    assert machine.do(machine.driver.check, wiring) == []
    assert talks(machine, container, wiring)
    assert mended(machine, wiring).before == (), "and nothing is left to do"


def test_a_container_may_send_smaller_packets_than_it_has_to(machine: Machine, container: Room) -> None:
    """As `tuning` and some VPNs do; a CHECK still says so."""
    wiring = machine.attach(container, "eth0", A4, A6)
    container.sh("ip link set eth0 mtu 1400")
    assert machine.do(machine.driver.damage, wiring) == []
    assert machine.do(machine.driver.check, wiring) == [
        "the container's link eth0 has an MTU of 1400, not 1450"
    ]


def test_what_cannot_be_mended_holds_nothing_else_up(machine: Machine, container: Room) -> None:
    """Here the container has moved its interface to another name, so its side cannot be looked at."""
    wiring = machine.attach(container, "eth0", A4, A6)
    machine.sh(f"ip route del {A4}")
    container.sh("ip link set eth0 name inner")
    repair = mended(machine, wiring)
    assert repair.mended == (f"the node lacks the route to {A4} via {wiring.host_ifname}",)
    assert repair.after == ("the container's link eth0 is called inner",)


def test_a_container_with_thousands_of_routes_of_its_own_costs_no_look_at_them(
    machine: Machine, container: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    routes = "\n".join(f"route add 198.18.{n // 250}.{n % 250} dev eth0 table 77" for n in range(2000))
    container.sh(f"printf '%s\n' '{routes}' | ip -batch -")
    parsed = 0
    read = routed_check.parse_route

    def counted(message: Message) -> HostRoute:
        nonlocal parsed
        parsed += 1
        return read(message)

    monkeypatch.setattr(routed_check, "parse_route", counted)
    assert machine.do(machine.driver.damage, wiring) == []
    assert parsed < 50
