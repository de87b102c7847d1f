"""Bits per second, as people write them: ``500k``, ``10mbit``, ``1G``; a bare number is bits per second."""

from __future__ import annotations

import re

from ipam.errors import InvalidInput

SLOWEST, FASTEST = 8_000, 10**12
"""Bits per second. Slower than a packet in twelve seconds, or faster than any link, is a slip of the pen."""

_UNITS = {
    **dict.fromkeys(("", "bit"), 1),
    **dict.fromkeys(("k", "kbit"), 10**3),
    **dict.fromkeys(("M", "mbit", "Mbit"), 10**6),
    **dict.fromkeys(("G", "gbit", "Gbit"), 10**9),
}

_RATE = re.compile(r"([1-9][0-9]{0,14})([A-Za-z]{0,4})", re.ASCII)


def parse_rate(what: str, text: str) -> int:
    """Bits per second. Raises InvalidInput naming ``what``."""
    match = _RATE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise InvalidInput(f"{what} must be bits per second like 500kbit, 10mbit or 1gbit, not {text!r:.80}")
    return check_rate(what, int(match[1]) * _UNITS[match[2]])


def check_rate(what: str, rate: int) -> int:
    """The rate, if it is one that can be kept to. Raises InvalidInput naming ``what``."""
    if not SLOWEST <= rate <= FASTEST:
        raise InvalidInput(
            f"{what} must be from {rate_text(SLOWEST)} to {rate_text(FASTEST)} per second, not {rate!s:.40} bits"
        )
    return rate


def rate_text(rate: int) -> str:
    """The shortest way to write it."""
    for unit, factor in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 1000)):
        if rate and rate % factor == 0:
            return f"{rate // factor}{unit}"
    return f"{rate}bit"
