"""Finding the network namespace that an interface of ours leads to, when the path to it is lost.

Namespaces are reached by a mount (engines, ``ip netns``) or by a process in them. Each that this machine shows is
looked into for the other end of the pair, which nothing else can be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink.far_end import far_end
from isolator.netlink.node import Node, pinned

_PROC = Path("/proc")
_MOUNT = re.compile(r"^\d+ \d+ \S+ net:\[(\d+)\] (\S+) ", re.MULTILINE)
"""A network namespace in /proc/self/mountinfo (proc_pid_mountinfo(5)): its inode, and where it is mounted."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


def find_namespace(node: Node, host_ifname: str) -> str | None:
    """A path, as ``Node.open_namespace`` takes it, to the namespace in which the other end of a link of the node is;
    None if none leads there. Takes some microseconds for each process and mount of the machine."""
    looked_into: set[int] = set()
    for path, inode in (*_mounts(), *_processes()):
        if inode not in looked_into:
            looked_into.add(inode)
            if found := _leads_to(node, path, host_ifname):
                return found
    return None


def look_inside(node: Node, host_ifname: str) -> tuple[str, str] | None:
    """That path, and what the other end is called there."""
    path = find_namespace(node, host_ifname)
    if path is None:
        return None
    try:
        with node.open_namespace(path) as namespace, far_end(node, namespace, host_ifname) as end:
            return path, end.link.name
    except (NamespaceGone, NotANamespace, KernelRefused, OSError):
        return None  # it has ended


def _mounts() -> Iterator[tuple[str, int]]:
    for inode, mounted in _MOUNT.findall(Path("/proc/self/mountinfo").read_text()):
        yield _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), mounted), int(inode)


def _processes() -> Iterator[tuple[str, int]]:
    for process in _PROC.iterdir():
        if process.name.isdecimal():
            path = process / "ns/net"
            try:
                yield str(path), path.stat().st_ino
            except OSError:
                continue  # it has ended, or may not be looked at


def _leads_to(node: Node, path: str, host_ifname: str) -> str:
    """The path, if it does; else ""."""
    try:
        with node.open_namespace(path) as namespace, far_end(node, namespace, host_ifname):
            return pinned(namespace) if path.startswith(f"{_PROC}{os.sep}") else path
    except (NamespaceGone, NotANamespace, KernelRefused, OSError):
        return ""
