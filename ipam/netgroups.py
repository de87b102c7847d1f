"""Netgroups: names, and patterns of names. The one place that says what may be one.

Two endpoints may talk if they share a netgroup, so its name is what access hangs on; it comes from users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NewType

from ipam.errors import InvalidInput
from ipam.pools import NAME

Netgroup = NewType("Netgroup", str)
"""A name that ``parse_netgroup`` has seen, or a network's."""

PUBLIC = Netgroup("public")
"""Reachable from anywhere; so no pattern covers it, and networks allow it by itself."""

MOST_NETGROUPS = 64
"""Of one endpoint. Each is a rule that packets to it are compared with one after the other."""

_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9_.*-]{0,62}", re.ASCII)


def parse_netgroup(what: str, text: str) -> Netgroup:
    """A netgroup's name. Network names are of the same grammar, and a network's own is its default netgroup.

    Raises InvalidInput naming ``what``.
    """
    if NAME.fullmatch(text) is None:
        raise InvalidInput(
            f"{what} must be 1 to 63 letters, digits, '_', '.' and '-', a letter or digit first, not {text!r:.80}"
        )
    return Netgroup(text)


def check_pattern(text: str) -> None:
    """Raises InvalidInput if it is neither a netgroup's name nor one with ``*`` for any characters."""
    if _PATTERN.fullmatch(text) is None:
        raise InvalidInput(
            f"{text!r} is no netgroup; write a name, or one with * for any characters, for example team-*"
        )


def covered(name: Netgroup, patterns: Iterable[str]) -> bool:
    """Whether a pattern covers the name; none covers ``public``."""
    return name != PUBLIC and any(_covers(pattern, name) for pattern in patterns)


def _covers(pattern: str, name: str) -> bool:
    """``*`` stands for any characters, also none. Without a regular expression: those can be made to take long."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    if not name.startswith(first):
        return False
    at = len(first)
    *middle, last = rest
    for part in middle:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return name.endswith(last) and len(name) - len(last) >= at
