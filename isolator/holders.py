"""Which processes have a socket open: a look into every process, for error messages only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")

MOST_NAMED = 3
"""Processes that are named: a server may have forked many that share its socket."""


def holders(inode: int) -> list[str]:
    """``sshd (pid 812)`` for each process that has the socket with that inode open, as far as this one may look.

    Takes some microseconds for each open file of the machine.
    """
    target = f"socket:[{inode}]"
    found = []
    for pid in sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()):
        if target in _open_files(pid):
            found.append(f"{_name(pid)} (pid {pid})")
    # Where systemd opened the socket, it keeps it beside the service, which says more.
    if len(found) > 1 and found[0].endswith("(pid 1)"):
        del found[0]
    return found[:MOST_NAMED]


def _open_files(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:
        return  # it has ended, or may not be looked at
    for descriptor in descriptors:
        try:
            yield os.readlink(f"{folder}/{descriptor}")
        except OSError:
            continue  # closed meanwhile


def _name(pid: int) -> str:
    """What a process calls itself, which may be any bytes."""
    try:
        name = (_PROC / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "a process"
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "a process"
