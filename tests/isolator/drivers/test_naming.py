"""Names and numbers that follow from an endpoint alone."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.drivers.naming import host_ifname, mac_for, route_metric, route_table
from isolator.model import EndpointKey

IFNAMES = st.from_regex(r"\A[^/:\s]{1,15}\Z")


@given(st.text(), IFNAMES)
def test_host_ifname_fits_the_kernel_and_is_ours(container_id: str, ifname: str) -> None:
    name = host_ifname(EndpointKey(container_id.replace("\ud800", ""), ifname))
    assert re.fullmatch(r"mrg[a-z2-7]{12}", name)


def test_host_ifname_never_changes_between_versions() -> None:
    """A newer agent must find the interfaces of an older one."""
    assert host_ifname(EndpointKey("c1", "eth0")) == "mrguyuciqay44b5"


def test_host_ifname_tells_containers_and_interfaces_apart() -> None:
    keys = [EndpointKey(c, i) for c in ("a", "ab", "abc") for i in ("eth0", "b0", "c0", "eth01")]
    assert len({host_ifname(key) for key in keys}) == len(keys)


def test_mac_holds_the_ipv4_address() -> None:
    assert mac_for([ip_address("10.0.0.5")]) == "0a:58:0a:00:00:05"
    assert mac_for([ip_address("10.0.0.5"), ip_address("fd00::5")]) == "0a:58:0a:00:00:05"


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_mac_is_unicast_and_locally_administered(ip: IPv4Address | IPv6Address) -> None:
    first = int(mac_for([ip])[:2], 16)
    assert first & 0b11 == 0b10
    assert mac_for([ip]) == mac_for([ip])


def test_mac_needs_an_address() -> None:
    with pytest.raises(ValueError, match="at least one address"):
        mac_for([])


def test_metrics_follow_natural_order() -> None:
    names = ["ens3", "eth", "eth0", "eth1", "eth2", "eth9", "eth10", "eth99", "net0", "wan1"]
    metrics = [route_metric(name, default_route=False) for name in names]
    assert metrics == sorted(metrics)
    assert len(set(metrics)) == len(metrics)


@given(IFNAMES, IFNAMES)
def test_a_chosen_default_route_beats_every_other(chosen: str, other: str) -> None:
    assert route_metric(chosen, default_route=True) < route_metric(other, default_route=False)


@given(IFNAMES, st.booleans())
def test_metrics_and_tables_are_numbers_the_kernel_takes(ifname: str, default_route: bool) -> None:
    assert 0 < route_metric(ifname, default_route=default_route) < 2**29
    assert 256 <= route_table(ifname) < 2**31


@pytest.mark.parametrize("stem", ["eth", "net", "veth-a", "wlan"])
def test_tables_of_one_container_differ(stem: str) -> None:
    assert len({route_table(f"{stem}{i}") for i in range(1000)}) == 1000
