"""Ranges of addresses as numbers, of one family: sorted, disjoint, and asked by bisection. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    summarize_address_range,
)

from ipam.keys import Family, IPAddress, IPNetwork


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses as numbers, both ends included."""

    first: int
    last: int

    def __contains__(self, value: int) -> bool:
        return self.first <= value <= self.last


class Ranges:
    """A set of numbers. It never changes; equal sets are equal, however they were said."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        firsts: list[int] = []
        lasts: list[int] = []
        for one in sorted(ranges, key=lambda one: one.first):
            if lasts and one.first <= lasts[-1] + 1:
                lasts[-1] = max(lasts[-1], one.last)
            else:
                firsts.append(one.first)
                lasts.append(one.last)
        self._firsts, self._lasts = tuple(firsts), tuple(lasts)

    def __contains__(self, value: int) -> bool:
        return self.end_of(value) is not None

    def __iter__(self) -> Iterator[Range]:
        return map(Range, self._firsts, self._lasts)

    def __len__(self) -> int:
        """How many ranges there are, not how many numbers."""
        return len(self._firsts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranges):
            return NotImplemented
        return (self._firsts, self._lasts) == (other._firsts, other._lasts)

    def __hash__(self) -> int:
        return hash((self._firsts, self._lasts))

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges((*self, *other)) if self and other else self or other

    def end_of(self, value: int) -> int | None:
        """The last number of the range that ``value`` lies in; None if it lies in none."""
        place = bisect_right(self._firsts, value) - 1
        return self._lasts[place] if place >= 0 and value <= self._lasts[place] else None

    def within(self, first: int, last: int) -> Ranges:
        """What of them lies in [first, last]."""
        start = max(bisect_right(self._firsts, first) - 1, 0)
        end = bisect_right(self._firsts, last)
        pieces = zip(self._firsts[start:end], self._lasts[start:end], strict=True)
        return Ranges(
            Range(max(from_, first), min(to, last)) for from_, to in pieces if to >= first and from_ <= last
        )

    def count(self) -> int:
        """How many numbers there are."""
        return sum(self._lasts) - sum(self._firsts) + len(self._firsts)

    def outside(self, first: int, last: int) -> Iterator[Range]:
        """What of [first, last] lies in none of them, ascending."""
        at = first
        for one in self.within(first, last):
            if at < one.first:
                yield Range(at, one.first - 1)
            at = one.last + 1
        if at <= last:
            yield Range(at, last)


def range_of(network: IPNetwork) -> Range:
    """All addresses of a network."""
    return Range(int(network.network_address), int(network.broadcast_address))


def without(network: IPNetwork, taken: Ranges) -> list[IPNetwork]:
    """The fewest networks that have all addresses of ``network`` but those of ``taken``, ascending."""
    kind = type(network.network_address)
    whole = range_of(network)
    return [
        piece
        for gap in taken.outside(whole.first, whole.last)
        for piece in summarize(kind(gap.first), kind(gap.last))
    ]


def address(value: int, family: Family) -> IPAddress:
    """An address from its number."""
    return IPv4Address(value) if family == 4 else IPv6Address(value)


def summarize(first: IPAddress, last: IPAddress) -> Iterator[IPNetwork]:
    """The fewest networks from one address to another of the same family, both included."""
    return iter(summarize_address_range(first, last))


def collapse(networks: Iterable[IPNetwork]) -> list[IPNetwork]:
    """The fewest networks with the same addresses, IPv4 first."""
    every = list(networks)
    four = [network for network in every if isinstance(network, IPv4Network)]
    six = [network for network in every if isinstance(network, IPv6Network)]
    return [*collapse_addresses(four), *collapse_addresses(six)]
