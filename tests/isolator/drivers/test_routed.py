"""The routed driver on real namespaces: what it wires, what it refuses, what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import time
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from isolator.drivers import Wiring
from isolator.drivers.naming import route_metric
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink import messages
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
    wiring = wire(container, "eth0", A4, A6)
    total = all_requests(wiring, machine)
    machine.do(machine.driver.remove, [wiring])
    assert total == 22
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
    assert check() == [f"the node has no link {name}", "the container has no link eth0"]
    container.delete()
    gone = [
        f"the node has no link {name}",
        f"the network namespace {container.path} does not exist (any more)",
    ]
    assert [line.partition(";")[0] for line in check()] == gone


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
