"""The connection table of the calling thread's network namespace: its size, and what one endpoint may have of it."""

from __future__ import annotations

from typing import NamedTuple

from isolator import sysctl
from isolator.policy.book import DEFAULT_CONNECTIONS

SHARE = 20
"""An endpoint may have one of so many parts of the table, so that ten at their limit leave half of it."""


class Table(NamedTuple):
    """tracked: connections in the table now. most: that fit; 0 if there is no limit, or nothing is tracked yet."""

    tracked: int
    most: int


def connection_table() -> Table:
    """How full the table is."""
    tracked, most = (sysctl.read(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    return Table(int(tracked or 0), int(most or 0))


def fair_share() -> int:
    """Connections that an endpoint may have tracked where its network says nothing."""
    most = connection_table().most
    return max(most // SHARE, 1) if most else DEFAULT_CONNECTIONS
