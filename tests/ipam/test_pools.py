"""Pools against a slow model: plain sets of addresses."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipam.errors import InvalidInput, StoreError
from ipam.pools import Geometry, geometry, overlapping, parse_pool
from ipam.records import Pool


def shape(cidr: str, **options: object) -> Geometry:
    return geometry(parse_pool(cidr, network="prod", **options))


def everything(cidr: str) -> set[object]:
    net = ip_network(cidr)
    return {net[i] for i in range(net.num_addresses)}


@st.composite
def pools(draw: st.DrawFn) -> tuple[str, int, list[tuple[int, int]], list[tuple[int, int]]]:
    family = draw(st.sampled_from([4, 6]))
    bits = 32 if family == 4 else 128
    length = draw(st.integers(bits - 8, bits))
    base = ip_address("10.64.0.0" if family == 4 else "fd00:1::")
    at = int(base) + (draw(st.integers(0, 3)) << (bits - length))
    count = 1 << (bits - length)
    spans = st.lists(
        st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).map(sorted).map(tuple), max_size=3
    )
    return f"{type(base)(at)}/{length}", draw(st.integers(length, bits)), draw(spans), draw(spans)


def texts(cidr: str, spans: list[tuple[int, int]]) -> list[str]:
    net = ip_network(cidr)
    return [f"{net[a]}-{net[b]}" for a, b in spans]


@settings(max_examples=150, deadline=None, database=None, print_blob=True)
@given(pools())
def test_a_pool_says_what_sets_of_addresses_say(drawn: tuple) -> None:
    cidr, block_size, static_spans, excluded_spans = drawn
    net, all_ips = ip_network(cidr), everything(cidr)
    static = {net[i] for a, b in static_spans for i in range(a, b + 1)}
    unusable = {net[i] for a, b in excluded_spans for i in range(a, b + 1)}
    if net.num_addresses > 2:
        unusable |= {net[0]} | ({net[-1]} if net.version == 4 else set())
    options = {
        "block_size": block_size,
        "static": texts(cidr, static_spans),
        "excluded": texts(cidr, excluded_spans),
    }
    if unusable == all_ips:
        with pytest.raises(InvalidInput, match="every address excluded"):
            shape(cidr, **options)
        return
    pool = shape(cidr, **options)
    assert {ip for ip in all_ips if pool.usable(ip)} == all_ips - unusable
    assert {ip for ip in all_ips if pool.dynamic(ip)} == all_ips - unusable - static
    assert pool.usable_count() == len(all_ips - unusable)
    blocks = [pool.block(i) for i in range(pool.block_count)]
    assert [ip for block in blocks for ip in pool.dynamic_in(block)] == sorted(all_ips - unusable - static)
    for index, block in enumerate(blocks):
        assert pool.block_index(block.network_address) == index
        assert all(pool.block_of(ip) == block for ip in (block[0], block[-1]))
        open_from = [i for i in range(index, len(blocks)) if any(pool.dynamic_in(blocks[i]))]
        assert pool.next_block_with_dynamic(index) == (open_from[0] if open_from else None)


def test_no_address_outside_the_pool_is_usable() -> None:
    pool = shape("10.64.0.0/24")
    assert not any(pool.usable(ip_address(ip)) for ip in ("10.64.1.1", "10.63.255.255", "fd00::1"))


def test_ipv4_network_and_broadcast_addresses_are_not_usable() -> None:
    pool = shape("10.64.0.0/24")
    assert [pool.usable(pool.cidr[i]) for i in (0, 1, 254, 255)] == [False, True, True, False]


def test_the_ipv6_subnet_router_address_is_not_usable_and_the_last_one_is() -> None:
    pool = shape("fd00::/120")
    assert [pool.usable(pool.cidr[i]) for i in (0, 1, 255)] == [False, True, True]


@pytest.mark.parametrize("cidr", ["10.0.0.0/31", "10.0.0.1/32", "fd00::/127", "fd00::1/128"])
def test_pools_of_one_or_two_addresses_use_all_of_them(cidr: str) -> None:
    assert shape(cidr).usable_count() == ip_network(cidr).num_addresses


def test_an_ipv6_pool_that_is_all_static_has_no_block_for_everybody_and_says_so_at_once() -> None:
    assert shape("fd00::/48", static=["fd00::/48"]).next_block_with_dynamic(0) is None


def test_the_block_size_never_exceeds_the_pool() -> None:
    assert shape("10.64.0.0/28").block_size == 28
    assert shape("10.64.0.0/16").block_size == 26
    assert shape("fd00::/64").block_size == 122


@pytest.mark.parametrize(
    ("cidr", "options", "complaint", "next_step"),
    [
        ("10.64.0/16", {}, "no CIDR", "write for example"),
        ("10.64.0.1/16", {}, "host bits", "write for example"),
        ("nonsense", {}, "no CIDR", "write for example"),
        ("10.0.0.0/7", {}, "prefix of /7", "between /8 and /32"),
        ("fd00::/31", {}, "prefix of /31", "between /32 and /128"),
        ("127.0.0.0/24", {}, "loopback", "for example"),
        ("169.0.0.0/8", {}, "link-local", "for example"),
        ("169.254.1.0/24", {}, "link-local", "for example"),
        ("224.1.0.0/16", {}, "multicast", "for example"),
        ("240.0.0.0/8", {}, "reserved", "for example"),
        ("0.1.0.0/16", {}, "this network", "for example"),
        ("fe80::/64", {}, "link-local", "for example"),
        ("ff02::/64", {}, "multicast", "for example"),
        ("::/64", {}, "reserved", "for example"),
        ("10.64.0.0/16", {"block_size": 15}, "does not fit", "between /16 and /32"),
        ("10.64.0.0/16", {"block_size": 33}, "does not fit", "between /16 and /32"),
        ("10.64.0.0/16", {"block_size": 19}, "more than 4096", "largest block"),
        ("fd00::/64", {"block_size": 100}, "more than 4096", "largest block"),
        ("10.64.0.0/16", {"static": ["10.65.0.0/24"]}, "not inside the pool", "10.64.0.0/16"),
        ("10.64.0.0/16", {"static": ["fd00::1"]}, "not inside the pool", "10.64.0.0/16"),
        ("10.64.0.0/16", {"excluded": ["10.64.0.9-10.64.0.1"]}, "runs backwards", "write FIRST-LAST"),
        ("10.64.0.0/16", {"excluded": ["10.64.0.1-fd00::1"]}, "mixes families", "write FIRST-LAST"),
        ("10.64.0.0/16", {"excluded": ["some-thing"]}, "no address range", "write FIRST-LAST"),
        (
            "10.64.0.0/16",
            {"excluded": ["10.64.0.1-10.64.0.2-10.64.0.3"]},
            "no address range",
            "write FIRST-LAST",
        ),
        ("10.64.0.0/30", {"excluded": ["10.64.0.1-10.64.0.2"]}, "every address excluded", "exclude fewer"),
    ],
)
def test_nonsense_is_refused_with_the_thing_the_cause_and_the_next_step(
    cidr: str, options: dict[str, object], complaint: str, next_step: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_pool(cidr, network="prod", **options)
    message = str(refused.value)
    named = next(iter(options.values())) if options else cidr
    assert str(named[0] if isinstance(named, list) else named) in message or cidr in message
    assert complaint in message
    assert next_step in message


@given(st.integers(20, 32), st.integers(0, 255), st.integers(20, 32), st.integers(0, 255))
@settings(max_examples=200, deadline=None, database=None)
def test_pools_overlap_exactly_when_they_share_an_address(
    len_a: int, at_a: int, len_b: int, at_b: int
) -> None:
    a, b = (
        ip_network((int(ip_address("10.0.0.0")) + (at << 4), length), strict=False)
        for length, at in ((len_a, at_a), (len_b, at_b))
    )
    share = int(a[0]) <= int(b[-1]) and int(b[0]) <= int(a[-1])
    assert (overlapping(a, [parse_pool(str(b), network="x")]) is not None) == share


def test_families_never_overlap() -> None:
    assert overlapping(ip_network("10.0.0.0/8"), [parse_pool("fd00::/64", network="x")]) is None


@pytest.mark.parametrize("change", [{"cidr": "bogus"}, {"block_size": 200}, {"static": ["x"]}])
def test_a_stored_pool_that_makes_no_sense_is_a_store_error_naming_it(change: dict[str, object]) -> None:
    pool = Pool(name="10.0.0.0-24", cidr="10.0.0.0/24", network="prod", block_size=26).with_(**change)
    with pytest.raises(StoreError, match=r"10\.0\.0\.0-24"):
        geometry(pool)
