"""Limits on endpoints' traffic: what is laid out, what it does to real traffic, and what is left of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.rates import FASTEST, SLOWEST
from isolator.drivers import Wiring, shaping
from isolator.drivers.naming import host_ifname, shaper_ifname
from isolator.drivers.routed_layout import peer_index
from isolator.model import UNLIMITED, Bandwidth, EndpointKey, Limit
from isolator.netlink import shaper_links
from isolator.netlink.seal import Seal
from isolator.netlink.traffic import Bucket
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import NOTHING, Machine, Room, admission, heard, lines, wire
from tests.patience import PATIENCE

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"
RATE = 20_000_000
LIMITED = Bandwidth(Limit(RATE), Limit(RATE))


@given(st.integers(SLOWEST, FASTEST), st.integers(0, 2**35), st.integers(576, 65535))
def test_any_limit_is_a_bucket_that_the_kernel_takes_and_that_holds_a_packet(
    rate: int, burst: int, mtu: int
) -> None:
    bucket = shaping.bucket(Limit(rate, burst), mtu)
    assert bucket.rate == rate // 8
    assert mtu < bucket.burst <= max(bucket.rate, 10 * (mtu + 14))
    assert mtu < bucket.queue <= 16 << 20
    assert bucket.burst < 2**37 // 8


def test_a_burst_is_the_one_asked_for_within_reason() -> None:
    assert shaping.bucket(Limit(10**9, 8 * 10**6), 1450).burst == 10**6
    assert shaping.bucket(Limit(10**9), 1450).burst == 1_250_000, "10 ms"
    assert shaping.bucket(Limit(10**6, 2**31), 1450).burst == 125_000, "a second"
    assert shaping.bucket(Limit(10**6), 1450) == Bucket(rate=125_000, burst=14_640, queue=46_848)


@pytest.mark.parametrize("index", [1 << 29, (1 << 30) - 1])
def test_no_two_links_of_an_endpoint_share_an_index(index: int) -> None:
    assert index < peer_index(index) < shaping.shaper_index(index) < 1 << 31


def test_who_asks_for_nothing_costs_nothing() -> None:
    wiring = Wiring("mrga", "eth0", None, (), "", 1450)
    assert shaping.ingress_requests(wiring, 5) == shaping.egress_requests(wiring, 5, Seal(b"")) == []


def limit(
    machine: Machine, container: Room, *ips: str, bandwidth: Bandwidth = LIMITED, ifname: str = "eth0"
) -> Wiring:
    """Admit and wire an interface with limits."""
    wiring = dataclasses.replace(wire(container, ifname, *ips), bandwidth=bandwidth)
    machine.do(machine.policy.admit, admission(wiring))
    machine.do(machine.driver.setup, wiring)
    return wiring


def missing(machine: Machine, wiring: Wiring) -> list[str]:
    return machine.do(machine.driver.check, wiring)


@pytest.mark.kernel
def test_what_stands_on_the_node(machine: Machine, container: Room) -> None:
    bandwidth = Bandwidth(Limit(10**7), Limit(10**6, 160_000))
    wiring = limit(machine, container, A4, A6, bandwidth=bandwidth)
    name, shaper = wiring.host_ifname, shaper_ifname(wiring.host_ifname)
    shown = {line.split(" dev ")[1].split()[0]: line for line in lines(machine.sh("tc qdisc | grep tbf"))}
    assert "rate 10Mbit burst 14640b lat" in shown[name]
    assert "rate 1Mbit burst 20000b" in shown[shaper]
    filters = machine.sh(f"tc filter show dev {name} ingress")
    assert f"mirred (Egress Redirect to device {shaper}) stolen" in filters
    assert "inet6" not in machine.sh(f"ip addr show dev {shaper}"), "nothing of its own to say"
    assert missing(machine, wiring) == []
    assert heard(container, ip_address(A4), machine) is not None
    assert heard(container, ip_address(A6), machine) is not None
    machine.detach(wiring)
    assert machine.holds() == NOTHING
    assert machine.do(shaper_links, machine.node) == set()


@pytest.mark.kernel
@pytest.mark.parametrize("rate", [SLOWEST, 8 * (2**32 - 1), 8 * 2**32, FASTEST])
def test_the_kernel_keeps_rates_of_any_size(machine: Machine, container: Room, rate: int) -> None:
    assert (
        missing(machine, limit(machine, container, A4, bandwidth=Bandwidth(Limit(rate), Limit(rate)))) == []
    )


@pytest.mark.kernel
def test_one_direction_alone(machine: Machine, make_container: MakeRoom) -> None:
    only_to = limit(machine, make_container(), A4, bandwidth=Bandwidth(ingress=Limit(RATE)))
    assert machine.do(shaper_links, machine.node) == set()
    only_from = limit(machine, make_container(), B4, bandwidth=Bandwidth(egress=Limit(RATE)))
    assert machine.do(shaper_links, machine.node) == {shaper_ifname(only_from.host_ifname)}
    assert "tbf" not in machine.sh(f"tc qdisc show dev {only_from.host_ifname}")
    assert missing(machine, only_to) == missing(machine, only_from) == []


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("tc qdisc del dev {name} root", "lacks the limit of 20mbit on what leaves {name}"),
        ("tc qdisc replace dev {name} root pfifo", "lacks the limit of 20mbit on what leaves {name}"),
        (
            "tc qdisc change dev {name} root tbf rate 1gbit burst 15k limit 125000",
            "lacks the limit of 20mbit on what leaves {name}",
        ),
        ("tc qdisc del dev {name} ingress", "does not redirect what comes in on {name} to {shaper}"),
        ("tc filter del dev {name} ingress", "does not redirect what comes in on {name} to {shaper}"),
        ("tc qdisc del dev {shaper} root", "lacks the limit of 20mbit on what leaves {shaper}"),
        ("ip link set {shaper} down", "has no link {shaper} that is up"),
        ("ip link del {shaper}", "has no link {shaper} that is up"),
    ],
)
def test_what_somebody_takes_away_is_named_and_put_back(
    machine: Machine, container: Room, damage: str, said: str
) -> None:
    wiring = limit(machine, container, A4, A6)
    names = {"name": wiring.host_ifname, "shaper": shaper_ifname(wiring.host_ifname)}
    machine.sh(damage.format(**names))
    assert missing(machine, wiring) == [f"the node {said.format(**names)}"]
    assert set(machine.do(machine.driver.limit_differences, [wiring])) == {wiring.host_ifname}
    machine.do(machine.driver.restore_limits, wiring)
    assert missing(machine, wiring) == []
    assert heard(container, ip_address(A6), machine) is not None


@pytest.mark.kernel
def test_filters_of_others_beside_ours_are_left_alone(machine: Machine, container: Room) -> None:
    wiring = limit(machine, container, A4)
    add = f"tc filter add dev {wiring.host_ifname} ingress prio 9"
    machine.sh(f"{add} protocol ip u32 match ip dport 9 0xffff action mirred egress redirect dev lo")
    machine.sh(f"{add} protocol ip u32 match ip dport 8 0xffff flowid 1:1")
    assert missing(machine, wiring) == []
    machine.sh(f"tc filter del dev {wiring.host_ifname} ingress prio 1")
    assert len(missing(machine, wiring)) == 1


@pytest.mark.kernel
def test_limits_of_an_endpoint_that_is_gone_are_nobodys_business(machine: Machine, container: Room) -> None:
    wiring = limit(machine, container, A4)
    machine.detach(wiring)
    assert machine.do(machine.driver.limit_differences, [wiring]) == {}
    machine.do(machine.driver.restore_limits, wiring)
    assert machine.do(shaper_links, machine.node) == set()


@pytest.mark.kernel
def test_a_dead_namespace_leaves_no_limit_behind(machine: Machine, make_container: MakeRoom) -> None:
    container = make_container()
    wiring = limit(machine, container, A4)
    container.delete()
    machine.detach(wiring)
    assert machine.do(shaper_links, machine.node) == set()


@pytest.mark.kernel
def test_wiring_anew_replaces_the_limits(machine: Machine, container: Room) -> None:
    first = limit(machine, container, A4)
    again = dataclasses.replace(first, bandwidth=Bandwidth(Limit(10**6), Limit(10**6)))
    machine.do(machine.driver.setup, again)
    assert missing(machine, again) == []
    assert machine.do(shaper_links, machine.node) == {shaper_ifname(first.host_ifname)}


def test_no_endpoint_has_the_name_of_a_limit() -> None:
    hosts = {host_ifname(EndpointKey(f"c{number}", "eth0")) for number in range(1000)}
    shapers = set(map(shaper_ifname, hosts))
    assert len(shapers) == 1000
    assert not shapers & hosts
    assert all(len(name) == 15 for name in shapers)


def measured(server: Room, ip: str, client: Room) -> float:
    """Bits per second of TCP payload from client to server, without its first second."""
    listening = subprocess.Popen(
        ["ip", "netns", "exec", server.name, "iperf3", "-s", "-1", "-B", ip],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while "5201" not in server.sh(
            f"ss -Hltn src '[{ip}]:5201'" if ":" in ip else f"ss -Hltn src {ip}:5201"
        ):
            assert time.monotonic() < deadline, "iperf3 does not listen"
            time.sleep(0.05)
        report = json.loads(client.sh(f"iperf3 -c {ip} -t 4 -O 1 -J"))
        assert listening.wait(PATIENCE) == 0
    finally:
        listening.kill()
        listening.wait()
    received: float = report["end"]["sum_received"]["bits_per_second"]
    return received


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("ip", [A4, A6])
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_limit_is_kept_within_a_tenth(
    machine: Machine, make_container: MakeRoom, ip: str, direction: str
) -> None:
    limited, other = make_container(), make_container()
    limit(machine, limited, A4, A6, bandwidth=Bandwidth(**{direction: Limit(RATE)}))
    limit(machine, other, B4, B6, bandwidth=UNLIMITED)
    for _ in range(5):  # a machine with other things to do does not always send that much
        if direction == "ingress":
            rate = measured(limited, ip, other)
        else:
            rate = measured(other, {A4: B4, A6: B6}[ip], limited)
        assert rate <= 1.1 * RATE
        if rate >= 0.9 * RATE:
            break
    assert rate >= 0.9 * RATE
