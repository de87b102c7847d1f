"""The routed driver on real namespaces: what it wires, what it refuses, what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from isolator.drivers import Wiring
from isolator.drivers.naming import route_metric
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink import messages, our_links
from isolator.netlink.codec import Request
from isolator.netlink.socket import NetlinkSocket
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import (
    NODE4,
    NODE6,
    NOTHING,
    NOTHING_INSIDE,
    SILENCE,
    WORLD4,
    WORLD6,
    Machine,
    Room,
    admission,
    heard,
    holds_inside,
    lines,
    settings,
    wire,
)
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"


def test_container_reaches_container_node_and_world_in_both_families(
    machine: Machine, make_container: MakeRoom
) -> None:
    one, other = make_container(), make_container()
    machine.attach(one, "eth0", A4, A6)
    machine.attach(other, "eth0", B4, B6)
    for here, there in ((A4, B4), (A6, B6)):
        assert heard(other, ip_address(there), one) == here
        assert heard(one, ip_address(here), other) == there
        assert heard(one, ip_address(here), machine) is not None
    for node, world in ((NODE4, WORLD4), (NODE6, WORLD6)):
        assert heard(machine, node, one) is not None
        assert heard(machine.world, world, one) == str(node)


def test_container_reaches_itself(machine: Machine, container: Room) -> None:
    container.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    machine.attach(container, "eth0", A4, A6)
    assert heard(container, ip_address(A4), container) == A4
    assert heard(container, ip_address(A6), container) == A6
    assert heard(container, ip_address("127.0.0.1"), container) == "127.0.0.1"


def test_what_stands_in_the_container(machine: Machine, container: Room) -> None:
    machine.attach(container, "eth0", A4, A6)
    metric = route_metric("eth0", default_route=False)
    assert lines(container.sh("ip -4 route show; ip -6 route show")) == [
        f"default via 169.254.1.1 dev eth0 proto 157 metric {metric} onlink ",
        f"default via fe80::1 dev eth0 proto 157 metric {metric} onlink pref medium",
    ]
    assert [line.split("lookup")[0].strip() for line in holds_inside(container)["rules"]] == [
        f"15700:\tfrom {A4}",
        f"15700:\tfrom {A6}",
    ]
    assert sorted(lines(container.sh("ip neigh show dev eth0"))) == [
        "169.254.1.1 lladdr ee:ee:ee:ee:ee:ee PERMANENT ",
        "fe80::1 lladdr ee:ee:ee:ee:ee:ee PERMANENT ",
    ]
    link = container.sh("ip link show dev eth0")
    assert "mtu 1450" in link
    assert "link/ether 0a:58:0a:00:00:05" in link
    assert "fe80" not in container.sh("ip addr show dev eth0"), "no link-local address, so no DAD and no MLD"


def test_what_stands_on_the_node(machine: Machine, container: Room) -> None:
    name = machine.attach(container, "eth0", A4, A6).host_ifname
    assert machine.holds() == {
        "links": [name],
        "routes": [
            f"{A4} dev {name} scope link ",
            f"{A6} dev {name} metric 1024 pref medium",
        ],
        "neighbours": [
            f"{A4} dev {name} lladdr 0a:58:0a:00:00:05 PERMANENT ",
            f"{A6} dev {name} lladdr 0a:58:0a:00:00:05 PERMANENT ",
        ],
        "elements": [f"{name} {A4}", f"{name} {A6}"],
    }
    link = machine.sh(f"ip -d link show dev {name}; ip addr show dev {name}")
    assert "link/ether ee:ee:ee:ee:ee:ee" in link
    assert "mtu 1450" in link
    assert "addrgenmode none" in link
    assert "inet" not in link.replace("link-netns", ""), "the node's end has no address"


def test_ipv6_works_at_once_without_waiting_for_duplicate_address_detection(
    machine: Machine, container: Room
) -> None:
    machine.attach(container, "eth0", A6)
    socket = container.udp(ip_address(A6))  # binding to a tentative address fails
    assert heard(container, ip_address(A6), machine.world) == str(WORLD6)
    socket.close()


def test_both_ends_become_operational(machine: Machine, container: Room) -> None:
    name = machine.attach(container, "eth0", A4, A6).host_ifname
    deadline = time.monotonic() + PATIENCE
    while "state UP" not in machine.sh(f"ip link show {name}") or "state UP" not in container.sh(
        "ip link show eth0"
    ):
        assert time.monotonic() < deadline


def test_namespaces_where_ipv6_is_off_get_it_only_if_the_endpoint_has_it(
    machine: Machine, make_container: MakeRoom
) -> None:
    off = (
        "net/ipv6/conf/all/disable_ipv6",
        "net/ipv6/conf/default/disable_ipv6",
        "net/ipv6/conf/lo/disable_ipv6",
    )
    with_v6, without = make_container(), make_container()
    for room in (with_v6, without, machine):
        room.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
    for room in (with_v6, without):
        room.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    machine.attach(with_v6, "eth0", A4, A6)
    machine.attach(without, "eth0", B4)
    assert heard(with_v6, ip_address(A6), machine.world) == str(WORLD6)
    assert settings(without, off) == dict.fromkeys(off, "1")
    eth0 = "net/ipv6/conf/eth0/disable_ipv6"
    assert settings(without, [eth0]) == {eth0: "1"}
    assert heard(without, ip_address(B4), machine.world) == str(WORLD4)


@pytest.mark.parametrize("order", [("eth0", "eth1"), ("eth1", "eth0")], ids="-".join)
@pytest.mark.parametrize("leaving", ["eth0", "eth1"])
def test_two_interfaces_both_answer_and_either_may_leave(
    machine: Machine, container: Room, order: tuple[str, str], leaving: str
) -> None:
    ips = {"eth0": (A4, A6), "eth1": ("10.1.0.5", "fd00::105")}
    wirings = {ifname: machine.attach(container, ifname, *ips[ifname]) for ifname in order}
    worlds = {4: WORLD4, 6: WORLD6}
    for ip in map(ip_address, itertools.chain(*ips.values())):
        assert heard(container, ip, machine.world) == str(worlds[ip.version])
    assert " dev eth0 " in container.sh("ip route get 192.0.2.2")
    assert " dev eth0 " in container.sh("ip route get 2001:db8::2")

    machine.detach(wirings.pop(leaving))
    ((staying, wiring),) = wirings.items()
    for ip in map(ip_address, ips[staying]):
        assert heard(container, ip, machine.world) == str(worlds[ip.version])
        assert heard(machine.world, worlds[ip.version], container) is not None
    assert machine.do(machine.driver.check, wiring) == []
    assert len(holds_inside(container)["rules"]) == 2
    machine.detach(wiring)
    assert machine.holds() == NOTHING
    assert holds_inside(container) == NOTHING_INSIDE


@pytest.mark.parametrize("order", list(itertools.permutations(["eth0", "eth1", "eth10"])), ids="-".join)
def test_the_lowest_name_has_the_default_route_whatever_the_order(
    machine: Machine, container: Room, order: tuple[str, ...]
) -> None:
    wirings = {}
    for ifname in order:
        number = 100 + int(ifname.removeprefix("eth"))
        wirings[ifname] = machine.attach(container, ifname, f"10.0.0.{number}", f"fd00::{number}")
    for default in ("eth0", "eth1", "eth10"):
        assert f" dev {default} " in container.sh("ip route get 192.0.2.2")
        assert f" dev {default} " in container.sh("ip route get 2001:db8::2")
        machine.detach(wirings[default])


@pytest.mark.parametrize("order", [("eth0", "net1"), ("net1", "eth0")], ids="-".join)
def test_the_interface_chosen_for_it_has_the_default_route(
    machine: Machine, container: Room, order: tuple[str, str]
) -> None:
    ips = {"eth0": (A4, A6), "net1": (B4, B6)}
    for ifname in order:
        machine.attach(container, ifname, *ips[ifname], default_route=ifname == "net1")
    assert " dev net1 " in container.sh("ip route get 192.0.2.2")
    assert " dev net1 " in container.sh("ip route get 2001:db8::2")


NETWORKS = [
    (f"eth{i}", (f"10.{i}.0.5", f"fd1{i}::5"), (f"10.{i}.0.0/16", f"fd1{i}::/64", f"10.{200 + i}.0.0/24"))
    for i in range(8)
]
"""Interface, addresses and pools of a container on eight networks."""


def attach_networks(machine: Machine, container: Room, numbers: Sequence[int]) -> dict[int, Wiring]:
    return {
        i: machine.attach(
            container, NETWORKS[i][0], *NETWORKS[i][1], pools=NETWORKS[i][2], next_hop=i + 1, network=f"n{i}"
        )
        for i in numbers
    }


def unbound_ways(container: Room, numbers: Sequence[int]) -> dict[str, tuple[str, str]]:
    """Destination -> (interface, source) that the container's kernel takes for an unbound socket."""
    found = {}
    for i in numbers:
        for destination in (f"10.{i}.7.7", f"fd1{i}::77", f"10.{200 + i}.0.9"):
            (route,) = json.loads(container.sh(f"ip -j route get {destination}"))
            found[destination] = (route["dev"], route["prefsrc"])
    return found


def expected_ways(numbers: Sequence[int], staying: Sequence[int]) -> dict[str, tuple[str, str]]:
    """The same, by each network's own interface while that is there, else by the lowest name."""
    ways = {}
    for i in numbers:
        ifname, (own4, own6), _ = NETWORKS[i if i in staying else min(staying)]
        ways |= {f"10.{i}.7.7": (ifname, own4), f"fd1{i}::77": (ifname, own6)}
        ways[f"10.{200 + i}.0.9"] = (ifname, own4)
    return ways


@pytest.mark.parametrize("numbers", [(0, 1), (2, 0, 1), (5, 3, 7, 1, 0, 6, 2, 4)], ids=len)
def test_each_network_is_reached_by_its_own_interface_and_address_whichever_others_leave(
    machine: Machine, container: Room, numbers: tuple[int, ...]
) -> None:
    wirings = attach_networks(machine, container, numbers)
    for leaving in (numbers[len(numbers) // 2], *numbers):
        assert unbound_ways(container, numbers) == expected_ways(numbers, list(wirings))
        if leaving in wirings and len(wirings) > 1:
            machine.detach(wirings.pop(leaving))
        for wiring in wirings.values():
            assert machine.do(machine.driver.check, wiring) == []
    machine.detach(*wirings.values())
    assert holds_inside(container) == NOTHING_INSIDE


def test_its_own_network_is_reached_by_our_interface_where_anothers_has_the_default_route(
    machine: Machine, container: Room
) -> None:
    container.sh(
        "ip link add net0 type bridge; ip link set net0 up; ip addr add 192.168.9.2/24 dev net0; "
        "ip -6 addr add fd99::2/64 dev net0 nodad; ip route add default via 192.168.9.1; "
        "ip -6 route add default via fd99::1 dev net0"
    )
    attach_networks(machine, container, [1])
    assert unbound_ways(container, [1]) == expected_ways([1], [1])
    assert " dev net0 " in container.sh("ip route get 192.0.2.2")


def test_an_unbound_server_answers_from_the_address_that_was_called(
    machine: Machine, make_container: MakeRoom
) -> None:
    server, *callers = make_container(), make_container(), make_container()
    attach_networks(machine, server, [0, 1])
    for i, caller in enumerate(callers):
        machine.attach(caller, "eth0", f"10.{i}.0.6", f"fd1{i}::6", network=f"n{i}")
    for family, any_ip in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        listening = server.unbound(family)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((any_ip, 7000))
        for i, caller in enumerate(callers):
            called = NETWORKS[i][1][family == socket.AF_INET6]
            asking = caller.unbound(family)
            asking.connect((called, 7000))  # takes no answer from anywhere else
            asking.send(b"hello?")
            question, seen = listening.recvfrom(64)
            listening.sendto(question, seen)
            assert asking.recv(64) == b"hello?"


def test_two_interfaces_on_one_network_do_not_take_each_others_routes(
    machine: Machine, container: Room
) -> None:
    pools = ("10.0.0.0/16", "fd00::/64")
    first = machine.attach(container, "eth0", A4, A6, pools=pools)
    machine.attach(container, "eth1", B4, B6, pools=pools)
    assert f"dev eth0 src {A4}" in container.sh("ip route get 10.0.7.7")
    machine.detach(first)
    assert f"dev eth1 src {B4}" in container.sh("ip route get 10.0.7.7")
    assert f"dev eth1 proto 157 src {B6}" in container.sh("ip route get fd00::77")


def test_routes_follow_the_networks_pools(machine: Machine, container: Room) -> None:
    before = attach_networks(machine, container, [1])[1]
    now = dataclasses.replace(before, pools=tuple(map(ip_network, ("fd11::/64", "10.7.0.0/16"))))
    for _ in range(2):
        assert machine.do(machine.driver.reroute, before, now)
        assert machine.do(machine.driver.check, now) == []
        assert container.sh("ip -4 route show 10.1.0.0/16; ip -4 route show 10.201.0.0/24") == ""
    container.sh("ip link set eth1 down")
    assert not machine.do(machine.driver.reroute, now, before)


def test_the_routes_of_another_container_that_is_at_its_path_now_stay(
    machine: Machine, make_container: MakeRoom
) -> None:
    old, new = make_container(), make_container()
    (before,) = attach_networks(machine, old, [1]).values()
    later = machine.attach(new, "eth1", "10.1.0.6", pools=("10.1.0.0/16",))
    elsewhere = dataclasses.replace(before, netns=new.path)
    with pytest.raises(NamespaceGone, match="leads to another namespace"):
        machine.do(machine.driver.reroute, elsewhere, dataclasses.replace(elsewhere, pools=()))
    assert machine.do(machine.driver.check, later) == []


@pytest.mark.parametrize(
    "damage",
    [
        "ip route del 10.1.0.0/16",
        "ip -6 route del fd11::/64",
        "ip route replace 10.1.0.0/16 via 169.254.1.2 dev eth1 onlink metric METRIC",
        # Its routes go with an IPv4 address, and stay without their source of an IPv6 one.
        "ip addr del 10.1.0.5/32 dev eth1",
        "ip addr del fd11::5/128 dev eth1",
        "ip route flush table main",
        "ip route flush table all dev eth1",
        "ip -6 route flush table main",
        "ip neigh del 169.254.1.2 dev eth1",
    ],
)
def test_a_route_to_a_pool_that_is_missing_is_named_and_put_back(
    machine: Machine, container: Room, damage: str
) -> None:
    wiring = attach_networks(machine, container, [0, 1])[1]
    metric = route_metric("eth1", default_route=False)
    container.sh(damage.replace("METRIC", str(metric)))
    missing = machine.do(machine.driver.check, wiring)
    assert missing
    if "neigh" not in damage:
        assert f"from {'fd11::5' if 'fd11' in damage or '-6' in damage else '10.1.0.5'} " in str(missing)
    assert machine.do(machine.driver.repair, wiring) == []
    assert machine.do(machine.driver.check, wiring) == []
    assert unbound_ways(container, [1]) == expected_ways([1], [1])


def test_a_missing_path_is_refused_and_creates_no_namespace(machine: Machine, container: Room) -> None:
    before = set(lines(machine.sh("ls /run/netns")))
    wiring = dataclasses.replace(wire(container, "eth0", A4), netns=f"/run/netns/{container.name}-gone")
    with pytest.raises(NamespaceGone, match="does not exist"):
        machine.do(machine.driver.setup, wiring)
    assert not {name for name in set(lines(machine.sh("ls /run/netns"))) - before if container.name in name}
    assert machine.holds() == NOTHING


def test_the_nodes_own_namespace_is_refused(machine: Machine) -> None:
    with pytest.raises(NotANamespace, match="node's own"):
        machine.do(machine.driver.setup, wire(machine, "eth0", A4))
    assert machine.holds() == NOTHING


def test_an_interface_that_is_somebody_elses_is_refused_and_left_alone(
    machine: Machine, container: Room
) -> None:
    container.sh("ip link add eth0 type bridge")
    with pytest.raises(KernelRefused, match="already has an interface eth0"):
        machine.do(machine.driver.setup, wire(container, "eth0", A4, A6))
    assert machine.holds() == NOTHING
    assert "eth0" in container.sh("ip link show type bridge")
    assert holds_inside(container)["rules"] == []


def test_wiring_what_is_wired_replaces_it(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    machine.do(machine.driver.setup, wiring)
    assert machine.do(machine.driver.check, wiring) == []
    assert heard(machine.world, WORLD4, container) == str(NODE4)


def test_a_leftover_of_the_same_name_on_the_node_is_replaced(
    machine: Machine, make_container: MakeRoom
) -> None:
    gone, container = make_container(), make_container()
    wiring = wire(container, "eth0", A4)
    machine.do(machine.driver.setup, dataclasses.replace(wiring, netns=gone.path, ifname="other"))
    machine.do(machine.driver.setup, wiring)
    assert machine.do(machine.driver.check, wiring) == []
    assert holds_inside(gone)["links"] == []


def all_requests(wiring: Wiring, machine: Machine) -> int:
    """How many requests a setup of this wiring sends."""
    count = 0
    original = NetlinkSocket._attempt

    def counting(self: NetlinkSocket, batch: Sequence[Request]) -> list[KernelRefused]:
        nonlocal count
        count += len(batch)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetlinkSocket, "_attempt", counting)
        machine.do(machine.driver.setup, wiring)
    return count


def test_a_setup_that_fails_anywhere_leaves_nothing(machine: Machine, container: Room) -> None:
    pools = (ip_network("10.0.0.0/16"), ip_network("fd00::/64"))
    wiring = dataclasses.replace(wire(container, "eth0", A4, A6), pools=pools)
    total = all_requests(wiring, machine)
    machine.do(machine.driver.remove, [wiring])
    assert total == 25
    original = NetlinkSocket._attempt
    for failing in range(1, total + 1):
        seen = 0

        def sabotaged(
            self: NetlinkSocket, batch: Sequence[Request], failing: int = failing
        ) -> list[KernelRefused]:
            """The request whose turn it is asks for something impossible instead."""
            nonlocal seen
            changed = []
            for request in batch:
                seen += 1
                impossible = messages.link_up(0x7FFFFFF0, "nothing")
                changed.append(impossible if seen == failing else request)
            return original(self, changed)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KernelRefused):
            patch.setattr(NetlinkSocket, "_attempt", sabotaged)
            machine.do(machine.driver.setup, wiring)
        assert machine.holds() == NOTHING, f"after request {failing} failed"
        assert holds_inside(container) == NOTHING_INSIDE, f"after request {failing} failed"
    machine.do(machine.driver.setup, wiring)
    assert machine.do(machine.driver.check, wiring) == []


def test_withdraw_stops_traffic_at_once_and_may_be_repeated(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    assert heard(machine.world, WORLD4, container) is not None
    machine.do(machine.driver.withdraw, wiring)
    assert heard(machine.world, WORLD4, container, within=SILENCE) is None
    assert heard(container, ip_address(A4), machine, within=SILENCE) is None
    assert heard(container, ip_address(A6), machine, within=SILENCE) is None
    assert machine.holds()["routes"] == []
    machine.do(machine.driver.withdraw, wiring)
    machine.do(machine.driver.remove, [wiring])
    machine.do(machine.driver.withdraw, wiring)


def test_an_interface_that_is_withdrawn_for_good_says_so(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    doomed = []
    for for_good in (False, True):
        machine.do(machine.driver.withdraw, wiring, for_good=for_good)
        doomed.append(machine.do(our_links, machine.node)[wiring.host_ifname].is_doomed)
    assert doomed == [False, True]


def test_remove_leaves_nothing_and_may_be_repeated(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    machine.detach(wiring)
    for _ in range(2):
        assert machine.holds() == NOTHING
        assert holds_inside(container) == NOTHING_INSIDE
        machine.detach(wiring)


def test_remove_when_the_namespace_is_gone(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    container.__exit__(None, None, None)
    machine.detach(wiring)
    machine.detach(dataclasses.replace(wiring, netns=None))
    assert machine.holds() == NOTHING


def test_removing_a_late_endpoint_leaves_the_new_owner_of_its_address_alone(
    machine: Machine, make_container: MakeRoom
) -> None:
    old, new = make_container(), make_container()
    late = machine.attach(old, "eth0", A4, A6)
    machine.do(machine.driver.withdraw, late)
    machine.attach(new, "eth0", A4, A6)
    machine.detach(late)
    assert heard(new, ip_address(A4), machine.world) == str(WORLD4)
    assert heard(new, ip_address(A6), machine.world) == str(WORLD6)


def test_removing_by_a_path_that_now_leads_to_another_container_leaves_that_one_alone(
    machine: Machine, make_container: MakeRoom
) -> None:
    old, new = make_container(), make_container()
    late = machine.attach(old, "eth0", A4, A6)
    machine.do(machine.driver.withdraw, late)
    machine.attach(new, "eth0", A4, A6)
    machine.detach(dataclasses.replace(late, netns=new.path))
    assert len(holds_inside(new)["rules"]) == 2
    assert heard(new, ip_address(A6), machine.world) == str(WORLD6)


def test_thirty_endpoints_are_removed_in_one_wait(
    machine: Machine, container: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deletion of a link waits for the kernel; those of a group wait together."""
    wirings = [machine.attach(container, f"eth{i}", f"10.0.1.{i}") for i in range(30)]
    sent: list[Request] = []
    execute = NetlinkSocket.execute

    def noted(self: NetlinkSocket, requests: Sequence[Request]) -> None:
        sent.extend(requests)
        execute(self, requests)

    monkeypatch.setattr(NetlinkSocket, "execute", noted)
    machine.do(machine.driver.remove, wirings)
    deletion = messages.delete_link("any").kind
    assert sum(request.kind == deletion for request in sent) == 1
    assert machine.holds()["links"] == []
    assert holds_inside(container) == NOTHING_INSIDE


def test_check_names_each_difference(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    name = wiring.host_ifname

    def check() -> list[str]:
        return machine.do(machine.driver.check, wiring)

    assert check() == []
    machine.sh(f"ip route del {A4}; ip -6 neigh del {A6} dev {name}; ip link set {name} mtu 1400")
    assert check() == [
        f"the node's link {name} has an MTU of 1400, not 1450",
        f"the node lacks the permanent neighbour {A6} at {wiring.mac} on {name}",
        f"the node lacks the route to {A4} via {name}",
    ]
    machine.do(machine.driver.setup, wiring)
    container.sh(
        f"ip -6 addr del {A6}/128 dev eth0; ip rule del from {A4}; ip route del default; "
        "ip neigh del 169.254.1.1 dev eth0"
    )
    metric = route_metric("eth0", default_route=False)
    assert [line for line in check() if "table 18" not in line] == [
        f"the container lacks the address {A6} on eth0",
        f"the container lacks the default route via 169.254.1.1 on eth0 in table 254 with metric {metric}",
        "the container lacks the permanent neighbour 169.254.1.1 at ee:ee:ee:ee:ee:ee on eth0",
    ]
    machine.sh(f"ip link set {name} down")
    container.sh("ip link set eth0 address 02:00:00:00:00:01")
    assert f"the container's link eth0 has the MAC 02:00:00:00:00:01, not {wiring.mac}" in check()
    assert f"the node's link {name} is down" in check()
    machine.do(machine.driver.remove, [wiring])
    assert check() == [f"the node has no link {name}"], "the container's end went with it"


def test_check_says_why_the_containers_side_is_not_seen(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    with open(container.path, "rb"):
        container.delete()
        (says,) = machine.do(machine.driver.check, wiring)
    assert says.startswith(
        f"the container's side is not seen: the network namespace {container.path} does not exist"
    )


def test_an_index_that_is_taken_is_chosen_again(
    machine: Machine, make_container: MakeRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_container(), make_container()
    chosen = iter([1 << 29, 1 << 29, (1 << 29) + 1, 1 << 29, 1 << 29, 1 << 29])
    monkeypatch.setattr("isolator.drivers.routed.random.randrange", lambda *_: next(chosen))
    machine.attach(one, "eth0", A4)
    machine.attach(other, "eth0", B4)
    assert heard(other, ip_address(B4), one) == A4
    with pytest.raises(KernelRefused):
        machine.attach(one, "eth1", "10.0.0.7")
    assert len(machine.holds()["links"]) == 2


def test_removing_many_goes_on_after_a_namespace_that_refuses(
    machine: Machine, make_container: MakeRoom, tmp_path: Path
) -> None:
    one, other = make_container(), make_container()
    wirings = [machine.attach(one, "eth0", A4), machine.attach(other, "eth0", B4)]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wirings[0] = dataclasses.replace(wirings[0], netns=str(tmp_path / "loop"))
    machine.do(machine.driver.remove, wirings)
    assert machine.holds()["links"] == []
    assert holds_inside(other) == NOTHING_INSIDE


def test_a_process_path_works_like_a_name(machine: Machine, container: Room) -> None:
    process = subprocess.Popen(["nsenter", f"--net={container.path}", "sleep", "60"])
    try:
        wiring = dataclasses.replace(wire(container, "eth0", A4), netns=f"/proc/{process.pid}/ns/net")
        machine.do(machine.policy.admit, admission(wiring))
        deadline = time.monotonic() + PATIENCE
        while (
            container.name
            not in subprocess.run(
                ["ip", "netns", "identify", str(process.pid)], check=True, text=True, stdout=subprocess.PIPE
            ).stdout
        ):
            assert time.monotonic() < deadline
        machine.do(machine.driver.setup, wiring)
        assert heard(container, ip_address(A4), machine.world) == str(WORLD4)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(NamespaceGone):
        machine.do(machine.driver.setup, wiring)
    machine.detach(wiring)
