"""The rules of a network: what may be one, and what it covers."""

from __future__ import annotations

import fnmatch
import json
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import InvalidInput
from ipam.netgroups import PUBLIC, Netgroup, check_pattern, covered, parse_netgroup
from ipam.permissions import (
    NEW_NETWORK,
    allows_host_port,
    allows_netgroup,
    allows_static,
    check_rules,
    parse_ports,
)
from ipam.pools import geometry, parse_pool
from ipam.rates import FASTEST, SLOWEST, parse_rate, rate_text
from ipam.records import Network

NEW = Network(name="web", pools=[], **NEW_NETWORK)
POOL = geometry(parse_pool("10.64.0.0/24", network="web", static=["10.64.0.10-10.64.0.19"]))
SHORT = st.text("ab.-*", min_size=1, max_size=8)


def test_a_record_from_before_there_were_rules_allows_what_worked_then() -> None:
    old = Network.decode("networks/web", json.dumps({"name": "web", "pools": [], "later": 1}).encode())
    assert old.unknown == {"later": 1}
    check_rules(old)
    assert allows_netgroup(old, Netgroup("db"))
    assert allows_netgroup(old, PUBLIC)
    assert allows_static(old, [POOL], ip_address("10.64.0.77"))
    assert old.allow_mac
    assert [allows_host_port(old, port) for port in (22, 30999, 31000, 32000, 32001)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_a_new_network_allows_its_own_netgroup_and_its_static_ranges() -> None:
    check_rules(NEW)
    names = (Netgroup("web"), Netgroup("db"), PUBLIC)
    assert [allows_netgroup(NEW, name) for name in names] == [True, False, False]
    asked = ("10.64.0.9", "10.64.0.10", "10.64.0.19", "10.64.0.20")
    assert [allows_static(NEW, [POOL], ip_address(ip)) for ip in asked] == [False, True, True, False]


def test_no_pattern_covers_public() -> None:
    anything = NEW.with_(allow_netgroups=["*", "public", "pub*"])
    assert allows_netgroup(anything, Netgroup("publicity"))
    assert not allows_netgroup(anything, PUBLIC)
    assert allows_netgroup(anything.with_(allow_public=True), PUBLIC)
    with pytest.raises(InvalidInput, match="--allow-public"):
        check_rules(NEW.with_(name="public"))


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        ("10.64.0.7", ["10.64.0.7"], ["10.64.0.8", "fd00::7"]),
        ("10.64.0.0/28", ["10.64.0.15"], ["10.64.0.16"]),
        ("10.64.0.5-10.64.0.6", ["10.64.0.6"], ["10.64.0.7"]),
        ("fd00::/120", ["fd00::ff"], ["fd00::100", "0.0.0.1"]),
    ],
)
def test_static_addresses_are_covered_by_ranges(rule: str, inside: list[str], outside: list[str]) -> None:
    network = NEW.with_(allow_static=[rule])
    check_rules(network)
    assert all(allows_static(network, [POOL], ip_address(ip)) for ip in inside)
    assert not any(allows_static(network, [POOL], ip_address(ip)) for ip in outside)


@given(SHORT, SHORT.map(lambda text: text.replace("*", "a")))
def test_patterns_cover_what_the_shell_says_they_do(pattern: str, name: str) -> None:
    assert covered(Netgroup(name), [pattern]) == fnmatch.fnmatchcase(name, pattern)


@given(st.text())
def test_only_names_are_netgroups(text: str) -> None:
    try:
        name = parse_netgroup("it", text)
    except InvalidInput:
        return
    assert name.isascii()
    assert name[0].isalnum()
    assert all(letter.isalnum() or letter in "-_." for letter in name)
    check_pattern(name)


@pytest.mark.parametrize("text", ["0", "65536", "80-", "-80", "80-79", "1-2-3", "٨٠", "1e3", "", "80 "])
def test_what_is_no_port_range_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no port range"):
        parse_ports(text)


@given(st.integers(SLOWEST, FASTEST))
def test_a_rate_is_written_as_it_is_read(rate: int) -> None:
    assert parse_rate("it", rate_text(rate)) == rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("500k", 500_000), ("10mbit", 10**7), ("10M", 10**7), ("1G", 10**9), ("1gbit", 10**9), ("9600", 9600)],
)
def test_units_of_rates(text: str, rate: int) -> None:
    assert parse_rate("it", text) == rate


@given(st.text())
def test_any_rule_is_read_or_refused(text: str) -> None:
    for field in ("allow_netgroups", "allow_static", "allow_hostports"):
        try:
            check_rules(NEW.with_(**{field: [text]}))
        except InvalidInput:
            continue
