"""Port mappings as engines write them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import InvalidInput
from isolator.model import PROTOCOLS, PortMapping
from netmodules.ports import MOST_MAPPINGS, read_port_mapping, read_port_mappings


def mapping(host_port: int = 80, container_port: int = 8080, *, host_ip: str | None = None) -> PortMapping:
    return read_port_mapping(
        "it", protocol=None, host_port=host_port, container_port=container_port, host_ip=host_ip
    )


@pytest.mark.parametrize("host_ip", ["0.0.0.0", "127.0.0.1", "127.0.0.53", "192.0.2.1", "::", "2001:db8::1"])
def test_a_host_address_is_one_that_the_node_can_have(host_ip: str) -> None:
    assert mapping(host_ip=host_ip).host_ip == ip_address(host_ip)


@pytest.mark.parametrize(
    "host_ip",
    [
        "localhost",
        "10.0.0.1/24",
        "10.0.0.256",
        "224.0.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "::1",
        "0::0001",
        "ff02::1",
        "::ffff:10.0.0.1",
        " ",
        "1\n",
    ],
)
def test_another_host_address_is_refused(host_ip: str) -> None:
    with pytest.raises(InvalidInput, match="the host's address in it"):
        mapping(host_ip=host_ip)


def test_the_same_mapping_said_twice_is_one() -> None:
    assert read_port_mappings("it", [mapping(), mapping(), mapping(81)]) == (mapping(), mapping(81))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, "192.0.2.1"),
        (None, "2001:db8::1"),
        ("0.0.0.0", "192.0.2.1"),
        ("2001:db8::1", "::"),
        ("2001:db8::1", "2001:db8::1"),
        (None, None),
    ],
)
def test_two_mappings_of_one_port_are_refused_naming_both(one: str | None, other: str | None) -> None:
    mappings = [mapping(host_ip=one), mapping(container_port=9090, host_ip=other)]
    with pytest.raises(InvalidInput, match=r"tcp port 80.* to 8080, and tcp port 80.* to 9090"):
        read_port_mappings("it", mappings)


@pytest.mark.parametrize(
    ("one", "other"), [("0.0.0.0", "::"), ("0.0.0.0", "2001:db8::1"), ("192.0.2.1", "192.0.2.2")]
)
def test_one_port_of_two_addresses_is_two_ports(one: str, other: str) -> None:
    mappings = (mapping(host_ip=one), mapping(container_port=9090, host_ip=other))
    assert read_port_mappings("it", mappings) == mappings


def test_too_many_mappings_are_refused() -> None:
    with pytest.raises(InvalidInput, match=f"at most {MOST_MAPPINGS}"):
        read_port_mappings("it", [mapping(port) for port in range(1, MOST_MAPPINGS + 2)])


@given(st.text() | st.sampled_from(PROTOCOLS), st.integers(), st.integers(), st.text() | st.none())
def test_any_values_are_read_or_refused(
    protocol: str, host_port: int, container_port: int, host_ip: str | None
) -> None:
    try:
        read = read_port_mapping(
            "it", protocol=protocol, host_port=host_port, container_port=container_port, host_ip=host_ip
        )
    except InvalidInput:
        return
    assert read.protocol in PROTOCOLS
    assert 0 < read.host_port < 65536
    assert 0 < read.container_port < 65536
