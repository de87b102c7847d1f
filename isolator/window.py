"""The window through which the agent sees the machine: its network namespace and its PID namespace.

An agent in another network namespace than its endpoints were made from sees none of their interfaces, and one in
another PID namespace none of their processes. That they are not seen then says nothing about them. So the journal
remembers the window, and an agent with endpoints of this boot starts in no other network namespace. A PID namespace is
made anew at each start of an agent in a container; from such a one nothing is concluded anyway (``blind``).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from ipam.errors import InvalidInput
from isolator.errors import JournalUnwritable
from isolator.journal import Journal

log = structlog.get_logger(__name__)

_SO_NETNS_COOKIE = 71
"""asm-generic/socket.h; kernels since 5.14. Of a namespace, for as long as the machine runs; an inode's number is used
again."""

_PROC = Path("/proc")

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of linux/proc_ns.h."""


@dataclass(frozen=True, slots=True)
class Window:
    """boot_id: in which the rest holds. network, processes: what the kernel calls the two namespaces."""

    boot_id: str
    network: str
    processes: str


def window(boot_id: str) -> Window:
    """That of this process."""
    return Window(boot_id, _network_namespace(), _pid_namespace())


def _network_namespace() -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            cookie = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError:
            return os.readlink(_PROC / "thread-self/ns/net")
        return f"net:{int.from_bytes(cookie, 'little')}"


def _pid_namespace() -> str:
    """ "" if /proc is another PID namespace's, and so is what it shows."""
    try:
        if os.readlink(_PROC / "self") != str(os.getpid()):
            return ""
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""


def enter(journal: Journal, now: Window, state_dir: Path) -> None:
    """Go on with the journal's endpoints in this window. Raises InvalidInput where they were made from another network
    namespace."""
    raw = journal.window
    before = msgspec.json.decode(raw, type=Window) if raw else None
    has_endpoints = any(e.asked.boot_id == now.boot_id for e in journal.load_endpoints())
    was_elsewhere = before is not None and before.boot_id == now.boot_id and before.network != now.network
    if was_elsewhere and has_endpoints:
        raise InvalidInput(
            "this agent runs in another network namespace than the one before it in this boot, from where its "
            "containers are not seen, so it would take them for gone; start it where that one ran (on the host: not "
            "in a container without the host's network, nor in a unit with PrivateNetwork=); if its containers have "
            "ended, because it was moved on purpose, or because this machine is itself a container that was started "
            f"anew, move {state_dir}/journal.db* away"
        )
    if before == now:
        return
    try:
        journal.save_window(msgspec.json.encode(now).decode())
    except JournalUnwritable as error:
        log.warning(
            "the agent's namespaces are not journalled; the next start cannot compare them", why=str(error)
        )


def blind(now: Window, mounts: Iterable[str] | None = None) -> str:
    """Why the agent does not see all processes of the machine; "" if it does.

    mounts: lines of /proc/mounts, which are read unless given.
    """
    if now.processes != INITIAL_PID_NAMESPACE:
        return "it runs in a PID namespace of its own"
    lines = (_PROC / "mounts").read_text().splitlines() if mounts is None else mounts
    # The last one mounted there is the one that is seen.
    options = [fields[3] for line in lines if (fields := line.split())[1:3] == [str(_PROC), "proc"]]
    hidden = [
        option for option in (options[-1].split(",") if options else ()) if option.startswith("hidepid=")
    ]
    if hidden and hidden[0] not in ("hidepid=0", "hidepid=off"):
        return f"{_PROC} is mounted with {hidden[0]}"
    return ""
