"""CLOCK_BOOTTIME as all processes of the machine see it, whatever time namespace they are in.

What one process writes and another compares, deadlines of leases above all, would be over for whoever is in a time
namespace with an offset (time_namespaces(7)).
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

_OFFSETS = Path("/proc/self/timens_offsets")


def boottime() -> int:
    """Nanoseconds since the machine booted, suspended time included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - _offset()


@functools.cache
def _offset() -> int:
    """Nanoseconds that this process's time namespace is ahead; a process never changes its own."""
    try:
        lines = _OFFSETS.read_text().splitlines()
    except OSError:
        return 0  # a kernel without them
    for clock, seconds, nanoseconds in (line.split() for line in lines):
        if clock in ("boottime", "7"):
            return int(seconds) * 10**9 + int(nanoseconds)
    return 0
