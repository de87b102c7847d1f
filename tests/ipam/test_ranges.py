"""Ranges of addresses, held against sets of numbers."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.keys import IPNetwork
from ipam.ranges import Range, Ranges, without

SPACE = 64


@st.composite
def some_ranges(draw: st.DrawFn) -> list[Range]:
    ends = st.integers(0, SPACE - 1)
    return [Range(min(pair), max(pair)) for pair in draw(st.lists(st.tuples(ends, ends), max_size=6))]


def numbers(ranges: list[Range]) -> set[int]:
    return {value for one in ranges for value in range(one.first, one.last + 1)}


@given(some_ranges(), some_ranges())
def test_ranges_are_the_set_of_their_numbers(one: list[Range], other: list[Range]) -> None:
    expected = numbers(one)
    found = Ranges(one)
    assert {value for value in range(SPACE) if value in found} == expected
    assert found.count() == len(expected)
    assert numbers(list(found | Ranges(other))) == expected | numbers(other)
    assert (found == Ranges(other)) == (expected == numbers(other))


@given(some_ranges(), st.integers(0, SPACE - 1), st.integers(0, SPACE - 1))
def test_a_window_is_split_into_what_is_within_and_outside(ranges: list[Range], a: int, b: int) -> None:
    first, last = min(a, b), max(a, b)
    found = Ranges(ranges)
    window = set(range(first, last + 1))
    assert numbers(list(found.within(first, last))) == numbers(ranges) & window
    assert numbers(list(found.outside(first, last))) == window - numbers(ranges)


@given(some_ranges(), st.integers(0, SPACE - 1))
def test_the_end_of_a_range_is_the_last_number_before_a_gap(ranges: list[Range], at: int) -> None:
    covered = numbers(ranges)
    expected = None
    if at in covered:
        expected = next(value for value in range(at, SPACE + 1) if value + 1 not in covered)
    assert Ranges(ranges).end_of(at) == expected


@pytest.mark.parametrize("whole", [ip_network("10.50.0.0/26"), ip_network("fd50::/122")])
@given(ranges=some_ranges())
def test_a_network_without_ranges_is_the_fewest_networks_of_the_rest(
    whole: IPNetwork, ranges: list[Range]
) -> None:
    base = int(whole.network_address)
    closed = Ranges(Range(base + one.first, base + one.last) for one in ranges)
    parts = without(whole, closed)
    assert [int(ip) - base for part in parts for ip in part] == sorted(set(range(SPACE)) - numbers(ranges))
    assert len(parts) == fewest(set(range(SPACE)) - numbers(ranges), 0, SPACE)


def fewest(rest: set[int], first: int, length: int) -> int:
    """The slow and obvious way: halve until a half is all there, or not at all."""
    here = rest & set(range(first, first + length))
    if len(here) in (0, length):
        return int(bool(here))
    return fewest(rest, first, length // 2) + fewest(rest, first + length // 2, length // 2)
