"""The VXLAN device, made and kept what it has to be in a real kernel."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address

import pytest

from isolator.fabric.device import DeviceSpec, Made, ensure_device, remove_device
from isolator.fabric.plan import SECOND_DEVICE, VXLAN_DEVICE, mac_of
from isolator.netlink import Node
from tests.isolator.rooms import Room, lines

pytestmark = pytest.mark.kernel

SPEC = DeviceSpec(
    mac=mac_of("n1"),
    local=ip_address("192.0.2.1"),
    port=4789,
    mtu=1450,
    addresses=(ip_address("10.64.0.1"), ip_address("fd64::1")),
)


def ensure(room: Room, spec: DeviceSpec) -> Made:
    with room.do(Node) as node:
        return room.do(ensure_device, node, spec)


def made(room: Room, spec: DeviceSpec) -> tuple[int, bool]:
    """Its link index, and whether it is new; it has all that it should."""
    found = ensure(room, spec)
    assert (found.refused, found.addresses) == ((), spec.addresses)
    return found.index, found.new


def remove(room: Room, name: str = VXLAN_DEVICE) -> bool:
    with room.do(Node) as node:
        return room.do(remove_device, node, name)


def shown(room: Room, name: str) -> str:
    return room.sh(f"ip -d -o link show {name}; ip -o address show {name}")


def is_as(room: Room, spec: DeviceSpec) -> None:
    """The kernel's device is what was asked for, and has nothing else."""
    text = shown(room, spec.name)
    assert f"link/ether {spec.mac} " in text
    assert re.search(
        rf" mtu {spec.mtu} .* vxlan id 7171951 local {spec.local} .*dstport {spec.port} nolearning", text
    )
    assert ",UP," in text
    addresses = set(re.findall(r" inet6? (\S+) ", text))
    assert addresses == {f"{ip}/{ip.max_prefixlen}" for ip in spec.addresses}


def test_it_is_made_once(container: Room) -> None:
    index, new = made(container, SPEC)
    assert (index > 0, new) == (True, True)
    is_as(container, SPEC)
    assert made(container, SPEC) == (index, False)
    is_as(container, SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"mtu": 1400},
        {"mac": mac_of("n2")},
        {"local": ip_address("192.0.2.9")},
        {"addresses": ()},
        {"addresses": (ip_address("10.64.0.2"), ip_address("fd64::1"))},
    ],
)
def test_what_can_change_changes_in_place(container: Room, change: dict[str, object]) -> None:
    index, _ = made(container, SPEC)
    changed = replace(SPEC, **change)
    assert made(container, changed) == (index, False)
    is_as(container, changed)


@pytest.mark.parametrize("change", [{"port": 8472}, {"local": ip_address("2001:db8::1")}])
def test_what_cannot_change_takes_a_new_device(container: Room, change: dict[str, object]) -> None:
    index, _ = made(container, SPEC)
    changed = replace(SPEC, **change)
    found, new = made(container, changed)
    assert (found != index, new) == (True, True)
    is_as(container, changed)


@pytest.mark.parametrize(
    "damage",
    [
        f"ip link set {VXLAN_DEVICE} down",
        f"ip link set {VXLAN_DEVICE} mtu 1300",
        f"ip link set {VXLAN_DEVICE} address 02:00:00:00:00:09",
        f"ip address flush dev {VXLAN_DEVICE}",
        f"ip address add 203.0.113.1/24 dev {VXLAN_DEVICE}; ip address add 2001:db8:9::1/64 dev {VXLAN_DEVICE}",
        f"ip link set {VXLAN_DEVICE} type vxlan learning",
        f"ip link delete {VXLAN_DEVICE}",
        f"ip link delete {VXLAN_DEVICE}; ip link add {VXLAN_DEVICE} type vxlan id 1 dstport 4789 local 192.0.2.1",
        f"ip link delete {VXLAN_DEVICE}; ip link add {VXLAN_DEVICE} type bridge; ip link set {VXLAN_DEVICE} up",
    ],
)
def test_whatever_somebody_did_to_it_is_undone(container: Room, damage: str) -> None:
    ensure(container, SPEC)
    container.sh(damage)
    ensure(container, SPEC)
    is_as(container, SPEC)


def test_its_addresses_work_where_new_links_have_no_ipv6(container: Room) -> None:
    container.sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
    ensure(container, SPEC)
    is_as(container, SPEC)


def test_it_goes_when_it_is_not_wanted(container: Room) -> None:
    ensure(container, SPEC)
    assert remove(container)
    assert not remove(container)
    assert [line for line in lines(container.sh("ip -o link")) if VXLAN_DEVICE in line] == []


def test_a_port_that_somebody_else_has_is_told_with_the_kernels_reason_and_all_else_is_there(
    container: Room,
) -> None:
    taken = container.udp(ip_address("0.0.0.0"), SPEC.port)
    found = ensure(container, SPEC)
    assert re.search(f"bring {VXLAN_DEVICE} up.*in use", str(found.refused[0]))
    assert found.addresses == SPEC.addresses
    taken.close()
    ensure(container, SPEC)
    is_as(container, SPEC)


def test_an_address_that_the_kernel_refuses_is_not_said_to_be_there_and_the_other_is(
    container: Room,
) -> None:
    refused = ip_address("ff02::9")
    found = ensure(container, replace(SPEC, addresses=(SPEC.addresses[0], refused)))
    assert found.addresses == SPEC.addresses[:1]
    assert len(found.refused) == 1
    is_as(container, replace(SPEC, addresses=SPEC.addresses[:1]))


def test_one_of_each_family_stand_side_by_side(container: Room) -> None:
    second = replace(SPEC, local=ip_address("2001:db8::1"), mtu=1430, addresses=(), name=SECOND_DEVICE[6])
    for spec in (SPEC, second):
        made(container, spec)
    for spec in (SPEC, second):
        is_as(container, spec)
        assert not ensure(container, spec).new
    assert remove(container, second.name)
    is_as(container, SPEC)
