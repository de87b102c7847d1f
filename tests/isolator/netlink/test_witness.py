"""What the kernel tells of things taken away, on the node and inside containers."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.netlink import Witness, our_links
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import Machine, Room

pytestmark = pytest.mark.kernel

A4, A6 = "10.0.0.5", "fd00::5"


@pytest.fixture
def witness(machine: Machine) -> Iterator[Witness]:
    witness = machine.do(Witness)
    yield witness
    witness.close()


def number_of(machine: Machine, host_ifname: str) -> int:
    number = machine.do(our_links, machine.node)[host_ifname].peer_namespace
    assert number is not None
    return number


def test_what_goes_inside_a_container_is_told_with_its_namespaces_number(
    machine: Machine, make_container: MakeRoom, witness: Witness
) -> None:
    one, other = make_container(), make_container()
    links = [machine.attach(room, "eth0", ip).host_ifname for room, ip in ((one, A4), (other, "10.0.0.6"))]
    numbers = [number_of(machine, link) for link in links]
    witness.seen()
    for damage in ("ip route del default", f"ip addr del {A4}/32 dev eth0", "ip link set eth0 down"):
        one.sh(damage)
        assert witness.seen().namespaces == {numbers[0]}, damage
    assert not witness.seen()
    other.sh("ip rule del from 10.0.0.6")
    assert witness.seen().namespaces == {numbers[1]}


def test_what_goes_on_the_node_is_told_by_address_and_link(
    machine: Machine, container: Room, witness: Witness
) -> None:
    name = machine.attach(container, "eth0", A4, A6).host_ifname
    witness.seen()
    machine.sh(f"ip route del {A4}")
    assert witness.seen().ips == {ip_address(A4)}
    machine.sh(f"ip neigh del {A6} dev {name}")
    assert ip_address(A6) in witness.seen().ips
    machine.sh(f"ip link set {name} down")
    assert witness.seen().links == {name}


def test_wiring_an_endpoint_is_no_loss(machine: Machine, container: Room, witness: Witness) -> None:
    witness.seen()
    machine.attach(container, "eth0", A4, A6)
    assert not witness.seen()


def test_more_than_fits_is_said_to_be_lost_and_costs_a_bounded_look(
    machine: Machine, container: Room, witness: Witness
) -> None:
    machine.attach(container, "eth0", A4, A6)
    witness.seen()
    container.sh(
        "for n in $(seq 1 40); do for m in $(seq 1 100); do echo addr add 172.16.$n.$m/32 dev eth0; "
        "echo addr del 172.16.$n.$m/32 dev eth0; done; done | ip -batch -"
    )
    assert witness.seen().lost
    assert not witness.seen()
