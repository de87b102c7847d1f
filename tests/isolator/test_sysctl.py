"""Kernel settings."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from isolator import sysctl
from isolator.errors import KernelRefused
from isolator.netlink import Node
from tests.isolator.rooms import Room, settings

pytestmark = pytest.mark.kernel

FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")


def enable_forwarding(room: Room) -> None:
    with room.do(Node) as node:
        room.do(sysctl.enable_forwarding, node)


def test_forwarding_is_on_and_stays_on(container: Room) -> None:
    for _ in range(2):
        enable_forwarding(container)
        assert set(settings(container, FORWARDING).values()) == {"1"}


def test_the_underlay_goes_on_listening_to_router_advertisements(container: Room) -> None:
    container.sh(
        "for name in uplink other; do ip link add $name type veth peer name p$name; ip link set $name up; done\n"
        "sysctl -qw net.ipv6.conf.uplink.accept_ra=1 net.ipv6.conf.other.accept_ra=1\n"
        "ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip link set puplink up\n"
        "ip -6 route add default via 2001:db8::2 dev uplink"
    )
    accept_ra = [f"net/ipv6/conf/{name}/accept_ra" for name in ("uplink", "other")]
    enable_forwarding(container)
    assert list(settings(container, accept_ra).values()) == ["2", "1"]


def test_what_an_operator_turned_off_stays_off(container: Room) -> None:
    container.sh(
        "ip link add uplink type veth peer name peer; ip link set uplink up; ip link set peer up\n"
        "sysctl -qw net.ipv6.conf.uplink.accept_ra=0 net.ipv4.conf.all.rp_filter=2\n"
        "ip addr add 192.0.2.1/24 dev uplink; ip route add default via 192.0.2.2"
    )
    enable_forwarding(container)
    untouched = ["net/ipv6/conf/uplink/accept_ra", "net/ipv4/conf/all/rp_filter"]
    assert list(settings(container, untouched).values()) == ["0", "2"]


def test_nothing_is_written_that_is_so_already(container: Room) -> None:
    assert container.do(sysctl.ensure, "net/ipv4/ip_forward", "1")
    assert not container.do(sysctl.ensure, "net/ipv4/ip_forward", "1")


def test_a_setting_that_does_not_exist() -> None:
    assert sysctl.read("net/ipv4/nothing") is None
    with pytest.raises(KernelRefused, match=r"net\.ipv4\.nothing") as refused:
        sysctl.ensure("net/ipv4/nothing", "1")
    assert refused.value.errno == errno.ENOENT


def test_a_value_that_is_no_value(container: Room) -> None:
    before = container.do(Path("/proc/sys/net/ipv4/ip_forward").read_text)
    with pytest.raises(KernelRefused, match="Invalid argument"):
        container.do(sysctl.ensure, "net/ipv4/ip_forward", "maybe")
    assert container.do(Path("/proc/sys/net/ipv4/ip_forward").read_text) == before
