"""Whether a container's namespace is vacant: still there, because something holds its handle, with no process in it.

A mount or an open file keeps a namespace, and with it the interface, alive for as long as it likes: an engine that
crashed, or whose DEL got lost, leaves one behind. Processes are what uses an address.

The handle is a path, and paths are re-used; so what it leads to must hold our interface. Whatever cannot be told
counts as occupied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ipam.boottime import boottime
from isolator.engines import MESOS, NET_MODULES
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.model import Endpoint
from isolator.netlink import Node, unpinned
from isolator.netlink.far_end import far_end
from isolator.window import blind, window

STARTS_FIRST = frozenset({MESOS, NET_MODULES})
"""Engines that have a process in the namespace before they ask for an ADD."""

SETTLED = 60 * 10**9
"""Nanoseconds after its ADD in which another engine's container may have no process yet."""

_PROC = Path("/proc")

_INIT = "1"
"""The machine's first process is in no container; where the agent runs with less than all rights, it may not be looked
at."""


def may_be_vacant(endpoint: Endpoint) -> bool:
    """Whether it says anything that no process is there (yet)."""
    return endpoint.engine in STARTS_FIRST or boottime() - endpoint.asked.at > SETTLED


def is_vacant(node: Node, endpoint: Endpoint) -> bool:
    """Whether no process is in the endpoint's namespace, while its interface is there. False where the agent does not
    see all processes: that it sees none says nothing then.

    Takes some microseconds for each thread of the machine.
    """
    if not endpoint.netns or blind(window(endpoint.asked.boot_id)):
        return False
    try:
        _, inode = unpinned(endpoint.netns)
        if inode is not None:
            # Its process may have ended before others; as long as our interface is in it, the number is its own.
            return not _has_process(inode) and not _has_process(inode)
        with node.open_namespace(endpoint.netns) as namespace:
            with far_end(node, namespace, endpoint.host_ifname):
                pass  # it is this container's
            # As long as it is open here no other namespace gets its number.
            inode = os.fstat(namespace.fd).st_ino
            # Twice: one may have been missed that was forked while its parent ended.
            return not _has_process(inode) and not _has_process(inode)
    except (NamespaceGone, NotANamespace, KernelRefused, OSError):
        return False


def _has_process(inode: int) -> bool:
    """inode: of a network namespace. Raises PermissionError where a thread may not be looked at."""
    for thread in _threads():
        try:
            if (thread / "ns/net").stat().st_ino == inode:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, or has no namespace any more
    return False


def _threads() -> Iterator[Path]:
    """Each thread of each process: a single one may have stepped into another namespace."""
    for process in _PROC.iterdir():
        if not process.name.isdecimal() or process.name == _INIT:
            continue
        try:
            yield from (process / "task").iterdir()
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
            continue
