"""Kernel settings under /proc/sys, of the network namespace that the calling thread is in.

Everything is read before it is written: writing forwarding resets other settings even when it changes
nothing. ``rp_filter`` is never touched: the kernel takes the larger of ``all`` and the interface's, so
setting ``all`` would change links that are not ours; the strict source check is the policy's.
"""

from __future__ import annotations

import os

from isolator.errors import KernelRefused
from isolator.netlink.node import Node
from isolator.underlay import default_links

_ROOT = "/proc/sys/"


def read(name: str) -> str | None:
    """The value of ``net/ipv4/ip_forward``, say; None if there is no such setting."""
    try:
        fd = os.open(_ROOT + name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 256).decode("ascii").strip()
    finally:
        os.close(fd)


def ensure(name: str, value: str) -> bool:
    """Give a setting a value; True if it had another before. Raises KernelRefused."""
    try:
        fd = os.open(_ROOT + name, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.read(fd, 256).decode("ascii").strip() == value:
                return False
            os.pwrite(fd, value.encode("ascii"), 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelRefused(
            f"could not set {name.replace('/', '.')} to {value}: {error.strerror}", errno=error.errno or 0
        ) from error
    return True


def enable_forwarding(node: Node) -> list[str]:
    """Let the node forward IPv4, and IPv6 if its kernel has it; which settings did not. Raises KernelRefused.

    A node that forwards IPv6 stops listening to router advertisements, and with them loses its own default
    route, unless accept_ra is 2. So links that lead out of the node are told to go on listening first.
    """
    changed = ["net.ipv4.ip_forward"] if ensure("net/ipv4/ip_forward", "1") else []
    if read("net/ipv6/conf/all/forwarding") in (None, "1"):
        return changed
    for link in default_links(node):
        if read(f"net/ipv6/conf/{link}/accept_ra") == "1":
            ensure(f"net/ipv6/conf/{link}/accept_ra", "2")
    ensure("net/ipv6/conf/all/forwarding", "1")
    return [*changed, "net.ipv6.conf.all.forwarding"]
