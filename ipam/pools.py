"""The geometry of a pool: which addresses it has, which of them may be given to whom, and its blocks.

Pure: from a Pool record to numbers and back. ``parse_pool`` is where text from an operator becomes a
typed value or an error that says what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

from ipam.errors import InvalidInput, StoreError
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.ranges import Range, Ranges, range_of
from ipam.records import Pool

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""Names of networks; also what a Mesos or Marathon network name may be without quoting."""

BITS = {4: 32, 6: 128}
DEFAULT_BLOCK = {4: 26, 6: 122}
MAX_BLOCK_BITS = 12
"""A block has at most 4096 addresses: an agent keeps one number for each in memory."""

SMALLEST_POOL = {4: 32, 6: 128}
LARGEST_POOL = {4: 8, 6: 32}

UNROUTABLE: tuple[tuple[str, IPNetwork], ...] = (
    ("'this network' (RFC 791)", IPv4Network("0.0.0.0/8")),
    ("loopback", IPv4Network("127.0.0.0/8")),
    ("link-local", IPv4Network("169.254.0.0/16")),
    ("multicast", IPv4Network("224.0.0.0/4")),
    ("reserved by the IETF", IPv4Network("240.0.0.0/4")),
    ("link-local", IPv6Network("fe80::/10")),
    ("multicast", IPv6Network("ff00::/8")),
)
"""What no pool may share an address with."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A parsed pool.

    block_size: prefix length; never shorter than the pool's own prefix.
    static, excluded: as the pool says; ``excluded`` has the pool's network and broadcast address too, and what
    ``without`` took out. forced: it may lie over networks that nodes are connected to.
    """

    name: str
    network: str
    cidr: IPNetwork
    block_size: int
    static: Ranges
    excluded: Ranges
    disabled: bool
    forced: bool = False
    _withheld: Ranges = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_withheld", self.static | self.excluded)

    def without(self, taken: Ranges) -> Geometry:
        """The same pool, with what others use of it excluded."""
        used = taken.within(self.first, self.last)
        return replace(self, excluded=self.excluded | used) if used else self

    @property
    def family(self) -> Family:
        return self.cidr.version

    @property
    def first(self) -> int:
        return int(self.cidr.network_address)

    @property
    def last(self) -> int:
        return int(self.cidr.broadcast_address)

    @property
    def block_count(self) -> int:
        return 1 << (self.block_size - self.cidr.prefixlen)

    @property
    def block_length(self) -> int:
        """Addresses in one block, usable or not."""
        return 1 << (BITS[self.family] - self.block_size)

    def block(self, index: int) -> IPNetwork:
        """The ``index``-th block of the pool."""
        return self._block(self.first + index * self.block_length)

    def block_of(self, ip: IPAddress) -> IPNetwork:
        """The block that ``ip``, an address of this pool, lies in."""
        return self._block(int(ip) - (int(ip) - self.first) % self.block_length)

    def block_index(self, base: IPAddress) -> int:
        return (int(base) - self.first) // self.block_length

    def _block(self, base: int) -> IPNetwork:
        return block_at(type(self.cidr.network_address)(base), self.block_size)

    def usable(self, ip: IPAddress) -> bool:
        """May be given to somebody."""
        return ip in self.cidr and int(ip) not in self.excluded

    def dynamic(self, ip: IPAddress) -> bool:
        """May be given to somebody who did not ask for it by name."""
        return ip in self.cidr and int(ip) not in self._withheld

    def dynamic_in(self, block: IPNetwork) -> Iterator[IPAddress]:
        """The addresses of a block that may be given to anybody, in order."""
        kind = type(self.cidr.network_address)
        whole = range_of(block)
        for free in self._withheld.outside(whole.first, whole.last):
            yield from map(kind, range(free.first, free.last + 1))

    def next_block_with_dynamic(self, index: int) -> int | None:
        """The first block from ``index`` on that has an address for anybody; None if there is none.

        Jumps over static and excluded ranges: an IPv6 pool has more blocks than can be walked.
        """
        at = self.first + index * self.block_length
        end = self._withheld.end_of(at)
        at = at if end is None else end + 1
        return (at - self.first) // self.block_length if at <= self.last else None

    def usable_count(self) -> int:
        """How many addresses may be given to somebody, asked for by name or not."""
        return self.last - self.first + 1 - self.excluded.within(self.first, self.last).count()


@lru_cache(maxsize=4096)
def _geometry(
    name: str,
    network: str,
    cidr: str,
    block_size: int,
    static: tuple[str, ...],
    excluded: tuple[str, ...],
    disabled: bool,
    forced: bool,
) -> Geometry:
    parsed = ip_network(cidr)
    if not parsed.prefixlen <= block_size <= BITS[parsed.version]:
        raise ValueError(f"blocks of /{block_size} in {cidr}")
    return Geometry(
        name=name,
        network=network,
        cidr=parsed,
        block_size=block_size,
        static=Ranges(parse_range(text, parsed) for text in static),
        excluded=Ranges((*(parse_range(text, parsed) for text in excluded), *_unusable(parsed))),
        disabled=disabled,
        forced=forced,
    )


def geometry(pool: Pool) -> Geometry:
    """The geometry of a stored pool. Raises StoreError when the record makes no sense."""
    try:
        return _geometry(
            pool.name,
            pool.network,
            pool.cidr,
            pool.block_size,
            tuple(pool.static),
            tuple(pool.excluded),
            pool.disabled,
            pool.forced,
        )
    except (ValueError, InvalidInput) as error:
        raise StoreError(
            f"the store's pool {pool.name} makes no sense ({error}); restore its record from a dump"
        ) from error


def _unusable(cidr: IPNetwork) -> tuple[Range, ...]:
    """The pool's own network and broadcast address (IPv4), and the subnet-router anycast address (IPv6,
    RFC 4291 section 2.6.1). Pools of one or two addresses have neither (RFC 3021, RFC 6164)."""
    if BITS[cidr.version] - cidr.prefixlen < 2:
        return ()
    first = Range(int(cidr.network_address), int(cidr.network_address))
    if cidr.version == 6:
        return (first,)
    return first, Range(int(cidr.broadcast_address), int(cidr.broadcast_address))


def parse_range(text: str, pool: IPNetwork) -> Range:
    """``A``, ``A-B`` or a CIDR, inside ``pool``. Raises InvalidInput."""
    try:
        if "-" in text:
            left, right = (ip_address(part.strip()) for part in text.split("-", 1))
        else:
            cidr = ip_network(text.strip())
            left, right = cidr.network_address, cidr.broadcast_address
    except ValueError as error:
        raise InvalidInput(
            f"{text!r} is no address range ({error}); write FIRST-LAST, one address, or a CIDR"
        ) from error
    if left.version != right.version or int(left) > int(right):
        raise InvalidInput(f"the range {text} runs backwards or mixes families; write FIRST-LAST")
    if left not in pool or right not in pool:
        raise InvalidInput(f"the range {text} is not inside the pool {pool}")
    return Range(int(left), int(right))


def _meant(cidr: str) -> str | None:
    """The network of a CIDR that names an address in it; None if it is none at all."""
    try:
        return str(ip_network(cidr, strict=False))
    except ValueError:
        return None


def parse_pool(
    cidr: str,
    *,
    network: str,
    block_size: int | None = None,
    static: Sequence[str] = (),
    excluded: Sequence[str] = (),
    forced: bool = False,
) -> Pool:
    """A Pool record from what an operator wrote. Raises InvalidInput saying what is wrong with it."""
    try:
        parsed = ip_network(cidr)
    except ValueError as error:
        raise InvalidInput(
            f"the pool {cidr!r} is no CIDR ({error}); write for example {_meant(cidr) or '10.64.0.0/16'}"
        ) from error
    family = parsed.version
    if not LARGEST_POOL[family] <= parsed.prefixlen <= SMALLEST_POOL[family]:
        raise InvalidInput(
            f"the pool {cidr} has a prefix of /{parsed.prefixlen}; "
            f"between /{LARGEST_POOL[family]} and /{SMALLEST_POOL[family]} is possible"
        )
    what = next((what for what, range_ in UNROUTABLE if overlap(parsed, range_)), None)
    if what is None and parsed.is_reserved:
        what = "reserved by the IETF"
    if what is not None:
        raise InvalidInput(
            f"the pool {cidr} is {what}, or has such addresses; containers need routable ones, "
            "for example 10.64.0.0/16"
        )
    size = max(DEFAULT_BLOCK[family] if block_size is None else block_size, parsed.prefixlen)
    if block_size is not None and not parsed.prefixlen <= block_size <= BITS[family]:
        raise InvalidInput(
            f"the block size /{block_size} does not fit the pool {cidr}; "
            f"between /{parsed.prefixlen} and /{BITS[family]} is possible"
        )
    if BITS[family] - size > MAX_BLOCK_BITS:
        raise InvalidInput(
            f"blocks of /{size} have more than {1 << MAX_BLOCK_BITS} addresses; "
            f"/{BITS[family] - MAX_BLOCK_BITS} is the largest block"
        )
    for text in (*static, *excluded):
        parse_range(text, parsed)
    pool = Pool(
        name=cidr_name(parsed),
        cidr=str(parsed),
        network=network,
        block_size=size,
        static=list(static),
        excluded=list(excluded),
        forced=forced,
    )
    if geometry(pool).usable_count() == 0:
        raise InvalidInput(
            f"the pool {cidr} has every address excluded; exclude fewer, or leave the pool out"
        )
    return pool


def cidr_name(cidr: IPNetwork) -> str:
    """A pool's name: its CIDR in a form that fits a key. Pools never overlap, so it is unique."""
    return str(cidr).replace("/", "-")


def overlapping(cidr: IPNetwork, others: Sequence[Pool]) -> Pool | None:
    """The first of ``others`` that shares an address with ``cidr``."""
    return next((p for p in others if overlap(cidr, geometry(p).cidr)), None)


def overlap(a: IPNetwork, b: IPNetwork) -> bool:
    """Whether two networks share an address."""
    # The families are told apart first: ipaddress raises TypeError on mixed ones.
    return a.version == b.version and (a.network_address in b or b.network_address in a)


def block_at(base: IPAddress, size: int) -> IPNetwork:
    """The block of prefix length ``size`` that starts at ``base``. Raises StoreError if none does."""
    try:
        return (
            IPv4Network((int(base), size))
            if isinstance(base, IPv4Address)
            else IPv6Network((int(base), size))
        )
    except ValueError as error:
        raise StoreError(
            f"no block of prefix length {size} starts at {base} ({error}); delete its key"
        ) from error
