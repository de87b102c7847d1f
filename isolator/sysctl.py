"""Kernel settings under /proc/sys, of the network namespace that the calling thread is in.

Everything is read before it is written: writing forwarding resets other settings even when it changes
nothing. ``rp_filter`` is never touched: the kernel takes the larger of ``all`` and the interface's, so
setting ``all`` would change links that are not ours; the strict source check is the policy's.
"""

from __future__ import annotations

from pathlib import Path

from isolator.errors import KernelRefused

_ROOT = "/proc/sys/"


def read(name: str) -> str | None:
    """The value of ``net/ipv4/ip_forward``, say; None if there is no such setting."""
    try:
        with open(_ROOT + name, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def ensure(name: str, value: str) -> bool:
    """Give a setting a value; True if it had another before. Raises KernelRefused."""
    try:
        with open(_ROOT + name, "r+", encoding="ascii") as file:
            if file.read().strip() == value:
                return False
            file.seek(0)
            file.write(value)
    except OSError as error:
        raise KernelRefused(
            f"could not set {name.replace('/', '.')} to {value}: {error.strerror}", errno=error.errno or 0
        ) from error
    return True


def enable_forwarding() -> None:
    """Let the node forward IPv4, and IPv6 if its kernel has it.

    A node that forwards IPv6 stops listening to router advertisements, and with them loses its own default
    route, unless accept_ra is 2. So every link that listens to them now is told to go on first.
    """
    ensure("net/ipv4/ip_forward", "1")
    if read("net/ipv6/conf/all/forwarding") in (None, "1"):
        return
    for path in Path(_ROOT, "net/ipv6/conf").iterdir():
        setting = f"net/ipv6/conf/{path.name}"
        if path.name not in ("all", "lo") and read(f"{setting}/accept_ra") == "1":
            ensure(f"{setting}/accept_ra", "2")
    ensure("net/ipv6/conf/all/forwarding", "1")
