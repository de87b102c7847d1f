"""``idle``: memory and processor time of an agent that has nothing to do."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.client import AgentClient
from benchmarks.figures import Budget, Row, Sample
from benchmarks.subjects import IPV4, IPV6, containers, our_node

SETTLE = 3.0
WATCHED = 10.0
"""Seconds."""

_SCHEDULED = 2
"""CPUCLOCK_SCHED: which of a process's clocks its id names (clock_getcpuclockid(3) makes it alike)."""


def rows(_: int) -> list[Row]:
    with our_node(IPV4, IPV6) as node, containers(1) as (container,):
        # One endpoint, so that the network is in use and its addresses are kept warm.
        AgentClient(node).call("ADD", container)
        time.sleep(SETTLE)
        used, begun = processor_seconds(node.pid), time.monotonic()
        time.sleep(WATCHED)
        share = (processor_seconds(node.pid) - used) / (time.monotonic() - begun)
        resident = megabytes(node.pid)
    return [
        Row("agent idle, resident", "MB", Sample([resident]), budget=Budget(80.0, of_peer=False)),
        Row("agent idle, of one core", "%", Sample([share * 100])),
    ]


def megabytes(pid: int) -> float:
    """Resident memory of a process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far; /proc/PID/stat has it in steps of 10 ms only."""
    return time.clock_gettime((~pid << 3) | _SCHEDULED)
